"""The APIs that clients speak, one per module: each exposes `router(gateway)`."""
