"""Adapters on a real engine: every request says what a model with its adapter in the weights says, whatever happens.

The judge: the same engine on weights into which the adapter was added, which `tests/model/test_adapters.py` holds
against peft.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cluster.engine import Engine
from cluster.errors import RequestRejected
from cluster.scheduling.sequence import AdapterRef, Request
from model.adapters import CONFIG, SAFE, AdapterFiles, open_adapter
from model.adapters.merge import MergedCheckpoint
from model.weights.dummy import DummyCheckpoint
from ops.bench.adapters.run import write_adapter
from tests.conftest import TINY, Collector, MakeEngine, request

PROMPT = [5, 17, 250, 3, 9, 88]
RANKS = {"a": 4, "b": 16, "c": 33, "d": 1}
WAIT_S = 60.0


def make(path: Path, seed: int, rank: int) -> AdapterRef:
    """A random adapter that changes what is said."""
    write_adapter(path, TINY, rank, seed, torch.float32)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 200}))
    return AdapterRef(AdapterFiles(path).digest(), str(path))


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRef]:
    where = tmp_path_factory.mktemp("adapters")
    return {name: make(where / name, i, rank) for i, (name, rank) in enumerate(RANKS.items())}


@pytest.fixture(scope="module")
def said(refs: dict[str, AdapterRef]) -> dict[str, list[int]]:
    """What each says to PROMPT, and "" for none."""
    found: dict[str, list[int]] = {}
    for name, ref in [*refs.items(), ("", None)]:
        checkpoint: Any = DummyCheckpoint(TINY)
        if ref is not None:
            checkpoint = MergedCheckpoint(checkpoint, open_adapter(AdapterFiles(Path(ref.path)), TINY))
        found[name] = alone(checkpoint)
    assert len({tuple(tokens) for tokens in found.values()}) == len(found), "they say the same: nothing is proved"
    return found


def alone(checkpoint: Any) -> list[int]:
    from cluster.local_pipeline import LocalPipeline
    from cluster.scheduling.block_manager import BlockManager
    from cluster.scheduling.scheduler import Scheduler
    from tests.conftest import make_stages

    collector = Collector()
    scheduler = Scheduler(BlockManager(64, 4), depth=1, max_num_seqs=1, max_num_batched_tokens=512, max_model_len=128)
    engine = Engine(scheduler, LocalPipeline(make_stages(num_blocks=64, checkpoint=checkpoint)), collector)
    engine.start()
    engine.add(request("r", PROMPT, 24))
    tokens = collector.wait(["r"])["r"]
    engine.close()
    return tokens


def ask(name: str, ref: AdapterRef | None, tokens: int = 24) -> Request:
    return msgspec.structs.replace(request(name, PROMPT, tokens), adapter=ref)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stages": 3},
        {"stages": 2, "adapters": 1},
        {"stages": 2, "max_num_batched_tokens": 4},  # prompts in chunks
        {"stages": 2, "num_blocks": 33, "max_num_seqs": 16},  # preempted
        {"adapters": 2, "max_host_adapters": 2},  # read again and again
    ],
    ids=str,
)
def test_each_says_what_its_adapter_says(
    options: dict[str, Any], refs: dict[str, AdapterRef], said: dict[str, list[int]], make_engine: MakeEngine
) -> None:
    engine, collector = make_engine(**{"adapters": 4, **options})
    rng = random.Random(0)
    names = [rng.choice([*refs, ""]) for _ in range(40)]
    for i, name in enumerate(names):
        engine.add(ask(f"{i}-{name}", refs.get(name)))
        time.sleep(rng.choice([0.0, 0.01]))
    found = collector.wait([f"{i}-{name}" for i, name in enumerate(names)], WAIT_S)
    for i, name in enumerate(names):
        assert found[f"{i}-{name}"] == said[name], f"{i}-{name}"
    if options.get("num_blocks"):
        assert engine.scheduler.stats().preemptions > 0


def test_after_a_stage_s_death_streams_go_on_with_their_adapters(
    refs: dict[str, AdapterRef], said: dict[str, list[int]], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage that takes its place has nothing: it reads what is needed before its first step."""
    engine, collector = make_engine(stages=2, adapters=2)
    stage = engine.pipeline._stages[1]  # type: ignore[attr-defined]
    compute: Callable[..., Any] = stage.compute
    steps = 0

    def dies(batch: Any, hidden: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (12, 40):
            assert stage.adapters is not None
            stage.adapters._held.clear()
            for slots in stage.adapters.slots:
                slots._values.zero_()
            raise RuntimeError("dies")
        return compute(batch, hidden)

    monkeypatch.setattr(stage, "compute", dies)
    names = ["a", "", "b", "c", "a", "d"]
    for i, name in enumerate(names):
        engine.add(ask(f"{i}", refs.get(name)))
    found = collector.wait([f"{i}" for i in range(len(names))], WAIT_S)
    assert [found[f"{i}"] for i in range(len(names))] == [said[name] for name in names]
    assert len(collector.recoveries) == 2


def test_what_cannot_be_read_is_the_end_of_those_who_need_it_alone(
    refs: dict[str, AdapterRef], said: dict[str, list[int]], make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine, collector = make_engine(stages=2, adapters=2)
    shutil.copytree(refs["a"].path, tmp_path / "cut")
    file = tmp_path / "cut" / SAFE
    file.write_bytes(file.read_bytes()[:-50])
    damaged = AdapterRef(AdapterFiles(tmp_path / "cut").digest(), str(tmp_path / "cut"))
    missing = AdapterRef("f" * 64, str(tmp_path / "nowhere"))
    for name, ref in (("damaged", damaged), ("missing", missing), ("a", refs["a"]), ("", None), ("again", damaged)):
        engine.add(ask(f"r-{name}", ref))
    found = collector.wait(["r-damaged", "r-missing", "r-a", "r-", "r-again"], WAIT_S)
    assert found["r-a"] == said["a"]
    assert found["r-"] == said[""]
    errors = {name: events[-1].error or "" for name, events in collector.events.items()}
    assert "is damaged" in errors["r-damaged"]
    assert "is damaged" in errors["r-again"]
    assert "does not exist" in errors["r-missing"] or "there is no" in errors["r-missing"]
    with pytest.raises(ValueError, match="is damaged"):
        engine.load_adapter(damaged).result(WAIT_S)
    engine.load_adapter(refs["b"]).result(WAIT_S)
    engine.add(ask("after", refs["b"]))
    assert collector.wait(["after"], WAIT_S)["after"] == said["b"]


def test_a_new_version_at_the_same_place_says_its_own(
    refs: dict[str, AdapterRef], said: dict[str, list[int]], make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine, collector = make_engine(stages=2, adapters=2)
    for name in ("a", "b", "a"):
        shutil.rmtree(tmp_path / "v", ignore_errors=True)
        shutil.copytree(refs[name].path, tmp_path / "v")
        ref = AdapterRef(AdapterFiles(tmp_path / "v").digest(), str(tmp_path / "v"))
        id_ = f"{name}-{time.monotonic()}"
        engine.add(ask(id_, ref))
        assert collector.wait([id_], WAIT_S)[id_] == said[name]


def test_without_room_an_adapter_is_refused(refs: dict[str, AdapterRef], make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestRejected, match="no room for adapters"):
        engine.add(ask("r", refs["a"]))


def test_forty_adapters_over_three_slots(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Each says its own, though all of them come at once, and only a few are kept in memory."""
    refs = [make(tmp_path / str(i), 100 + i, 1 + i % 5) for i in range(40)]
    engine, collector = make_engine(stages=2, adapters=3, max_host_adapters=8)
    order = [i for i in range(40) for _ in range(2)]
    random.Random(1).shuffle(order)
    for n, i in enumerate(order):
        engine.add(ask(f"{n}", refs[i], 6))
    found = collector.wait([f"{n}" for n in range(len(order))], 2 * WAIT_S)
    by_adapter: dict[int, set[tuple[int, ...]]] = {}
    for n, i in enumerate(order):
        by_adapter.setdefault(i, set()).add(tuple(found[f"{n}"]))
    for i, answers in by_adapter.items():
        merged: Any = MergedCheckpoint(DummyCheckpoint(TINY), open_adapter(AdapterFiles(Path(refs[i].path)), TINY))
        if i % 8 == 0:
            assert answers == {tuple(alone(merged)[:6])}
        assert len(answers) == 1
