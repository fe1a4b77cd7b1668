"""What a tenant may use in a minute, over all gateways.

`buckets` are the sums; `ledger` keeps those that count, in one process for all gateways; `shared` is what a gateway
asks, and what it goes by while the ledger does not answer.
"""
