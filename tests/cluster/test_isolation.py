"""What goes wrong with one sequence ends that sequence, with an error, and nothing else."""

from typing import Any

import pytest
import torch

from model import sampling, stage
from model.batch import Rules
from model.sampler import Sampler
from tests.cluster.test_engine import PROMPTS
from tests.conftest import MakeEngine, request
from tests.model.test_sampling import V, step

FAULTY = 1.25  # the parameter by which a fault finds its victim


def fault(name: str, is_victim: Any) -> Any:
    """The function `name` of the sampler, which fails for its victim alone."""
    healthy = getattr(sampling, name)

    def faulty(*args: Any) -> Any:
        if is_victim(*args):
            raise RuntimeError("injected")
        return healthy(*args)

    return faulty


FAULTS: dict[str, tuple[dict[str, Any], Any]] = {
    "penalised": (
        {"presence_penalty": FAULTY, "repetition_penalty": 1.1},
        lambda x, seen, repetition, presence, _: (presence == FAULTY).any(),
    ),
    "draw_plain": ({"temperature": FAULTY}, lambda logits, draws: (draws.temperature == FAULTY).any()),
    "draw_filtered": ({"temperature": FAULTY, "top_k": 5}, lambda logits, draws: (draws.temperature == FAULTY).any()),
    "logprobs_of": ({"logprobs": 19}, lambda values, tokens, count: count == 19),
}
COMPANY: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.9, "top_k": 40, "seed": 4},
    {"presence_penalty": 0.5, "logprobs": 2},
]


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_sampler(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, name: str, stages: int
) -> None:
    engine, collector = make_engine(stages=stages)
    names = [str(i) for i in range(len(COMPANY))]
    for i, sampled in enumerate(COMPANY):
        engine.add(request(f"healthy-{i}", PROMPTS[i + 1], **sampled))
    healthy = collector.wait([f"healthy-{i}" for i in names])
    parameters, is_victim = FAULTS[name]
    monkeypatch.setattr(sampling, name, fault(name, is_victim))
    engine.add(request("victim", PROMPTS[5], **parameters))
    for i, sampled in enumerate(COMPANY):
        engine.add(request(str(i), PROMPTS[i + 1], **sampled))
    found = collector.wait([*names, "victim"])
    assert [found[i] for i in names] == [healthy[f"healthy-{i}"] for i in names]
    (end,) = collector.events["victim"]
    assert (end.finish_reason, end.token_id) == ("error", -1)
    assert end.error
    assert engine.failure is None
    assert engine.scheduler.epoch == 0, "no stage was replaced for it"
    assert engine.scheduler.stats().kv_blocks_used == 0


def test_a_fault_in_the_logprobs_of_a_prompt(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, collector = make_engine(stages=2, max_num_batched_tokens=16)
    engine.add(request("alone", PROMPTS[5]))
    tokens = collector.wait(["alone"])["alone"]
    monkeypatch.setattr(stage, "prompt_logprobs", lambda *args: [][0])
    engine.add(request("victim", PROMPTS[6], prompt_logprobs=1))
    engine.add(request("other", PROMPTS[5]))
    assert collector.wait(["other", "victim"])["other"] == tokens
    assert [e.finish_reason for e in collector.events["victim"]] == ["error"]


def test_a_device_that_has_failed_is_not_one_sequences_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise torch.AcceleratorError("the device is lost")

    monkeypatch.setattr(sampling, "draw_plain", broken)
    rules = [Rules(0, 0, 1.0)]
    with pytest.raises(torch.AcceleratorError):
        Sampler(1, V, 9, torch.device("cpu")).sample(step([*rules], rules), torch.zeros(1, V), {})
