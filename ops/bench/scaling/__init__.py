"""How throughput grows with stages and pipelines."""
