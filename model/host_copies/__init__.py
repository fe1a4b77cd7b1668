"""Copies of KV blocks in host memory, which outlives the process."""
