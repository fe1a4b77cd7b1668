"""Files made to do harm: each gives one `CheckpointError`, within 5 s and 500 MB, whatever reads the checkpoint.

Every case is read in a process of its own, which may take so much and no more.
"""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch  # noqa: F401 (so that a child need not import it)

from model.config import split_layers
from model.errors import CheckpointError
from model.text.chat import load_chat_template
from model.text.tokenizer import check_fits, load_tokenizer
from model.weights import open_checkpoint, read_config, resolve_path
from model.weights.sharded import MANIFEST, write_shards
from tests.model.test_formats import make_llama, write_gguf, write_meta
from tests.model.text.checkpoints import CHATML, SIZE, merges, sentencepiece_model, vocabulary
from tests.model.text.test_tokenizer import write_vocabulary

SECONDS, MEMORY = 5, 500_000_000
ROW = "Llama 2 7B, 13B"
HUGE = (10**9, 10**18, 2**64, 10**400)
WRONG = (None, True, -1, 0, 1.5, "x", [], [[]], {}, {"a": {}}, float("nan"))
DEEP = "[" * 100_000

Case = Callable[[Path], Path]  # makes the files in a directory; returns what to read


def read_everything(path: Path) -> None:
    """What gateways and stages do with a checkpoint, but for the computing."""
    path = resolve_path(str(path))
    config = read_config(path)
    checkpoint = open_checkpoint(path)
    names = [name for part in split_layers(config, 2) for name in part.tensor_names(config)]
    checkpoint.nbytes(names)
    for _ in checkpoint.tensors(names[:4]):
        pass
    read_text(path)
    check_fits(load_tokenizer(path), config.vocab_size, path)


