"""How many replicas: a pure function of what they report."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig

from deployments.routing.autoscaling import (
    Demand,
    EnginePolicy,
    Pipeline,
    follow_demand,
    gateways_needed,
    pipelines_needed,
)

# Llama 2 70B of the shipped file on two H200s: decoding as fast as its 429s showed, which began at 740 waiting answers
# of 150 tokens; prompts at the 630 TFLOP/s that were measured of each GPU.
SHIPPED = Pipeline(prefill_rate=9000.0, decode_rate=3700.0, max_seqs=512, kv_tokens=350_000)
TARGET_S = 30.0


def demand(**values: float) -> Demand:
    running = values.get("running", 0.0)
    return Demand(**{"requests": 1.0, "running_tokens": running * 100, **values})


@pytest.mark.parametrize(("prompt", "output", "refused_at"), [(20, 150, 740), (30, 200, 555), (50, 300, 370)])
def test_it_grows_before_the_first_refusal(prompt: int, output: int, refused_at: int) -> None:
    """With the load of that report: by the old constants one pipeline of four was wanted when 429s began."""

    def wanted(running: int, waiting: int, pipelines: int = 1) -> int:
        tokens = {"running_tokens": running * (prompt + output / 2), "waiting_tokens": float(waiting * prompt)}
        load = demand(running=running, waiting=waiting, mean_output=output, **tokens)
        return pipelines_needed(load, SHIPPED, TARGET_S).met_from(pipelines)

    assert wanted(400, 0) == 1
    assert wanted(420, 0) == 2, "before anybody waits: what loads needs time"
    assert wanted(512, refused_at) == 2, "by what waits; those refused say whether it is enough"
    assert wanted(1024, 0, 2) == 3
    assert wanted(620, 0, 2) == 2, "no way back before there is room"
    assert wanted(300, 0, 2) == 1


@pytest.mark.parametrize(
    ("running", "waiting", "waiting_tokens", "target", "wanted"),
    [
        (64 * 100, 64 * 4, 64 * 320, 64, range(9, 65)),  # 320 tokens for each of 64: a moment's work (66 were wanted)
        (8 * 512, 8 * 88, 8 * 88 * 30, 8, range(8, 11)),  # eight full ones with 600 requests each (104 were wanted)
        (0, 250, 500_000, 1, range(2, 5)),  # 500,000 tokens at once (9 were wanted)
    ],
)
def test_what_waits_is_compared_with_what_all_running_ones_take(
    running: int, waiting: int, waiting_tokens: int, target: int, wanted: range
) -> None:
    load = demand(running=running, waiting=waiting, waiting_tokens=waiting_tokens, mean_output=200.0)
    assert pipelines_needed(load, SHIPPED, TARGET_S).met_from(target) in wanted


def test_those_refused_are_demand() -> None:
    full = demand(running=512, waiting=740, waiting_tokens=740 * 20, mean_output=150.0)
    rate = SHIPPED.decode_rate / 150  # answers/s of one pipeline
    for times in (1, 2, 3, 10):
        load = replace(full, refused_per_s=times * rate, refused_tokens_per_s=times * rate * 20)
        assert pipelines_needed(load, SHIPPED, TARGET_S).met_from(1) in (times + 1, times + 2)
    unknown = replace(full, mean_output=0.0, refused_per_s=rate)  # before any answer has ended
    assert pipelines_needed(unknown, SHIPPED, TARGET_S).met_from(1) > 2


@settings(max_examples=300, deadline=None)
@given(
    running=st.integers(0, 4000), waiting=st.integers(0, 4000), prompt=st.integers(1, 4000),
    output=st.integers(1, 2000), target=st.integers(0, 64), refused=st.floats(0, 100),
)  # fmt: skip
def test_more_load_never_wants_fewer(
    running: int, waiting: int, prompt: int, output: int, target: int, refused: float
) -> None:
    load = demand(
        running=running, waiting=waiting, waiting_tokens=float(waiting * prompt), mean_output=float(output),
        running_tokens=running * (prompt + output / 2), refused_per_s=refused, refused_tokens_per_s=refused * prompt,
    )  # fmt: skip
    here = pipelines_needed(load, SHIPPED, TARGET_S)
    assert here.least <= here.most
    more = replace(load, waiting=waiting + 100, waiting_tokens=float((waiting + 100) * prompt))
    assert pipelines_needed(more, SHIPPED, TARGET_S).met_from(target) >= here.met_from(target)
    settled = here.met_from(target)
    assert here.met_from(settled) == settled, "where it is right it stays"


def test_nothing_to_do_needs_nothing() -> None:
    assert pipelines_needed(Demand(running=0.01), SHIPPED, TARGET_S).met_from(4) == 0, "probes are no demand"
    assert pipelines_needed(demand(), SHIPPED, TARGET_S).met_from(4) == 1, "a short request was here lately"


# -- as Serve calls it ------------------------------------------------------------------------------------------------

ENGINE = {
    "running": 0.0, "running_tokens": 0.0, "waiting": 0.0, "waiting_tokens": 0.0, "requests": 0.0, "mean_output": 150.0,
    "prefilled_per_s": 0.0, "prefill_rate": 8000.0, "decode_rate": 3700.0, "max_seqs": 512.0, "kv_tokens": 350_000.0,
}  # fmt: skip
GATEWAY = {
    "held": 0.0,
    "held_tokens": 0.0,
    "refused_per_s": 0.0,
    "refused_tokens_per_s": 0.0,
    "target_s": 30.0,
    "cpu": 0.1,
}


class Contexts:
    """What Serve gives the policy, with its wrapper of bounds and delays around it; time is ours."""

    def __init__(self, min_replicas: int = 1, max_replicas: int = 4, downscale_delay_s: float = 900.0) -> None:
        self.gateway, self.engine = DeploymentID("Gateway", "caravan"), DeploymentID("Engine", "caravan")
        bounds = {"min_replicas": min_replicas, "max_replicas": max_replicas, "look_back_period_s": 20.0}
        self.config = AutoscalingConfig(**bounds, upscale_delay_s=20.0, downscale_delay_s=downscale_delay_s)
        self.policy = _apply_app_level_autoscaling_config(follow_demand)
        self.states: dict[Any, Any] = {}

    def ask(self, running: int, target: int, engine: dict[str, float], gateway: dict[str, float]) -> int:
        """The target that follows."""
        engines = {name: dict.fromkeys(range(running), value) for name, value in engine.items()} if running else {}
        common = {"config": self.config, "total_num_requests": 0}
        contexts = {
            self.gateway: SimpleNamespace(
                current_num_replicas=1, target_num_replicas=1, policy_state=self.states.get(self.gateway, {}),
                aggregated_metrics={name: {0: value} for name, value in gateway.items()}, **common,
            ),
            self.engine: SimpleNamespace(
                current_num_replicas=running, target_num_replicas=target, aggregated_metrics=engines,
                policy_state=self.states.get(self.engine, {}), **common,
            ),
        }  # fmt: skip
        decisions, self.states = self.policy(contexts)
        return max(self.config.min_replicas, min(self.config.max_replicas, decisions[self.engine]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(autoscaling_policy, "time", SimpleNamespace(time=lambda: now[0]))
    return now


def test_what_cannot_be_placed_is_not_asked_for_for_ever(clock: list[float]) -> None:
    """Four wanted, room for two. After the load the target comes down by itself, within the delay."""
    contexts = Contexts()
    full = ENGINE | {
        "running": 512.0,
        "running_tokens": 5e4,
        "waiting": 500.0,
        "waiting_tokens": 1e4,
        "requests": 1012.0,
    }
    target = 2
    for _ in range(60):
        target = contexts.ask(2, target, full, GATEWAY | {"refused_per_s": 50.0})
        clock[0] += 1
    assert target == 4
    ended = clock[0]
    while (target := contexts.ask(2, target, ENGINE, GATEWAY)) > 1 and clock[0] < ended + 2000:
        clock[0] += 1
    assert clock[0] - ended <= 901


def test_it_grows_on_while_one_loads(clock: list[float]) -> None:
    contexts = Contexts(max_replicas=8)
    wanted = []
    target = 1
    for refused in (0.0, 25.0, 60.0, 120.0):
        full = ENGINE | {
            "running": 512.0,
            "running_tokens": 5e4,
            "waiting": 700.0,
            "waiting_tokens": 1e4,
            "requests": 1e3,
        }
        for _ in range(40):
            target = contexts.ask(1, target, full, GATEWAY | {"refused_per_s": refused})
            clock[0] += 1
        wanted.append(target)
    assert wanted[0] == 2
    assert wanted == sorted(set(wanted)), "one runs all the while"


def test_to_zero_and_from_it(clock: list[float]) -> None:
    contexts = Contexts(min_replicas=0, downscale_delay_s=60.0)
    target = 1
    for _ in range(62):
        target = contexts.ask(1, target, ENGINE, GATEWAY)
        clock[0] += 1
    assert target == 0
    held = GATEWAY | {"held": 4000.0, "held_tokens": 80_000.0}
    assert contexts.ask(0, 0, {}, held) > 1, "as many as are waited for, by what one could do when it last ran"
    assert Contexts(min_replicas=0).ask(0, 0, {}, held) == 1, "where none ever ran: one, which will say"
    assert contexts.ask(0, 1, {}, GATEWAY | {"held": 1.0}) >= 1, "while it loads it is waited for"


def test_gateways_follow_their_processors() -> None:
    def wanted(gateways: int, cpu: float) -> int:
        return gateways_needed({"cpu": dict.fromkeys(range(gateways), cpu)}).met_from(gateways)

    assert [wanted(2, cpu) for cpu in (0.0, 0.3, 0.5, 0.7, 0.72, 1.0)] == [1, 2, 2, 2, 3, 3]


def test_without_the_applications_policy_an_engines_own_view_counts() -> None:
    policy = EnginePolicy(TARGET_S)
    full = ENGINE | {"running": 512.0, "running_tokens": 5e4, "waiting": 700.0, "waiting_tokens": 1e4, "requests": 1e3}
    metrics = {name: {0: value} for name, value in full.items()}
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=1, policy_state={})
    assert policy(context)[0] == 2
    assert policy(SimpleNamespace(aggregated_metrics={}, target_num_replicas=3, policy_state={}))[0] == 3
