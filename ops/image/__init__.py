"""The container image: `Containerfile`, the command that builds it, and the list of what is in it."""
