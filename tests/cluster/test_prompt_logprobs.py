"""Logprobs of prompts: equal to one pass over the whole prompt, however the engine comes to them."""

import msgspec
import numpy as np
import pytest
import torch

from cluster.errors import StageDied
from cluster.scheduling.sequence import Request, TokenEvent
from model.batch import Batch, StageTiming, StepOutput, TokenLogprobs
from tests.cluster.test_engine import PROMPTS
from tests.conftest import MakeEngine, make_stages, request

PROMPT = PROMPTS[6]  # 100 tokens
K = 3


def naive(prompt: list[int]) -> torch.Tensor:
    """Log probabilities [n, V] of what follows each token, from one pass."""
    (stage,) = make_stages(num_blocks=64)
    hidden: list[torch.Tensor] = []
    forward = stage.group.forward
    stage.group.forward = lambda *a: hidden.append(forward(*a)) or hidden[0]  # type: ignore[func-returns-value,method-assign]
    stage.run(Batch.of_one(np.array(prompt, np.int32), stage.kv.block_size), None)
    return stage.group.logits(hidden[0]).log_softmax(-1)


def check(prompt: list[int], found: list[TokenLogprobs] | None) -> None:
    assert found is not None
    expected = naive(prompt)
    assert len(found) == len(prompt) - 1
    for i, logprobs in enumerate(found):
        assert logprobs.chosen == pytest.approx(float(expected[i, prompt[i + 1]]), abs=1e-4)
        best = expected[i].topk(K)
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def asking(name: str, prompt: list[int], max_tokens: int = 4) -> Request:
    return request(name, prompt, max_tokens=max_tokens, prompt_logprobs=K)


def only_on_the_first(events: list[TokenEvent]) -> list[TokenLogprobs] | None:
    """They come in pieces, before the first token."""
    begun = next(i for i, event in enumerate(events) if event.has_token)
    assert all(event.prompt_logprobs is None for event in events[begun:])
    pieces = [event.prompt_logprobs or [] for event in events[:begun]]
    return [one for piece in pieces for one in piece] if pieces else None


@pytest.mark.parametrize(
    "options",
    [{}, {"stages": 3}, {"max_num_batched_tokens": 7}, {"stages": 2, "max_num_batched_tokens": 64}],
    ids=str,
)
def test_they_equal_one_pass(make_engine: MakeEngine, options: dict[str, int]) -> None:
    engine, collector = make_engine(**options)
    engine.add(request("plain", PROMPT))  # fills the prefix cache, and shares batches
    collector.wait(["plain"])
    engine.add(request("company", PROMPTS[5], max_tokens=30))
    for i in (0, 1, 4, 6):
        engine.add(asking(str(i), PROMPTS[i]))
    collector.wait(["company", *map(str, (0, 1, 4, 6))])
    for i in (0, 1, 4, 6):
        check(PROMPTS[i], only_on_the_first(collector.events[str(i)]))
    engine.add(request("again", PROMPT))
    assert collector.wait(["again"])["again"] == collector.tokens("plain")
    assert next(e for e in collector.events["again"] if e.has_token).num_cached_tokens > 0, (
        "what was computed for logprobs is reused as any other"
    )


def test_after_preemption(make_engine: MakeEngine) -> None:
    engine, collector = make_engine(stages=2, num_blocks=40, max_num_batched_tokens=16)
    for i in range(5):
        engine.add(asking(str(i), PROMPTS[i], max_tokens=60))
    collector.wait([str(i) for i in range(5)])
    assert engine.scheduler.stats().preemptions > 0
    for i in range(5):
        check(PROMPTS[i], only_on_the_first(collector.events[str(i)]))


def test_after_a_stage_died_in_the_middle_of_the_prompt(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collector = make_engine(stages=2, max_num_batched_tokens=16)
    receive, count = engine.pipeline.receive, [0]

    def dies_once(timeout: float | None) -> StepOutput | StageTiming | None:
        message = receive(timeout)
        count[0] += isinstance(message, StepOutput)
        if count[0] == 3:
            count[0] += 1
            raise StageDied("a test pulled the plug")
        return message

    monkeypatch.setattr(engine.pipeline, "receive", dies_once)
    engine.add(asking("r", PROMPT))
    collector.wait(["r"])
    assert engine.scheduler.epoch == 1
    check(PROMPT, only_on_the_first(collector.events["r"]))


def test_a_resumed_request_does_not_ask_again(make_engine: MakeEngine) -> None:
    engine, collector = make_engine()
    engine.add(asking("whole", PROMPT))
    tokens = collector.wait(["whole"])["whole"]
    engine.add(msg := asking("rest", PROMPT).resume(tokens[:2]))
    assert collector.wait([msg.request_id])["rest"] == tokens[2:]
    assert only_on_the_first(collector.events["rest"]) is None


def test_they_leave_with_the_steps_that_compute_them(make_engine: MakeEngine) -> None:
    """A long prompt's are not one message: no event has more of them than a step has tokens."""
    engine, collector = make_engine(stages=2, max_num_batched_tokens=16)
    engine.add(asking("r", PROMPT))
    collector.wait(["r"])
    sizes = [len(event.prompt_logprobs) for event in collector.events["r"] if event.prompt_logprobs]
    assert sum(sizes) == len(PROMPT) - 1
    assert max(sizes) <= 16


@pytest.mark.parametrize("had", [0, 1, 40, len(PROMPT) - 1])
def test_what_another_engine_has_given_is_not_given_again(make_engine: MakeEngine, had: int) -> None:
    engine, collector = make_engine(max_num_batched_tokens=16)
    engine.add(msgspec.structs.replace(asking("r", PROMPT), num_prompt_logprobs=had))
    collector.wait(["r"])
    found = only_on_the_first(collector.events["r"]) or []
    assert len(found) == len(PROMPT) - 1 - had
    expected = naive(PROMPT)
    for i, logprobs in enumerate(found, had):
        assert logprobs.chosen == pytest.approx(float(expected[i, PROMPT[i + 1]]), abs=1e-4)
