"""Checkpoints from the outside: the command line, the gateway's view of them, and stages that share the reading."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import split_layers
from model.text.tokenizer import load_tokenizer
from model.weights import open_checkpoint, resolve_path
from tests.model.test_formats import PLAIN, make_llama, write_meta
from tests.model.text.checkpoints import CHATML, SIZE
from tests.model.text.test_checkpoint_files import ADDED, directory
from tests.model.text.test_tokenizer import LLAMA2, MODEL

ROOT = Path(__file__).parents[2]


def caravan(*arguments: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ops.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=directory, check=False
    )


def test_inspect_the_default_model() -> None:
    shown = caravan("inspect", MODEL, "--stages", "3", "--dtype", "float16")
    assert shown.returncode == 0, shown.stderr
    for fact in (
        "format      gguf",
        "30 layers, dim 576, 9 heads, 3 KV heads of 64, feed-forward 1536, vocabulary 49152, tied embeddings",
        "0.135 billion",
        "Q4_1 (210 tensors)",
        "prompt format: the checkpoint's own",
        "<|im_start|>user\nHello!<|im_end|>",
        "3 stages in float16",
    ):
        assert fact in shown.stdout, shown.stdout
    ids = json.loads(shown.stdout.split("ids: ")[1].split("\n\n")[0].replace("\n", " "))
    assert ids[0] == 1
    assert len([line for line in shown.stdout.splitlines() if line.startswith("│") and "GB" in line]) == 3


def test_inspect_a_shape_and_a_base_model(tmp_path: Path) -> None:
    shown = caravan("inspect", "shape:code-llama-34b")
    assert "up to 100000 if model.max_model_len says so" in shown.stdout
    shown = caravan(
        "inspect", "shape:llama-2-70b", "--stages", "1", "--fp8", "--quantization-ignore", "wqkv,layers.79.*"
    )
    assert "1 stages in bfloat16, 237 of 320 products in fp8" in shown.stdout
    (gb,) = (float(word) for word, unit in pairwise(shown.stdout.split()) if unit == "GB" and "." in word)
    ends, layer, last = 2 * 0.524, 0.772 + 2 * 0.0839, 2 * 0.8556
    assert gb == pytest.approx(ends + 79 * layer + last, abs=0.1)
    write_meta(make_llama("Llama 2 70B"), tmp_path, 2)
    shown = caravan("inspect", str(tmp_path))
    assert "format      meta" in shown.stdout
    assert "none: put tokenizer.model or tokenizer.json beside the weights" in shown.stdout


def test_inspect_shows_a_prompt_beside_that_of_transformers(tmp_path: Path) -> None:
    path = directory(tmp_path, chat_template=CHATML + "{{ eos_token }}", added_tokens_decoder=ADDED, legacy=False)
    LlamaForCausalLM(LlamaConfig(**{**PLAIN, "vocab_size": SIZE + 2})).save_pretrained(path)
    shown = caravan("inspect", str(path))
    assert shown.returncode == 0, shown.stderr
    assert "transformers: the same" in shown.stdout
    assert f"an answer ends with: 2, {SIZE}" in shown.stdout


@pytest.mark.skipif(not LLAMA2.is_file(), reason="Llama 2's tokenizer.model may not be distributed")
def test_inspect_says_that_a_tokenizer_is_of_another_model(tmp_path: Path) -> None:
    write_meta(make_llama("Llama 2 70B"), tmp_path, 1)
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    shown = caravan("inspect", str(tmp_path))
    assert shown.returncode == 1
    assert "the tokenizer has 32000 tokens, the model's embedding 120" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "/nowhere"), "there is no /nowhere; correct the path"),
        (("inspect", MODEL, "--dtype", "int3"), "--dtype int3: must be one of float32, float16, bfloat16"),
        (("inspect", MODEL, "--fp8", "--quantization-ignore", "w4"), "'w4' names nothing"),
        (("inspect", MODEL, "--quantization-ignore", "w2"), "give that too"),
        (("inspect", MODEL, "--prompt-format", "codellama-70b"), "needs the token <step>"),
        (("shard", "shape:llama-2-7b", "--stages", "2", "--out", "x"), "is a shape without weights"),
        (("shard", MODEL, "--stages", "99", "--out", "x"), "between 1 and the model's 30 layers"),
        (("shard", MODEL, "--stages", "2", "--split", "1,2", "--out", "x"), "add up to 30"),
    ],
)
def test_mistakes_are_one_plain_sentence(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    shown = caravan(*arguments, directory=tmp_path)
    assert shown.returncode == 1
    assert message in shown.stderr
    assert "Traceback" not in shown.stderr


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    done = caravan("shard", MODEL, "--stages", "2", "--split", "17,13", "--out", str(out), "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert "pipeline.stages: 2 and split: [17,13]" in done.stdout
    sharded, original = open_checkpoint(out), open_checkpoint(resolve_path(MODEL))
    assert sharded.config == original.config
    for part in split_layers(original.config, 2, [17, 13]):
        names = part.tensor_names(original.config)[:3]
        for (name, ours), (_, theirs) in zip(sharded.tensors(names), original.tensors(names), strict=True):
            assert ours.half().equal(theirs.half()), name
    text = "def f(x):\n    return x  # naïve"
    mine, theirs = load_tokenizer(out), load_tokenizer(resolve_path(MODEL))
    assert mine.encode(text, add_bos=True) == theirs.encode(text, add_bos=True)
    assert mine.control_tokens == theirs.control_tokens
    assert "prompt format: the checkpoint's own" in caravan("inspect", str(out)).stdout
    again = caravan("shard", MODEL, "--stages", "2", "--out", str(out))
    assert again.returncode == 1
    assert "is not empty: give a new directory" in again.stderr
