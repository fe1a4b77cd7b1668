"""Who changed what, and who was turned away: one line for each, of the logger `deployments.telemetry.audit`.

Keys are named by the first digits of their sha256, which says which one it is and nothing of what it is.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

log = logging.getLogger(__name__)

Event = Literal[
    "key_added", "key_removed", "key_used", "key_refused", "limits_changed", "configuration_changed", "drained"
]
DIGITS = 12  # of a digest
USED_AGAIN_S = (
    3600.0  # the use of a key is told once an hour by each gateway; every request's own line names its tenant
)
REFUSED_AGAIN_S = 1.0  # one refusal a second: a flood of wrong keys is counted in metrics, not written out
MAX_KNOWN = 10_000


def tell(event: Event, **fields: Any) -> None:
    log.info("audit: %s", event, extra={"audit": {"event": event, **fields}})


class KeyAudit:
    """What becomes of keys at one gateway. `Tenant`s are anything with a name and digests of keys."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}  # digest -> when its use was last told
        self._refused_at = 0.0
        self._refused = 0  # since then

    def changed(self, before: Iterable[Any], after: Iterable[Any]) -> None:
        """The file of keys says something else than before."""
        old, new = ({digest: t.name for t in tenants for digest in t.keys} for tenants in (before, after))
        for digest in new.keys() - old.keys():
            tell("key_added", tenant=new[digest], key=digest[:DIGITS])
        for digest in old.keys() - new.keys():
            tell("key_removed", tenant=old[digest], key=digest[:DIGITS])
        settings = [{t.name: t.model_dump(exclude={"keys"}) for t in tenants} for tenants in (before, after)]
        for name in settings[0].keys() & settings[1].keys():
            if settings[0][name] != settings[1][name]:
                tell("limits_changed", tenant=name, **difference(settings[0][name], settings[1][name]))

    def used(self, tenant: str, digest: str) -> None:
        now = time.monotonic()
        if now - self._used.get(digest, -USED_AGAIN_S) >= USED_AGAIN_S:
            if len(self._used) >= MAX_KNOWN:
                self._used.clear()
            self._used[digest] = now
            tell("key_used", tenant=tenant, key=digest[:DIGITS])

    def refused(self, digest: str | None, client: str) -> None:
        """A key that nobody has, or none."""
        now = time.monotonic()
        self._refused += 1
        if now - self._refused_at >= REFUSED_AGAIN_S:
            key = digest[:DIGITS] if digest else None
            tell("key_refused", key=key, client=client, refusals=self._refused)
            self._refused_at, self._refused = now, 0


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Old and new values of what is not the same, by path."""
    old, new = flat(before), flat(after)
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return {"was": {p: old.get(p) for p in changed}, "is": {p: new.get(p) for p in changed}}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def configuration(app: str, config: Mapping[str, Any]) -> None:
    """Tell what of the configuration is not as the last process that began with one, or took one in, found it.

    The last one is kept where the board is. Never raises: without a control plane there is only no line.
    """
    from ray.experimental import internal_kv

    try:
        key, value = f"configuration/{app}".encode(), json.dumps(config, sort_keys=True, default=str).encode()
        found = internal_kv._internal_kv_get(key, namespace=b"caravan-audit")
        if found != value:
            internal_kv._internal_kv_put(key, value, namespace=b"caravan-audit")
            tell("configuration_changed", application=app, **difference(json.loads(found or b"{}"), json.loads(value)))
    except Exception:
        log.exception("a change of the configuration could not be told")