def read_text(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.encode("The quick brown fox  " + "a" * 5000 + " " * 5000, add_bos=True)
    template = load_chat_template(path, tokenizer)
    if template is not None:
        template.encode([{"role": "user", "content": "Hi " * 1000}])


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """How reading ends: in a child, with bounds."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        said = "?"
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                read(path)
                said = "nothing was wrong"
            except CheckpointError as error:
                said = f"CheckpointError: {error}"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, said[:1000].encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        timer = signal.setitimer  # a child that hangs is ended
        previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        timer(signal.ITIMER_REAL, SECONDS * 4)
        try:
            said = pipe.read().decode("utf-8", "replace")
        finally:
            timer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    _, _, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime  # of its own: the machine may have other things to do
    if not said:
        return f"killed after {time.monotonic() - started:.1f} s"
    return said if seconds < SECONDS else f"took {seconds:.1f} s: {said}"


# -- sound files, to be spoiled ---------------------------------------------------------------------------------------


def sound(path: Path) -> Path:
    """A Hugging Face checkpoint with everything."""
    make_llama(ROW, vocab_size=SIZE).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML})
    )
    return path


def sound_json(path: Path) -> Path:
    sound(path)
    (path / "tokenizer.model").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return path


def tokenizer_json() -> dict[str, Any]:
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
             "vocab": vocabulary(), "merges": [list(m) for m in merges()]}  # fmt: skip
    special = [{"id": i, "content": name, "special": True, "lstrip": False, "rstrip": False, "single_word": False,
                "normalized": False} for i, name in enumerate(("<unk>", "<s>", "</s>"))]  # fmt: skip
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    return {"version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": pre, "model": model,
            "post_processor": None, "decoder": None, "truncation": None, "padding": None}  # fmt: skip


def changed(file: Path, keys: str, value: Any) -> None:
    """Set `a.b` in a JSON file."""
    content = json.loads(file.read_text())
    *parents, last = keys.split(".")
    where = content
    for key in parents:
        where = where[int(key) if isinstance(where, list) else key]
    where[last] = value
    file.write_text(json.dumps(content))


# -- cases ------------------------------------------------------------------------------------------------------------


def spoiled(make: Case, name: str, keys: str, value: Any) -> Case:
    def case(path: Path) -> Path:
        changed(make(path) / name, keys, value)
        return path

    return case


def written(make: Case, name: str, content: str | bytes) -> Case:
    def case(path: Path) -> Path:
        (make(path) / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return case


def templated(source: Any) -> Case:
    return spoiled(sound, "tokenizer_config.json", "chat_template", source)


def indexed(file: Any, name: str = "model.safetensors.index.json") -> Case:
    """An index that names another file for one tensor."""

    def case(path: Path) -> Path:
        make_llama(ROW, vocab_size=SIZE).save_pretrained(path, max_shard_size="100KB")
        (path / "tokenizer.model").write_bytes(sentencepiece_model())
        (path.parent / "outside.safetensors").write_bytes(b"x")
        changed(
            path / name, "weight_map", json.loads((path / name).read_text())["weight_map"] | {"model.norm.weight": file}
        )
        return path

    return case


def sharded(keys: str, value: Any) -> Case:
    def case(path: Path) -> Path:
        sound(path / "hf")
        checkpoint = open_checkpoint(path / "hf")
        write_shards(path / "hf", checkpoint, split_layers(checkpoint.config, 2), path / "shards", None)
        changed(path / "shards" / MANIFEST, keys, value)
        return path / "shards"

    return case


def meta(params: dict[str, Any] | None = None, part: str | None = None) -> Case:
    def case(path: Path) -> Path:
        write_meta(make_llama(ROW), path, 1)
        (path / "tokenizer.model").write_bytes(sentencepiece_model())
        for key, value in (params or {}).items():
            changed(path / "params.json", key, value)
        if part is not None:
            (path / f"consolidated.{part}.pth").write_bytes(b"")
        return path

    return case


def in_gguf(**values: Any) -> Case:
    """A whole model with other metadata."""

    def case(path: Path) -> Path:
        file, out = path / "sound.gguf", path / "model" / "model.gguf"
        out.parent.mkdir()
        write_gguf(make_llama(ROW), file)
        reader = gguf.GGUFReader(file)
        writer = gguf.GGUFWriter(out, "llama")
        fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.") and "archit" not in k}
        for key, value in (fields | {k.replace("__", "."): v for k, v in values.items()}).items():
            kind = gguf.GGUFValueType.UINT64 if type(value) is int and value >= 2**31 else None
            writer.add_key_value(key, value, kind or gguf.GGUFValueType.get_type(value))
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        return out

    return case


def vocabulary_in_gguf(**values: Any) -> Case:
    def case(path: Path) -> Path:
        write_vocabulary(path / "model.gguf", **values)
        return path / "model.gguf"

    return case


def patched_gguf(at: int, value: int) -> Case:
    """A number in the header: 8 is the count of tensors, 16 that of metadata."""

    def case(path: Path) -> Path:
        write_gguf(make_llama(ROW), path / "model.gguf")
        content = bytearray((path / "model.gguf").read_bytes())
        content[at : at + 8] = value.to_bytes(8, "little")
        (path / "model.gguf").write_bytes(bytes(content))
        return path / "model.gguf"

    return case


def normaliser(**step: Any) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": "a", **step}


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def weights() -> Iterator[tuple[str, Case]]:
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size"):
        for value in (*HUGE, *WRONG):
            yield f"config {key} {str(value)[:20]}", spoiled(sound, "config.json", key, value)
    for key, value in (("architectures", 5), ("architectures", {}), ("rope_parameters", [1]), ("rope_parameters", "x"),
                       ("rope_parameters", {"rope_type": "linear", "factor": 1e400}), ("rms_norm_eps", "x"),
                       ("rope_parameters", {"rope_type": {}}),
                       ("rope_parameters", {"rope_type": "linear", "factor": []}),
                       ("rope_parameters", {"rope_type": "default", "rope_theta": {}}), ("head_dim", 10**18),
                       ("quantization_config", {"quant_method": {}}), ("quantization_config", {"bits": []}),
                       ("quantization_config", 7), ("max_position_embeddings", "x"), ("num_key_value_heads", "x"),
                       ("max_position_embeddings", 10**30), ("rms_norm_eps", float("inf"))):  # fmt: skip
        yield f"config {key} {str(value)[:40]}", spoiled(sound, "config.json", key, value)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
                 "added_tokens.json"):  # fmt: skip
        for content in (DEEP, "{" + '"a":{' * 50_000, "5", "[1]", '"x"', "\xff\xfe", b"\xff\xff", "1" * 10_000, "{"):
            yield f"{name} is {content[:10]!r}", written(sound, name, content)
    for file in ("../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", ".", "..", "\0", "x" * 999,
                 5, None, [], {}, [["x"]]):  # fmt: skip
        yield f"index names {str(file)[:30]!r}", indexed(file)
    for keys, value in (("stages.0.file", "../hf/model.safetensors"), ("stages.0.file", "/etc/passwd"),
                        ("stages.0.file", 5), ("stages.0.file", {}), ("stages.0.layers", ["a", "b"]),
                        ("stages.0.layers", 7), ("stages.0.tensors", []), ("stages", 5), ("stages", [5]),
                        ("config", []), ("config.n_layers", 10**18), ("config.n_layers", "x"), ("config.dim", 1.5),
                        ("config.rope_scaling", 5), ("config.rope_scaling", {"kind": "x"}), ("config.int4", 5),
                        ("stages.0.tensors.norm.weight", 5)):  # fmt: skip
        yield f"manifest {keys} {str(value)[:20]}", sharded(keys.replace("norm.weight", "x"), value)
    for key in (
        "dim",
        "n_layers",
        "n_heads",
        "multiple_of",
        "vocab_size",
        "ffn_dim_multiplier",
        "norm_eps",
        "rope_theta",
    ):
        for value in (10**18, 10**400, "x", [], {}, float("nan")):
            yield f"params {key} {str(value)[:20]}", meta({key: value})
    for part in ("1000000000", "9" * 200):
        yield f"meta part {part[:12]}", meta(part=part)
    for key, value in (("llama__block_count", 2**62), ("llama__block_count", "x"), ("split__count", 2**40),
                       ("split__count", "x"), ("llama__embedding_length", 2**62), ("llama__attention__head_count", 0),
                       ("llama__attention__head_count", [1, 2]), ("llama__rope__freq_base", "x"),
                       ("llama__context_length", "x"), ("llama__attention__layer_norm_rms_epsilon", "x")):  # fmt: skip
        yield f"gguf {key} {str(value)[:20]}", in_gguf(**{key: value})
    for at in (8, 16, 24):
        for value in (2**31, 2**40, 2**64 - 1):
            yield f"gguf header at {at}: {value}", patched_gguf(at, value)


def text() -> Iterator[tuple[str, Case]]:
    for i in (10**8, 10**30, -1, 2**31):
        token = {"content": "<x>", "special": True}
        yield f"added token {i}", spoiled(sound, "tokenizer_config.json", "added_tokens_decoder", {str(i): token})
        yield f"added_tokens.json {i}", written(sound, "added_tokens.json", json.dumps({"<x>": i}))
        yield f"tokenizer.json token {i}", spoiled(sound_json, "tokenizer.json", "added_tokens", [{"id": i, **token}])
        yield f"tokenizer.json vocab {i}", spoiled(sound_json, "tokenizer.json", "model.vocab", {"a": i})
    for value in (5, [5], {"x": {}}, {"1": 5}, {"1": {}}, {"1": {"content": 5}}, {"1": {"content": {}}}, "x"):
        yield f"decoder {value}", spoiled(sound, "tokenizer_config.json", "added_tokens_decoder", value)
        yield (
            f"added_tokens.json {value}",
            written(sound, "added_tokens.json", json.dumps(value if isinstance(value, dict) else {"x": value})),
        )
    for keys, value in (("added_tokens", 5), ("added_tokens", [5]), ("added_tokens", [{"id": "x"}]), ("model", 5),
                        ("model.vocab", []), ("model.vocab", {"a": "b"}), ("model.vocab", {"a": {}}),
                        ("model.merges", 5), ("model.merges", [5]), ("model.merges", ["a"]), ("model.merges", [["a"]]),
                        ("model.merges", [["a", "b", "c"]]), ("model.merges", [["zz", "yy"]]), ("normalizer", 5),
                        ("normalizer", {"type": "Nobody"}), ("pre_tokenizer", [1]), ("post_processor", {"type": "x"}),
                        ("model.dropout", 1.0), ("model.type", {}), ("model.unk_token", {})):  # fmt: skip
        yield f"tokenizer.json {keys} {str(value)[:20]}", spoiled(sound_json, "tokenizer.json", keys, value)
    steps = {
        "doubling": {"type": "Sequence", "normalizers": [normaliser(content="aa")] * 40},
        "long content": normaliser(content="a" * 10_000_000),
        "prepend": {"type": "Prepend", "prepend": "x" * 50_000_000},
        "around nothing": normaliser(pattern={"String": ""}, content="x" * 100_000),
        "by a regex": normaliser(pattern={"Regex": ""}, content="x" * 100_000),
        "by a slow regex": normaliser(pattern={"Regex": "(a+)+$|(a|a)*b"}, content="x"),
    }
    for name, step in steps.items():
        yield f"normaliser {name}", spoiled(sound_json, "tokenizer.json", "normalizer", step)
    for pattern in ("(a+)+$", "(a|aa)+$", "(?:a?){5000}a{5000}", "(", "(?<!a+)", "(.*)*x", "(?=(a+))\\1*b", "\\g<0>"):
        yield f"pre-tokeniser {pattern}", spoiled(sound_json, "tokenizer.json", "pre_tokenizer", regex(pattern))
    for source in (
        *("{{ 'x' * 10**10 }}", "{{ 'x' * 10**9 }}", "{{ 10 ** 10 ** 10 }}", "{{ 'x'.ljust(10**10) }}", "{% for %}"),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' | center(10**10) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ ('x' | indent(10**9)) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ ''.join(['x' * 1000] * 10**7) }}",
        "{{ range(10**5) | list * 10**5 }}",
        "{{ 'a' | replace('', 'x' * 10**5) | replace('', 'y' * 10**5) }}",
        "{{ messages | batch(10**9, 'x') | list }}",
        "(" * 10_000 + "{{ " + "(" * 10_000,
        "{{ " + "-" * 50_000 + "1 }}",
        "{% if a %}" * 5_000 + "{% endif %}" * 5_000,
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ undefined_name.attribute }}",
    ):
        yield f"template {source[:60]}", templated(source)
    yield "template file is no UTF-8", written(sound, "chat_template.jinja", b"\xff\xfe\xff")
    yield "tokenizer.model of zeros", written(sound, "tokenizer.model", b"\0" * 1_000_000)
    yield "tokenizer.model cut", written(sound, "tokenizer.model", sentencepiece_model()[:5000])
    for values in ({"merges": ["zz yy"]}, {"merges": ["a"]}, {"tokens": ["a", "a"], "token_type": [1, 1]},
                   {"token_type": [99] * 262}, {"merges": ["a b"] * 2}):  # fmt: skip
        yield f"gguf vocabulary {str(values)[:40]}", vocabulary_in_gguf(**values)


WEIGHTS, TEXT = dict(weights()), dict(text())


def check(read: Callable[[Path], None], cases: dict[str, Case], path: Path) -> dict[str, str]:
    """Of each case that does not end in one `CheckpointError`, how it does."""
    found = {}
    for i, (name, case) in enumerate(cases.items()):
        where = path / str(i)
        where.mkdir()
        said = outcome(read, case(where))
        if not said.startswith("CheckpointError: "):
            found[name] = said[:300]
    return found


SOUND_AFTER_ALL = {  # what these say has no effect, or is what it may be
    "added_tokens.json 5",
    "added_tokens.json {'1': 5}",
    "tokenizer.json post_processor {'type': 'x'}",
    "tokenizer.json model.dropout 1.0",
    "pre-tokeniser (?:a?){5000}a{5000}",
    "pre-tokeniser (?<!a+)",
    "pre-tokeniser (?=(a+))\\1*b",
    "template {{ 10 ** 10 ** 10 }}",
    "gguf vocabulary {'token_type': [99, 99, 99, 99, 99, 99, ",
    "gguf vocabulary {'merges': ['a b', 'a b']}",
}
REFUSES_MESSAGES = {  # `PromptFormatError`: with other messages these might do
    "template {{ messages[0].content.__class__.__mro__ }}",
    "template {{ undefined_name.attribute }}",
}


def test_the_sound_files_are_sound(tmp_path: Path) -> None:
    for make in (sound, sound_json):
        path = tmp_path / make.__name__
        path.mkdir()
        assert outcome(read_everything, make(path)) == "nothing was wrong"


def expect_one_error_each(read: Callable[[Path], None], cases: dict[str, Case], path: Path) -> None:
    found = check(read, cases, path)
    assert {name for name, said in found.items() if said == "nothing was wrong"} <= SOUND_AFTER_ALL
    others = {name: said for name, said in found.items() if said != "nothing was wrong"}
    assert others.keys() <= REFUSES_MESSAGES
    assert all(said.startswith("PromptFormatError: ") for said in others.values()), others


def test_hostile_files_give_one_error_in_time(tmp_path: Path) -> None:
    """Some of all: each kind is there."""
    some = {name: case for i, (name, case) in enumerate({**WEIGHTS, **TEXT}.items()) if i % 15 == 0}
    expect_one_error_each(read_everything, some, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "text"])
def test_all_hostile_files_give_one_error_in_time(kind: str, tmp_path: Path) -> None:
    read, cases = (read_everything, WEIGHTS) if kind == "weights" else (read_text, TEXT)
    expect_one_error_each(read, cases, tmp_path)


def test_files_that_an_operator_linked_are_read(tmp_path: Path) -> None:
    """As in a hub's cache, where every file is a link out of the directory."""
    make_llama(ROW, vocab_size=SIZE).save_pretrained(tmp_path / "blobs", max_shard_size="100KB")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    checkpoint = open_checkpoint(tmp_path / "snapshot")
    names = split_layers(checkpoint.config, 1)[0].tensor_names(checkpoint.config)
    assert len(list(checkpoint.tensors(names))) == len(names)


def test_a_whole_file_beside_an_index_of_others(tmp_path: Path) -> None:
    """What is half is not served, and of two that are whole none is guessed."""
    make_llama(ROW, vocab_size=SIZE).save_pretrained(tmp_path, max_shard_size="100KB")
    whole = tmp_path / "whole"
    make_llama(ROW, vocab_size=SIZE).save_pretrained(whole)
    (whole / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, and .* names other files that are there"):
        open_checkpoint(tmp_path)
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    checkpoint = open_checkpoint(tmp_path)  # the whole one
    names = split_layers(checkpoint.config, 1)[0].tensor_names(checkpoint.config)
    assert len(list(checkpoint.tensors(names))) == len(names)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "model.safetensors")
    index.write_text(json.dumps(content))
    assert len(list(open_checkpoint(tmp_path).tensors(names))) == len(names)


def test_a_template_that_hangs_takes_no_other_prompt_with_it(tmp_path: Path) -> None:
    """It hangs for some messages only, so that it is found when it is used."""
    source = (
        "{% if messages | length > 3 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    path = sound(tmp_path)
    changed(path / "tokenizer_config.json", "chat_template", source + "{% endif %}{{ messages[0].content }}")
    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, tokenizer)
    assert template is not None
    message = {"role": "user", "content": "the"}
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="takes longer than 2 s"):
        template.encode([message] * 4)
    assert time.monotonic() - started < 30  # the machine may have other things to do
    assert template.encode([message]) == tokenizer.encode("the", add_bos=False)
