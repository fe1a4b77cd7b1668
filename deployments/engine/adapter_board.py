"""Adapters that operators have named at run time, where all gateways find them: Ray's key-value store."""

import msgspec

from cluster.scheduling.sequence import AdapterRef
from deployments.engine.board import NAMESPACE

Named = dict[str, AdapterRef]

_decode = msgspec.json.Decoder(Named).decode


def read(app: str) -> Named:
    from ray.experimental import internal_kv

    value = internal_kv._internal_kv_get(_key(app), namespace=NAMESPACE)
    return _decode(value) if value else {}


def write(app: str, named: Named) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_key(app), msgspec.json.encode(named), namespace=NAMESPACE)


def _key(app: str) -> bytes:
    return f"adapters/{app}".encode()
