"""What `caravan inspect` shows of a checkpoint: what it is, how it talks, and how it would be cut into stages."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model.config import PRODUCTS, Int4Layout, ModelConfig, float8_products, split_layers
from model.errors import CheckpointError
from model.families import family_of
from model.text.chat import CHECKPOINTS_OWN, ChatTemplate, load_chat_template
from model.text.infill import can_infill
from model.text.tokenizer import Tokenizer, check_fits, load_tokenizer
from model.weights import detect_format, open_checkpoint, read_config
from model.weights.hf import read_int4
from model.weights.sharded import ITEM_SIZES

EXAMPLE = [{"role": "user", "content": "Hello!"}]


def inspect(
    path: Path, stages: int, dtype: str, prompt_format: str, fp8: bool = False, ignore: Sequence[str] = ()
) -> RenderableType:
    """Everything about the checkpoint at `path`, and its size served in `dtype`, or with `fp8` in 8 bits but for what
    `ignore` names (see `float8_products`). Raises `ValueError`.
    """
    config = read_config(path)
    if fp8 and config.int4 is not None:
        raise ValueError(f"{path}: its layers are in 4 bits already, there is no fp8 of them")
    products = float8_products(config, ignore) if fp8 else frozenset()
    tokenizer = _tokenizer(path, config)
    template = load_chat_template(path, tokenizer, prompt_format) if tokenizer is not None else None
    return Group(
        _facts(path, config, tokenizer),
        *_prompt(path, tokenizer, template),
        split_table(config, stages, dtype, products),
    )


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    try:
        tokenizer = load_tokenizer(path)
    except CheckpointError as error:
        if "has no tokenizer" not in str(error):
            raise
        return None
    check_fits(tokenizer, config.vocab_size, path)
    return tokenizer


def _facts(path: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> Table:
    names = split_layers(config, 1)[0].tensor_names(config)
    kind = detect_format(path)
    table = Table(show_header=False, title=str(path), title_justify="left", box=None)
    scaling = config.rope_scaling
    context = f"{config.context_length} tokens"
    if config.longest_context > config.context_length:
        context += f", up to {config.longest_context} if model.max_model_len says so"
    rope = f"theta {config.rope_theta:g}" + (f", {scaling.kind} scaling by {scaling.factor:g}" if scaling else "")
    shape = (
        f"{config.n_layers} layers, dim {config.dim}, {config.n_heads} heads, {config.n_kv_heads} KV heads of "
        f"{config.head_dim}, feed-forward {config.hidden_dim}, vocabulary {config.vocab_size}"
    )
    extras = [
        word
        for word, there in (
            ("tied embeddings", config.tie_word_embeddings),
            ("attention bias", config.attention_bias),
            ("mlp bias", config.mlp_bias),
        )
        if there
    ]
    rows = {
        "family": family_of(config),
        "format": kind,
        "shape": ", ".join([shape, *extras]),
        **({"layers in": _int4(path, kind, config.int4)} if config.int4 is not None else {}),
        "parameters": f"{config.num_parameters / 1e9:.3f} billion",
        "context": context,
        "rope": rope,
    }
    if kind != "shape":
        checkpoint = open_checkpoint(path)
        types = Counter(checkpoint.stored_type(name) for name in names)
        rows["weights"] = f"{checkpoint.nbytes(names) / 1e9:.3f} GB"
        rows["stored as"] = ", ".join(f"{kind} ({n} tensors)" for kind, n in types.most_common())
    if tokenizer is None:
        rows["tokenizer"] = "none: put tokenizer.model or tokenizer.json beside the weights"
    else:
        rows["tokenizer"] = (
            f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens, begin {tokenizer.bos_id}, "
            f"end {', '.join(map(str, sorted(tokenizer.eos_ids))) or 'none'}"
        )
        rows["infill"] = "yes (suffix in /v1/completions)" if can_infill(tokenizer) else "no"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _int4(path: Path, kind: str, layout: Int4Layout) -> str:
    quantised = read_int4(path) if kind == "huggingface" else None
    by = f" ({quantised.method.upper()})" if quantised is not None else ""
    groups = "one group" if layout.group_size == -1 else f"groups of {layout.group_size} inputs"
    return f"4 bits{by}, {groups}" + (", by their own order (desc_act)" if layout.act_order else "")


def _prompt(path: Path, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> list[RenderableType]:
    if tokenizer is None:
        return []
    if template is None:
        return [
            Text("\nprompt format: none; a base model, which answers /v1/completions only (see model.prompt_format)")
        ]
    ids = template.encode(EXAMPLE)
    shown = [
        Text(f"\nprompt format: {template.name}; a user who says {EXAMPLE[0]['content']!r} becomes"),
        Text(template.render(EXAMPLE), style="green"),
        Text(f"ids: {ids}\n"),
    ]
    theirs = _ids_of_transformers(path) if template.name == CHECKPOINTS_OWN else None
    if theirs is not None:
        shown.append(Text("transformers: the same" if theirs == ids else f"transformers: {theirs}"))
    ends = sorted(tokenizer.eos_ids | template.stop_ids)
    return [*shown, Text(f"an answer ends with: {', '.join(map(str, ends)) or 'nothing but max_tokens'}\n")]


def _ids_of_transformers(path: Path) -> list[int] | str | None:
    """What transformers makes of the example, or why nothing; None if it is not installed or not the judge: the rules
    for GGUF files are llama.cpp's."""
    if detect_format(path) != "huggingface" or importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        theirs: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        ids: list[int] = theirs.apply_chat_template(EXAMPLE, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # whatever it runs into says something about the checkpoint
        return f"fails ({type(error).__name__}: {str(error)[:200]})"
    return ids


def split_table(config: ModelConfig, stages: int, dtype: str, fp8: frozenset[str] = frozenset()) -> Table:
    """How the model is cut: layers, weights and room for KV of each stage; `fp8`: products in 8 bits."""
    size = ITEM_SIZES[dtype]
    title = f"{stages} stages in {dtype}"
    if fp8:
        title += f", {len(fp8)} of {config.n_layers * len(PRODUCTS)} products in fp8"
    table = Table("stage", "layers", "weights", "KV tokens per GB", title=title)
    for i, stage in enumerate(split_layers(config, stages, fp8=fp8)):
        names = stage.tensor_names(config)
        weights = sum(config.tensor_bytes(name, size, fp8) for name in names)
        kv = (stage.stop - stage.start) * 2 * config.n_kv_heads * config.head_dim * size
        ends = (" + embedding" if stage.is_first else "") + (" + head" if stage.is_last else "")
        layers = f"{stage.start}-{stage.stop - 1} ({stage.stop - stage.start}){ends}"
        table.add_row(str(i), layers, f"{weights / 1e9:.2f} GB", f"{1e9 / kv:,.0f}")
    return table
