"""One engine replica as Ray Serve runs it.

`replica` is what Serve calls; `streams` and `token_link` are its tokens' way out; `health` says on the `board` whether
it works, `engine_metrics` counts what it does.
"""
