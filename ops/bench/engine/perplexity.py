"""`caravan bench perplexity`: what 8 bits cost a model, as the perplexity of a text beside that of the full weights."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deployments.config import AppConfig
from model.config import PRODUCTS, float8_products, product_of, split_layers
from model.float8 import quantize_weight
from model.kv_cache import FLOAT8
from model.llama import Decoder, Tensors
from model.perplexity import perplexity
from model.text.tokenizer import load_tokenizer
from model.weights import open_checkpoint, resolve_path

Json = dict[str, Any]
WEIGHTS_ALONE = {"fp8-weights": tuple(PRODUCTS), **{f"fp8-{product}": (product,) for product in PRODUCTS}}
QUANTIZATIONS = ("none", "fp8", "fp8-cache", *WEIGHTS_ALONE)


def default_text() -> str:
    """About 170,000 tokens of English that are part of every Python: the reference behind `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def bench_perplexity(
    config: AppConfig, text: str, tokens: int, window: int, quantizations: list[str], skip: int = 0
) -> Json:
    """Perplexity of `tokens` of `text`, from token `skip` on, by the whole model on one device, for each quantization:
    none, fp8 (weights and activations), fp8-cache (keys and values), fp8-weights (no activations), or the weights of
    some products alone: fp8-wqkv, fp8-wo, fp8-w13, fp8-w2. What `model.quantization_ignore` names stays as it is.

    Raises `ValueError` for a text that is too short, a checkpoint that cannot be read, a pattern that names nothing.
    """
    path = resolve_path(config.model.path)
    found_ids = load_tokenizer(path).encode(text, add_bos=False)
    token_ids = found_ids[skip : skip + tokens]
    if len(token_ids) < tokens:
        raise ValueError(f"the text has {len(found_ids):,} tokens, fewer than --skip {skip:,} and --tokens {tokens:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    results: Json = {}
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        for quantization in quantizations:
            task = bar.add_task(quantization, total=tokens)
            decoder = whole_model(config, path, quantization, window)
            kv_dtype = FLOAT8 if quantization == "fp8-cache" else None
            found = perplexity(
                decoder, token_ids, window, lambda done, task=task: bar.advance(task, done), kv_dtype  # type: ignore[misc]
            )  # fmt: skip
            results[quantization] = found.value
            del decoder
    first = results[quantizations[0]]
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "device": torch.cuda.get_device_name() if config.pipeline.device == "cuda" else "cpu",
        "tokens": found.tokens,
        "skipped": skip,
        "window": window,
        "quantization_ignore": config.model.quantization_ignore,
        "perplexity": {name: round(value, 4) for name, value in results.items()},
        "ratio": {name: round(value / first, 5) for name, value in results.items()},
    }


def whole_model(config: AppConfig, path: Path, quantization: str, max_model_len: int) -> Decoder:
    """All layers on the configured device, whatever the number of stages."""
    checkpoint = open_checkpoint(path)
    (part,) = split_layers(checkpoint.config, 1)
    products = float8_products(checkpoint.config, config.model.quantization_ignore)
    kinds = WEIGHTS_ALONE.get(quantization, ())
    alone = frozenset(product for product in products if product.rpartition(".")[2] in kinds)
    tensors = rounded(checkpoint.tensors(part.tensor_names(checkpoint.config)), alone)
    dtype, device = getattr(torch, config.model.dtype), torch.device(config.pipeline.device)
    fp8 = products if quantization == "fp8" else frozenset()
    return Decoder(checkpoint.config, part, tensors, dtype, device, max_model_len, fp8=fp8)


def rounded(tensors: Tensors, products: frozenset[str]) -> Tensors:
    """The same, with the weights of these products as 8 bits and a scale per row hold them."""
    for name, tensor in tensors:
        if product_of(name) in products:
            values, scales = quantize_weight(tensor)
            tensor = values.float() * scales
        yield name, tensor


def perplexity_table(result: Json) -> Table:
    """For people."""
    table = Table("weights", "perplexity", "ratio", title=f"{result['model']}, {result['tokens']:,} tokens predicted")
    for name, value in result["perplexity"].items():
        words = result["dtype"] if name == "none" else name
        table.add_row(words, f"{value:.4f}", f"{result['ratio'][name]:.4f}")
    return table
