"""LoRA adapters: logits of peft and transformers in float32 from the same files; files that are no use are refused."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from model.adapters import AdapterError, AdapterFiles, open_adapter
from model.adapters.store import AdapterArgs, StageAdapters
from model.batch import Batch, Placed
from model.config import split_layers
from model.group import DecoderGroup
from model.llama import Decoder
from model.stage import Stage, Unsampled
from model.weights import open_checkpoint
from tests.conftest import DEVICES, ints
from tests.model.lora_files import ALL, make_adapter, write_gguf_adapter
from tests.model.test_formats import make_llama
from tests.model.test_graphs import Uncaptured

TOKENS = [(7 * i * i + 3 * i + 1) % 120 for i in range(24)]
BLOCK_SIZE, WAIT_S = 4, 30
SUBSETS = [["q_proj"], ["k_proj"], ["v_proj"], ["o_proj"], ["gate_proj"], ["up_proj"], ["down_proj"],
           ["q_proj", "v_proj"], ["k_proj", "up_proj"], ["gate_proj", "down_proj"], ALL]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_llama("Llama 2 7B, 13B", num_key_value_heads=4).save_pretrained(path)
    return path


class Stages:
    """A model on several stages, or several devices of one, with room for adapters."""

    def __init__(
        self, base: Path, stages: int = 1, on_device: int = 8, max_rank: int = 64, devices: int = 1,
        device: str = "cpu", dtype: torch.dtype = torch.float32, fp8: frozenset[str] = frozenset(),
        captured: bool = False,
    ) -> None:  # fmt: skip
        checkpoint = open_checkpoint(base)
        config = checkpoint.config
        self.stages: list[Stage] = []
        for part in split_layers(config, stages):
            tensors = iter(checkpoint.tensors(part.tensor_names(config)))
            on = [torch.device(device)] * devices
            group = DecoderGroup(Decoder.sharded(config, part, tensors, dtype, on, 64, fp8=fp8))
            adapters = StageAdapters(group, AdapterArgs(on_device, max_rank))
            self.stages.append(Stage(group, 256, BLOCK_SIZE, 16, adapters=adapters))
            if device == "cuda":
                self.stages[-1].capture(64, lambda done, total: None)
            elif captured:
                stage = self.stages[-1]
                with torch.inference_mode():
                    stage._graphs = Uncaptured(stage.decoder, stage.kv, stage.slots, 64, adapters=adapters.slots[0])

    def load(self, path: Path) -> str:
        """Raises what is wrong with it."""
        digest = AdapterFiles(path).digest()
        for stage in self.stages:
            assert stage.adapters is not None
            stage.adapters.load(digest, str(path))
        errors: list[str | None] = []
        for stage in self.stages:
            assert stage.adapters is not None
            stage.adapters._held[digest].exception(WAIT_S)
            errors += [loaded.error for loaded in stage.adapters.take_loaded()]
        if (error := next(filter(None, errors), None)) is not None:
            raise AdapterError(error)
        return digest

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [samples, V]."""
        hidden: Any = None
        for stage in self.stages:
            hidden = stage.compute(batch, hidden)
        if isinstance(hidden, Unsampled):
            return hidden.logits
        raise AssertionError("every batch of these tests draws")

    def logits(self, adapters: list[int], placed: list[Placed], chunks: tuple[int, ...]) -> torch.Tensor:
        """[S, V] after all of TOKENS, computed in these chunks, by a sequence with each of these adapters."""
        count, done, first = len(adapters), 0, True
        blocks = -(-len(TOKENS) // BLOCK_SIZE)
        for chunk in chunks:
            known = -(-done // BLOCK_SIZE)
            new = -(-(done + chunk) // BLOCK_SIZE) - known
            batch = Batch(
                0, 0, np.tile(np.array(TOKENS[done : done + chunk], np.int32), count), ints(*[chunk] * count),
                ints(*[done] * count), ints(*range(count)), ints(*[new] * count),
                ints(*[i * blocks + known + j for i in range(count) for j in range(new)]), -1,
                ints(*range(count)), draws=ints(*range(count)),
                adapters=ints(*adapters) if any(adapters) else ints(), placed=placed if first else [],
            )  # fmt: skip
            result, done, first = self.run(batch), done + chunk, False
        return result


def their_logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """[V]"""
    llama: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        llama = PeftModel.from_pretrained(llama, adapter).eval()
    with torch.inference_mode():
        logits: torch.Tensor = llama(torch.tensor([TOKENS])).logits[0, -1]
    return logits


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.cpu() - expected).abs().max().item()


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_every_subset_of_the_products(base: Path, modules: list[str], tmp_path: Path) -> None:
    make_adapter(base, tmp_path, 1, target_modules=modules)
    stages = Stages(base)
    placed = [Placed(3, stages.load(tmp_path))]
    expected = their_logits(base, tmp_path)
    assert error_of(stages.logits([3], placed, (24,))[0], expected) < 1e-4
    assert error_of(expected, their_logits(base, None)) > 1e-2, "the adapter does nothing: the test proves nothing"


CONFIGS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1},
    "rank 16": {"r": 16},
    "rank 33": {"r": 33},
    "rank 64": {"r": 64, "lora_alpha": 8},
    "rslora": {"r": 16, "use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 3, "layers.2.mlp.down_proj": 20}},
    "alpha_pattern": {"alpha_pattern": {"k_proj": 3, r"model\.layers\.[01]\.mlp\.up_proj": 40, "up_proj": 1}},
    "both patterns, rslora": {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 2}, "use_rslora": True},
    "some layers": {"layers_to_transform": [1, 3]},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_ranks_scales_and_patterns_on_stages(base: Path, config: str, stages: int, tmp_path: Path) -> None:
    """In one step, in chunks, and token by token at the end."""
    make_adapter(base, tmp_path, 2, **CONFIGS[config])
    served = Stages(base, stages)
    placed = [Placed(1, served.load(tmp_path))]
    expected = their_logits(base, tmp_path)
    for chunks in ((24,), (7, 9, 8), (22, 1, 1)):
        assert error_of(served.logits([1], placed, chunks)[0], expected) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stages", "captured"), [(1, False), (3, False), (2, True)])
def test_eight_adapters_and_none_in_one_batch(
    base: Path, device: str, stages: int, captured: bool, tmp_path: Path
) -> None:
    """In steps that are launched operation by operation, and by way of what captured ones read."""
    ranks = [1, 4, 8, 16, 17, 32, 64, 5]
    for i, rank in enumerate(ranks):
        make_adapter(base, tmp_path / str(i), i, r=rank, target_modules=ALL if i % 2 else ["q_proj", "v_proj"])
    served = Stages(base, stages, device=device, captured=captured)
    placed = [Placed(i + 1, served.load(tmp_path / str(i))) for i in range(8)]
    slots = [0, 8, 3, 1, 0, 2, 7, 4, 5, 6, 8, 3]
    expected = {i + 1: their_logits(base, tmp_path / str(i)) for i in range(8)} | {0: their_logits(base, None)}
    for chunks in ((24,), (2, 21, 1)):  # more tokens than are captured on a GPU, fewer, one each
        found = served.logits(slots, placed, chunks)
        for row, slot in zip(found, slots, strict=True):
            assert error_of(row, expected[slot]) < (1e-4 if device == "cpu" else 2e-3), f"slot {slot}"


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_goes_from_one_adapter_to_another(base: Path, device: str, tmp_path: Path) -> None:
    """What a larger one left there is not seen, nor one of another shape; steps without adapters know nothing of it."""
    make_adapter(base, tmp_path / "large", 1, r=64)
    make_adapter(base, tmp_path / "small", 2, r=2, target_modules=["k_proj", "down_proj"])
    served = Stages(base, 2, on_device=1, device=device)
    digests = {name: served.load(tmp_path / name) for name in ("large", "small")}
    bound = 1e-4 if device == "cpu" else 2e-3
    for name in ("large", "small", "large"):
        found = served.logits([1, 0], [Placed(1, digests[name])], (20, 4))
        assert error_of(found[0], their_logits(base, tmp_path / name)) < bound
        assert error_of(found[1], their_logits(base, None)) < bound
        assert error_of(served.logits([0], [], (24,))[0], their_logits(base, None)) < bound


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_share_a_stage(base: Path, devices: int, tmp_path: Path) -> None:
    make_adapter(base, tmp_path, 3, r=12)
    served = Stages(base, 2, devices=devices)
    placed = [Placed(2, served.load(tmp_path))]
    found = served.logits([2, 0], placed, (20, 4))
    assert error_of(found[0], their_logits(base, tmp_path)) < 1e-4
    assert error_of(found[1], their_logits(base, None)) < 1e-4


def test_a_gguf_adapter_is_the_same_adapter(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "peft", 4, r=6, lora_alpha=9)
    write_gguf_adapter(tmp_path / "peft", tmp_path / "lora.gguf", 9, 8)
    served = Stages(base)
    expected = their_logits(base, tmp_path / "peft")
    placed = [Placed(1, served.load(tmp_path / "lora.gguf"))]
    assert error_of(served.logits([1], placed, (24,))[0], expected) < 1e-4


def test_a_bin_is_the_same_adapter(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path, 4)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    served = Stages(base)
    placed = [Placed(1, served.load(tmp_path))]
    assert error_of(served.logits([1], placed, (24,))[0], their_logits(base, tmp_path)) < 1e-4


# -- what is refused --------------------------------------------------------------------------------------------------


def change_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(path: Path, change: Any) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if "lora_B" in key)]


