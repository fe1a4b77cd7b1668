"""Where and when one pipeline computes: scheduler, block manager, engine, stage actors. Knows nothing of HTTP."""
