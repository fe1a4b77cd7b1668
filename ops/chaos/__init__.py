"""Faults on purpose, under load: whether streams survive what ops/runbook.md says they survive."""

# What can be broken (faults.py says how), and what of it needs a network of its own for every node.
FAULTS = (
    "stage", "engine", "node", "stage-stop", "engine-stop", "gateway-stop", "partition", "slow-link", "disk-full",
    "gateway", "controller", "proxy", "haproxy", "head", "drain", "rollout", "scale",
)  # fmt: skip
NEED_NAMESPACES = frozenset({"partition", "slow-link"})