def _rename(to: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[to] = tensors.pop(next(iter(tensors)))

    return change


def _as_integers(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.int32)


PREFIX = "base_model.model."
SPOILED: dict[str, tuple[Any, str]] = {
    "dora": (lambda p: change_config(p, use_dora=True), "use_dora is not supported"),
    "bias": (lambda p: change_config(p, bias="all"), "bias: 'all' is not supported"),
    "lora_bias": (lambda p: change_config(p, lora_bias=True), "lora_bias is not supported"),
    "modules_to_save": (lambda p: change_config(p, modules_to_save=["lm_head"]), "modules_to_save is not supported"),
    "pissa": (lambda p: change_config(p, init_lora_weights="pissa"), "init_lora_weights"),
    "activated": (lambda p: change_config(p, alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "something new": (lambda p: change_config(p, use_hyper_lora=True), "use_hyper_lora is not supported"),
    "not lora": (lambda p: change_config(p, peft_type="IA3"), "peft_type is 'IA3'"),
    "no number": (lambda p: change_config(p, lora_alpha="many"), "lora_alpha is 'many'"),
    "not finite": (lambda p: change_config(p, lora_alpha=float("inf")), "lora_alpha is inf"),
    "rank 0": (lambda p: change_config(p, r=0), "a rank is at least 1"),
    "another rank": (lambda p: change_config(p, r=9), "has rank 8, the configuration says 9"),
    "a slow pattern": (lambda p: change_config(p, rank_pattern={"(a+)+b": 3}), "repeats a group"),
    "a wrong pattern": (lambda p: change_config(p, alpha_pattern={"(": 3}), "is not valid"),
    "no JSON": (lambda p: (p / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda p: (p / "adapter_config.json").write_text("[]"), "does not hold a JSON object"),
    "no config": (lambda p: (p / "adapter_config.json").unlink(), "is no adapter"),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), "neither"),
    "half a pair": (lambda p: change_tensors(p, _drop), "only one of its two matrices"),
    "a head": (lambda p: change_tensors(p, _rename(f"{PREFIX}lm_head.lora_A.weight")), "embeddings and the head"),
    "an embedding": (
        lambda p: change_tensors(p, _rename(f"{PREFIX}model.embed_tokens.lora_embedding_A")),
        "embeddings and the head",
    ),
    "magnitudes": (
        lambda p: change_tensors(p, _rename(f"{PREFIX}model.layers.0.mlp.up_proj.lora_magnitude_vector")),
        "DoRA",
    ),
    "another module": (
        lambda p: change_tensors(p, _rename(f"{PREFIX}model.layers.0.mlp.fc1.lora_A.weight")),
        "not one of the seven products",
    ),
    "a layer too many": (
        lambda p: change_tensors(
            p, lambda t: t.update({k.replace("s.0.", "s.77."): v.clone() for k, v in t.items() if "s.0." in k})
        ),
        "is of layer 77, the model has 4",
    ),
    "transposed": (lambda p: change_tensors(p, lambda t: t.update({k: v.t().contiguous() for k, v in t.items()})), "A"),
    "integers": (lambda p: change_tensors(p, _as_integers), "is stored as I32"),
    "empty": (lambda p: change_tensors(p, lambda t: t.clear()), "it is empty"),
    "truncated": (
        lambda p: (p / "adapter_model.safetensors").write_bytes((p / "adapter_model.safetensors").read_bytes()[:-99]),
        "cannot be read",
    ),
    "garbage": (lambda p: (p / "adapter_model.safetensors").write_bytes(b"x" * 1000), "cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound")
    make_adapter(base, path, 5)
    return path


@pytest.fixture(scope="module")
def served(base: Path) -> Stages:
    return Stages(base, max_rank=16)


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_no_use_is_one_error_that_says_why(what: str, sound: Path, served: Stages, tmp_path: Path) -> None:
    path = tmp_path / "spoiled"
    shutil.copytree(sound, path)
    spoil, says = SPOILED[what]
    spoil(path)
    with pytest.raises(AdapterError, match="adapter /") as raised:
        served.load(path)
    assert says in str(raised.value)
    placed = [Placed(1, served.load(sound))]
    assert torch.isfinite(served.logits([1], placed, (24,))).all()


def test_one_of_another_model_is_refused(base: Path, served: Stages, tmp_path: Path) -> None:
    make_llama("Llama 2 7B, 13B", hidden_size=128).save_pretrained(tmp_path / "other")
    make_adapter(tmp_path / "other", tmp_path / "lora", 1)
    with pytest.raises(AdapterError, match="made for another model"):
        served.load(tmp_path / "lora")


def test_a_rank_that_there_is_no_room_for_is_refused(base: Path, served: Stages, tmp_path: Path) -> None:
    make_adapter(base, tmp_path, 1, r=17)
    with pytest.raises(AdapterError, match="has rank 17, and room is kept for 16: raise"):
        served.load(tmp_path)


def test_a_damaged_gguf_is_refused(base: Path, sound: Path, served: Stages, tmp_path: Path) -> None:
    write_gguf_adapter(sound, tmp_path / "whole.gguf", 9, 8)
    whole = (tmp_path / "whole.gguf").read_bytes()
    for size in (10, 100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(AdapterError, match="adapter /"):
            served.load(tmp_path / "cut.gguf")


def test_another_file_on_this_node_than_where_it_was_named_is_refused(base: Path, sound: Path, served: Stages) -> None:
    assert served.stages[0].adapters is not None
    adapters = served.stages[0].adapters
    adapters.load("0" * 64, str(sound))
    adapters._held["0" * 64].exception(WAIT_S)
    assert "is another one on this node" in str(adapters.take_loaded()[0].error)


def test_the_digest_is_that_of_content(sound: Path, tmp_path: Path) -> None:
    """Copied, renamed, touched: the same. A changed scale or weight: another one."""
    before = AdapterFiles(sound).digest()
    copy = tmp_path / "another name"
    shutil.copytree(sound, copy)
    (copy / "README.md").write_text("new")
    assert AdapterFiles(copy).digest() == before
    change_config(copy, lora_alpha=17)
    changed = AdapterFiles(copy).digest()
    change_tensors(copy, lambda t: t[next(iter(t))].view(-1)[0].add_(1e-3))
    assert len({before, changed, AdapterFiles(copy).digest()}) == 3


def test_ranks_are_read_without_the_weights(base: Path, sound: Path) -> None:
    adapter = open_adapter(AdapterFiles(sound), open_checkpoint(base).config)
    assert set(adapter.ranks.values()) == {8}
    assert len(adapter.ranks) == len(list(itertools.product(range(4), ALL)))
