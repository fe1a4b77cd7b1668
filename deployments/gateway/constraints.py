"""Constraints as clients write them, checked before an engine sees them."""

import contextlib
import json
from collections import OrderedDict
from typing import Any

from deployments.errors import bad_request
from deployments.gateway.tenants import Tenant
from deployments.offload.grammar_judge import GrammarJudge, Patience
from deployments.offload.turns import Turns
from deployments.telemetry.record import spent
from model.text.constraint import MAX_CONSTRAINT_CHARS, Constraint

REMEMBERED = 1024  # verdicts
QUICK_S = 0.3  # of a processor: what takes longer waits for its turn among others that do
AT_ONCE, SLOW_AT_ONCE, SLOW_EACH = 2, 1, 1  # verdicts; one tenant's slow ones
MAX_WAITING = 32  # requests of one tenant that wait for a verdict; more are asked to come back
QUICK_NICENESS, SLOW_NICENESS = 10, 19
MAX_CHOICES = 1024


class ConstraintChecker:
    """Says which constraints can be served, and remembers what it said. For one event loop.

    Tenants take turns. What is judged quickly never waits for what is not: nobody can tell them apart beforehand, so
    each gets a little time at first, and what needs more begins again among its like.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self._judge = GrammarJudge(path)
        self.timeout_s = timeout_s
        self._quick = Turns(AT_ONCE, AT_ONCE, MAX_WAITING)
        self._slow = Turns(SLOW_AT_ONCE, SLOW_EACH, MAX_WAITING)
        self._verdicts: OrderedDict[tuple[str, str], str | None] = OrderedDict()

    async def accept(self, tenant: Tenant, constraint: Constraint, param: str) -> None:
        """May take long; cancelling it ends the work.

        Raises `ApiError`: 400 that names `param` if it cannot be served, 429 if too many of the tenant's wait.
        """
        key = (constraint.kind, constraint.text)
        if key not in self._verdicts:
            with spent("grammar"):
                await self._judged(tenant, constraint)
        found = self._verdicts[key]
        if found is not None:
            raise bad_request(f"{param}: {found}", param)

    async def _judged(self, tenant: Tenant, constraint: Constraint) -> None:
        try:
            await self._quick.run(tenant.name, lambda: self._decide(constraint, self._quick_patience()))
        except TimeoutError:
            slow = Patience(self.timeout_s, SLOW_NICENESS)
            await self._slow.run(tenant.name, lambda: self._decide(constraint, slow))

    def _quick_patience(self) -> Patience:
        return Patience(min(QUICK_S, self.timeout_s), QUICK_NICENESS)

    def known(self, constraint: Constraint) -> bool:
        """Whether this one has been found good before."""
        return self._verdicts.get((constraint.kind, constraint.text), "") is None

    async def _decide(self, constraint: Constraint, patience: Patience) -> None:
        """Raises `TimeoutError` if there may be a verdict with more patience."""
        key = (constraint.kind, constraint.text)
        if key in self._verdicts:  # somebody else has asked meanwhile
            return
        try:
            verdict = await self._judge.ask(constraint, patience)
        except TimeoutError:
            if patience.seconds < self.timeout_s:
                raise
            verdict = f"takes longer than {self.timeout_s:g} s to compile: make it simpler"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            verdict = "cannot be compiled: make it simpler"
        self._verdicts[key] = verdict
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)

    def close(self) -> None:
        self._judge.close()


def make_constraint(param: str, kind: str, value: Any, end_ids: frozenset[int]) -> Constraint:
    """`kind` is that of `Constraint`, or "choice". Raises `ApiError` that names `param`."""
    if not end_ids:
        raise bad_request(f"{param}: this model has no token that ends an answer, so none can be constrained", param)
    text, kind = _as_text(param, kind, value)
    if len(text) > MAX_CONSTRAINT_CHARS:
        raise bad_request(f"{param}: is longer than {MAX_CONSTRAINT_CHARS} characters", param)
    return Constraint(kind, text, tuple(sorted(end_ids)))  # type: ignore[arg-type]


def _as_text(param: str, kind: str, value: Any) -> tuple[str, str]:
    """A value as a constraint's text and kind."""
    if kind == "choice":
        return _choices(param, value), "grammar"
    if kind in ("json_schema", "structural_tag") and isinstance(value, dict | bool):
        return json.dumps(value), kind
    if not isinstance(value, str) or not value:
        what = "an object, or a string with one" if kind == "json_schema" else "a string that is not empty"
        raise bad_request(f"{param}: must be {what}", param)
    if kind == "json_schema":  # as an object would be written, so that both are one
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(json.loads(value)), kind
    return value, kind


def _choices(param: str, value: Any) -> str:
    """A grammar of one of several strings."""
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= MAX_CHOICES
        or not all(isinstance(choice, str) and choice for choice in value)
    ):
        raise bad_request(f"{param}: must be up to {MAX_CHOICES} strings, none of them empty", param)
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
