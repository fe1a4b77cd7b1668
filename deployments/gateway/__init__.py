"""What one request meets, in this order.

`guard` (its key, its limits, whether it can be taken), `exchange` (the body), a route; `prompts` (token ids), `request`
(what it may ask for), `constraints` (whether an answer can be held to them); `gateway` with `admission` and
`accounting`; `resume` and `engine_client` (to an engine, and to another one if it dies); `pieces` (tokens to text).
`tenants` says who asks.
"""
