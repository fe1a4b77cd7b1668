"""Constrained answers are valid and stay the same, however they are computed; what fails in one stays its own."""

import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from cluster.engine import Engine
from cluster.errors import StageDied
from cluster.scheduling import scheduler
from cluster.scheduling.sequence import Request
from model.batch import StageTiming, StepOutput
from model.text.constraint import Constraint
from model.text.grammar import Masks
from model.text.tokenizer.dummy import DummyTokenizer
from tests.conftest import DEVICES, TINY, Collector, MakeEngine, request

EOS = 2
CONFIG = replace(TINY, head_dim=16)  # the least that a GPU multiplies
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 120}}, "required": ["n"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"enum": ["red", "green", None, 3]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]},
    {
        "type": "object",
        "properties": {"at": {"type": "string", "format": "date"}, "ok": {"type": "boolean"}},
        "required": ["at", "ok"],
    },
    {
        "$defs": {"point": {"type": "object", "properties": {"x": {"enum": [0, 1]}}, "required": ["x"]}},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "maxItems": 3,
    },
    {"type": "array", "prefixItems": [{"const": "v"}, {"enum": [1, 2]}], "items": False, "minItems": 2},
    {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": "a"}}, "required": ["t"]},
            {"type": "object", "properties": {"t": {"const": "b"}, "z": {"type": "boolean"}}, "required": ["t", "z"]},
        ]
    },
]


class Bytes(DummyTokenizer):
    """A token per byte, from id 3 on."""

    eos_ids = frozenset({EOS})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 3]) if 3 <= token_id < 259 else b""


def text(tokens: list[int]) -> str:
    assert tokens[-1] == EOS, "the answer ended where its constraint allows an end"
    return bytes(t - 3 for t in tokens[:-1]).decode("utf-8")


@pytest.fixture
def masks() -> Iterator[Masks]:
    made = Masks(lambda: Bytes(CONFIG.vocab_size), lambda: engine_of[0].pipeline.wake())
    yield made
    made.close()


engine_of: list[Engine] = []


def start(make_engine: MakeEngine, **options: Any) -> tuple[Engine, Collector]:
    engine, collector = make_engine(config=CONFIG, **options)
    engine_of[:] = [engine]
    return engine, collector


def constrained(name: str, constraint: dict[str, Any] | str, **sampling: Any) -> Request:
    """A schema, or a regular expression, to follow."""
    kind, source = ("regex", constraint) if isinstance(constraint, str) else ("json_schema", json.dumps(constraint))
    made = Constraint(kind, source, (EOS,))  # type: ignore[arg-type]
    # A model of random bytes finds what no other does: the library takes surrogates in UTF-8 for characters.
    never = {3 + byte: -100.0 for byte in (0xE0, 0xED, 0xF0, 0xF4)}
    options = {"temperature": 1.0, "seed": len(name), "max_tokens": 300, "logit_bias": never, **sampling}
    prompt = [3 + ord(c) % 90 for c in f"prompt {name}"]
    return request(name, prompt, constraint=made, stop_token_ids=(EOS,), **options)


def send(engine: Engine, masks: Masks, made: Request) -> None:
    assert made.sampling.constraint is not None
    engine.add(made, masks.open(made.sampling.constraint, made.output_ids))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stages", [1, 2])
