"""The same work done by others, beside ours."""