def test_two_hundred_answers_under_ten_schemas_are_valid(
    make_engine: MakeEngine, masks: Masks, stages: int, device: str
) -> None:
    """Mixed with free text, which does not notice, and some of them preempted on the way."""
    engine, collector = start(make_engine, stages=stages, num_blocks=160, device=device)
    free = {f"free-{i}": request(f"free-{i}", [5 + i] * 9, max_tokens=40, temperature=0.8, seed=i) for i in range(8)}
    for made in free.values():
        engine.add(made)
    alone = collector.wait(list(free))
    names = {f"{i}-{k}": schema for i in range(100 // stages) for k, schema in enumerate(SCHEMAS) if i < 20}
    for n, (name, schema) in enumerate(names.items()):
        send(engine, masks, constrained(name, schema, seed=n))
        if n % 30 == 0:
            engine.add(request(f"again-{n // 30}", [5 + n // 30] * 9, max_tokens=40, temperature=0.8, seed=n // 30))
    found = collector.wait([*names, *(f"again-{i}" for i in range(7))])
    for name, schema in names.items():
        jsonschema.validate(json.loads(text(found[name])), schema)
    assert [found[f"again-{i}"] for i in range(7)] == [alone[f"free-{i}"] for i in range(7)]
    assert engine.scheduler.stats().preemptions > 0
    assert len(names) == 200


PHONE = r"\+[0-9]{2} \([0-9]{3}\) [0-9]{3}-[0-9]{4}(, ext\. [0-9]{1,3})?"


def alone(make_engine: MakeEngine, masks: Masks, name: str = "r") -> list[int]:
    engine, collector = start(make_engine)
    send(engine, masks, constrained(name, PHONE))
    tokens = collector.wait([name])[name]
    assert re.fullmatch(PHONE, text(tokens))
    return tokens


def test_a_resumed_answer_goes_on_the_same(make_engine: MakeEngine, masks: Masks) -> None:
    tokens = alone(make_engine, masks)
    for cut in (1, 7, len(tokens) - 1):
        engine, collector = start(make_engine, stages=2)
        send(engine, masks, constrained("r", PHONE).resume(tokens[:cut]))
        assert collector.wait(["r"])["r"] == tokens[cut:]


def test_an_answer_goes_on_the_same_after_a_stage_died(
    make_engine: MakeEngine, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = alone(make_engine, masks)
    engine, collector = start(make_engine, stages=2)
    receive, count = engine.pipeline.receive, [0]

    def dies(timeout: float | None) -> StepOutput | StageTiming | None:
        message = receive(timeout)
        count[0] += isinstance(message, StepOutput)
        if count[0] in (4, 11):
            count[0] += 1
            raise StageDied("a test pulled the plug")
        return message

    monkeypatch.setattr(engine.pipeline, "receive", dies)
    send(engine, masks, constrained("r", PHONE))
    assert collector.wait(["r"])["r"] == tokens
    assert engine.scheduler.epoch == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stages", [1, 2])
def test_batches_that_start_without_their_masks_give_the_same_tokens(
    make_engine: MakeEngine, masks: Masks, monkeypatch: pytest.MonkeyPatch, stages: int, device: str
) -> None:
    """Beside those that start once the masks are there, as they do for constraints that take long."""
    found, late = [], list[int]()
    for ahead in (True, False):
        monkeypatch.setattr(scheduler, "MASK_SECONDS", 0.03 if ahead else 1e-9)
        engine, collector = start(make_engine, stages=stages, device=device)
        send_masks = engine.pipeline.send_masks
        monkeypatch.setattr(engine.pipeline, "send_masks", lambda m, send=send_masks: late.append(1) or send(m))
        for i, schema in enumerate(SCHEMAS):
            send(engine, masks, constrained(str(i), schema))
        found.append(collector.wait([str(i) for i in range(len(SCHEMAS))]))
        assert (len(late) > 10) == ahead
        late.clear()
    assert found[0] == found[1]


def test_with_penalties_logprobs_and_biases(make_engine: MakeEngine, masks: Masks) -> None:
    engine, collector = start(make_engine)
    options = {"presence_penalty": 1.5, "repetition_penalty": 1.3, "logit_bias": {3 + ord("+"): -50.0}, "logprobs": 2}
    send(engine, masks, constrained("r", PHONE, **options))
    assert re.fullmatch(PHONE, text(collector.wait(["r"])["r"]))
    assert all(event.logprob is not None for event in collector.events["r"])


@pytest.mark.parametrize("broken", ["accept_token", "fill_next_token_bitmask", "refuses", "nothing"])
def test_a_failing_matcher_ends_its_own_request_only(make_engine: MakeEngine, masks: Masks, broken: str) -> None:
    healthy = alone(make_engine, masks)
    engine, collector = start(make_engine, stages=2)

    class Faulty:
        """A matcher of the library that fails at its fifth token."""

        def __init__(self, matcher: Any) -> None:
            self.matcher, self.seen = matcher, 0

        def accept_token(self, token_id: int) -> bool:
            self.seen += 1
            if self.seen == 5 and broken == "accept_token":
                raise RuntimeError("injected")
            return bool(self.matcher.accept_token(token_id)) and not (self.seen == 5 and broken == "refuses")

        def fill_next_token_bitmask(self, bits: Any) -> None:
            if self.seen == 5 and broken == "fill_next_token_bitmask":
                raise RuntimeError("injected")
            self.matcher.fill_next_token_bitmask(bits)
            if self.seen == 5 and broken == "nothing":
                bits.zero_()

    made = constrained("victim", PHONE)
    assert made.sampling.constraint is not None
    matcher = masks.open(made.sampling.constraint, [])
    matcher._matcher = Faulty(matcher._matcher)
    engine.add(made, matcher)
    send(engine, masks, constrained("r", PHONE))
    assert collector.wait(["r", "victim"])["r"] == healthy
    assert [e.finish_reason for e in collector.events["victim"]] == [None] * 5 + ["error"]
    assert engine.failure is None
    assert engine.scheduler.stats().kv_blocks_used == 0


def test_a_slow_mask_holds_up_nobody_else(make_engine: MakeEngine, masks: Masks) -> None:
    engine, collector = start(make_engine)
    made = constrained("slow", PHONE)
    assert made.sampling.constraint is not None
    matcher, gate = masks.open(made.sampling.constraint, []), threading.Event()
    healthy = matcher.step

    def waits(*token_ids: int) -> None:
        gate.wait(60)
        healthy(*token_ids)

    matcher.step = waits  # type: ignore[method-assign]
    engine.add(made, matcher)
    engine.add(request("free", [7] * 5, max_tokens=60))
    assert len(collector.wait(["free"])["free"]) == 60
    assert len(collector.tokens("slow")) == 1, "its second token waits for a mask"
    assert engine.scheduler.stats().preemptions == 1, "the batch that had begun goes on without it"
    assert matcher.seconds == math.inf
    gate.set()
    assert re.fullmatch(PHONE, text(collector.wait(["slow"])["slow"]))


def test_a_constraint_whose_masks_take_long_is_left_out_until_they_are_there(
    make_engine: MakeEngine, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MASK_SECONDS", 1e-9)
    engine, collector = start(make_engine, stages=2)
    monkeypatch.setattr(engine.pipeline, "send_masks", lambda late: pytest.fail("a batch waits for a slow mask"))
    send(engine, masks, constrained("r", PHONE))
    assert re.fullmatch(PHONE, text(collector.wait(["r"])["r"]))
    assert engine.scheduler.stats().preemptions == 0


def test_an_aborted_request_with_a_mask_under_way_leaves_nothing(make_engine: MakeEngine, masks: Masks) -> None:
    engine, collector = start(make_engine, stages=2)
    for i in range(5):
        send(engine, masks, constrained(str(i), PHONE))
        engine.abort(str(i))
    engine.add(request("after", [7] * 5))
    collector.wait(["after"])
    assert engine.scheduler.stats().kv_blocks_used == 0
