"""The shape of a Llama model, and which part of it one stage holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

CODE_LLAMA_THETA = 1e6
CODE_LLAMA_CONTEXT = 100_000  # where Code Llama still works, trained on 16,384 (arXiv 2308.12950, section 3.3)
INT4_BLOCK = 128  # inputs of a row whose 4-bit weights are packed together; see `Int4Weight`
PART_BYTES = {"qweight": 4, "scales": 2, "zeros": 2, "order": 4}  # per element of what a 4-bit weight consists of
FLOAT8_SCALE_BYTES = 4  # beside each row of a weight in 8 bits
PRODUCTS = {  # of a layer: tensors that read the same input are one product, for larger reads of the weights
    "wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "wo": ("attention.wo",),
    "w13": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}
LARGEST = {  # beyond any Llama; a damaged file may say anything
    "dim": 2**20,
    "n_layers": 4096,
    "n_heads": 2**16,
    "n_kv_heads": 2**16,
    "head_dim": 2**16,
    "hidden_dim": 2**22,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**32,
}
PRODUCT_OF = {f"{stem}.weight": product for product, stems in PRODUCTS.items() for stem in stems}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies of a model are stretched beyond the context it was first trained for.

    linear: all by `factor` (arXiv 2306.15595). dynamic: the base grows with the context, here with the longest one that
    is served, since keys in the cache cannot be rotated again (NTK-aware scaling). llama3: low frequencies by `factor`,
    high ones not, those between by a blend (as in Llama 3.1's code). divisors: each as the checkpoint says.
    """

    kind: Literal["linear", "dynamic", "llama3", "divisors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    divisors: tuple[float, ...] = ()  # one for each pair of dimensions

    def __post_init__(self) -> None:
        if not 1.0 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling: factor must be at least 1, got {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor = {self.low_freq_factor} must be positive and below "
                f"high_freq_factor = {self.high_freq_factor}"
            )
        if self.kind in ("dynamic", "llama3") and self.original_max_position_embeddings < 1:
            raise ValueError(f"rope_scaling: {self.kind} needs original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """Layers' weights in 4 bits: (q - zero) * scale, one zero and one scale for `group_size` inputs of an output."""

    group_size: int  # -1: all inputs
    act_order: bool = False  # inputs are grouped in an order of their own, by how much they matter

    def groups(self, inputs: int) -> int:
        """Number of groups of each output."""
        return 1 if self.group_size == -1 else inputs // self.group_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama decoder, whatever checkpoint format it came from.

    Raises `ValueError` for shapes that no Llama decoder has.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # width of the SwiGLU between w1/w3 and w2
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # the context the model was trained for, in tokens, before any rope_scaling
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # wq wk wv wo have biases
    mlp_bias: bool = False  # w1 w2 w3 have biases
    int4: Int4Layout | None = None  # layers' weights are in 4 bits; embedding, norms, head and biases never are

    def __post_init__(self) -> None:
        for field, most in LARGEST.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"model config: {field} must be a positive number up to {most}, got {value!r}")
        for field in ("norm_eps", "rope_theta"):
            value = getattr(self, field)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"model config: {field} must be a positive number, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model config: {self.n_heads} heads do not share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"model config: rotary embedding needs an even head_dim, got {self.head_dim}")
        if self.rope_scaling and self.rope_scaling.divisors and len(self.rope_scaling.divisors) != self.head_dim // 2:
            raise ValueError(
                f"model config: {len(self.rope_scaling.divisors)} rotary factors do not fit head_dim {self.head_dim}"
            )
        if self.int4 is not None:
            self._check_int4(self.int4.group_size)

    def _check_int4(self, size: int) -> None:
        widths = sorted({self.dim, self.n_heads * self.head_dim, self.hidden_dim})
        if size != -1 and (size < 32 or size % 32 or any(width % size for width in widths)):
            raise ValueError(
                f"model config: group_size {size} must be -1 or a multiple of 32 that divides layers' inputs, {widths}"
            )
        if any(width % 8 for width in (*widths, self.n_kv_heads * self.head_dim)):
            raise ValueError(f"model config: weights in 4 bits need widths that are multiples of 8, got {widths}")

    @property
    def groups(self) -> int:
        """Query heads that share a KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for, rope_scaling included: what is served unless the user says otherwise."""
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * scaling.factor)
        return self.max_position_embeddings

    @property
    def longest_context(self) -> int:
        """Tokens up to which the model may be served if the user asks for it."""
        code_llama = self.rope_theta >= CODE_LLAMA_THETA
        return max(self.context_length, CODE_LLAMA_CONTEXT) if code_llama else self.context_length

    @property
    def layer_tensors(self) -> tuple[str, ...]:
        """Names of a layer's tensors, without `layers.N.`, in the order in which a layer is built."""
        attention, mlp = self.attention_bias, self.mlp_bias
        return (
            "attention_norm.weight",
            *self._linear(*PRODUCTS["wqkv"], bias=attention),
            *self._linear(*PRODUCTS["wo"], bias=attention),
            "ffn_norm.weight",
            *self._linear(*PRODUCTS["w13"], bias=mlp),
            *self._linear(*PRODUCTS["w2"], bias=mlp),
        )

    @property
    def weight_parts(self) -> tuple[str, ...]:
        """What the weight of a linear layer consists of."""
        if self.int4 is None:
            return ("weight",)
        return ("qweight", "scales", "zeros", *(("order",) if self.int4.act_order else ()))

    def _linear(self, *stems: str, bias: bool) -> list[str]:
        """Names of what makes up linear layers that read the same input: part by part, so that equal parts meet."""
        return [f"{stem}.{part}" for part in (*self.weight_parts, *(("bias",) if bias else ())) for stem in stems]

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        c, f = self.dim, self.hidden_dim
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        if name in ("tok_embeddings.weight", "output.weight"):
            return self.vocab_size, c
        stem, _, kind = name.split(".", 2)[-1].rpartition(".") if name.startswith("layers.") else name.rpartition(".")
        shape: tuple[int, ...] = {
            "attention.wq": (q, c),
            "attention.wk": (kv, c),
            "attention.wv": (kv, c),
            "attention.wo": (c, q),
            "feed_forward.w1": (f, c),
            "feed_forward.w2": (c, f),
            "feed_forward.w3": (f, c),
        }.get(stem, (c,))  # the others are norms
        if self.int4 is not None and kind in PART_BYTES:
            out, inputs = shape
            blocks, groups = -(-inputs // INT4_BLOCK), self.int4.groups(inputs)
            return {"qweight": (out, blocks * INT4_BLOCK // 8), "order": (inputs,)}.get(kind, (out, groups))
        return shape[:1] if kind == "bias" else shape

    def tensor_bytes(self, name: str, item_size: int, fp8: frozenset[str] = frozenset()) -> int:
        """Bytes of the tensor `name`, with `item_size` for each element that is not part of a 4-bit weight.

        `fp8`: the products whose weights are in 8 bits, with a scale for each row; see `float8_products`.
        """
        shape = self.tensor_shape(name)
        if product_of(name) in fp8:
            return math.prod(shape) + FLOAT8_SCALE_BYTES * shape[0]
        return math.prod(shape) * PART_BYTES.get(name.rpartition(".")[2], item_size)

    def layer_bytes(self, item_size: int) -> int:
        """The same of one decoder layer."""
        return sum(self.tensor_bytes(f"layers.0.{name}", item_size) for name in self.layer_tensors)

    @property
    def layer_parameters(self) -> int:
        """Number of weights in one decoder layer, however many tensors they are stored as."""
        return replace(self, int4=None).layer_bytes(1)

    @property
    def embedding_parameters(self) -> int:
        """Number of weights in the embedding, which is also the size of the output head."""
        return self.vocab_size * self.dim

    @property
    def num_parameters(self) -> int:
        """Number of weights in all, a tied head counted once."""
        ends = self.embedding_parameters * (1 if self.tie_word_embeddings else 2) + self.dim
        return self.n_layers * self.layer_parameters + ends


@dataclass(frozen=True, slots=True)
class StageLayers:
    """Decoder layers [start, stop) of a model with `n_layers`; the first stage embeds, the last one samples."""

    start: int
    stop: int
    n_layers: int

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop == self.n_layers

    def tensor_names(self, config: ModelConfig) -> list[str]:
        """Checkpoint tensors that this stage needs, in Meta's names; nothing else is read."""
        names = ["tok_embeddings.weight"] if self.is_first else []
        for i in range(self.start, self.stop):
            names += [f"layers.{i}.{part}" for part in config.layer_tensors]
        if self.is_last:
            names.append("norm.weight")
            if not config.tie_word_embeddings:
                names.append("output.weight")
            elif not self.is_first:  # a tied head is the embedding once more
                names.append("tok_embeddings.weight")
        return names

    def num_parameters(self, config: ModelConfig) -> int:
        """Number of weights this stage holds."""
        count = (self.stop - self.start) * config.layer_parameters
        count += config.embedding_parameters if self.is_first else 0
        if self.is_last:
            shared = config.tie_word_embeddings and self.is_first
            count += config.dim + (0 if shared else config.embedding_parameters)
        return count


def float8_products(config: ModelConfig, ignore: Sequence[str] = ()) -> frozenset[str]:
    """The layers' products that FP8 computes in 8 bits, as `layers.0.wqkv`: all but those that `ignore` names.

    Each of `ignore` is a pattern (as `fnmatch` takes it) of such names, or of their last parts: `w2` is that of every
    layer. Raises `ValueError` for a pattern that names none.
    """
    names = [f"layers.{i}.{product}" for i in range(config.n_layers) for product in PRODUCTS]
    kept: set[str] = set()
    for pattern in ignore:
        found = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[2], pattern)]
        if not found:
            raise ValueError(
                f"model.quantization_ignore: {pattern!r} names nothing: there are {', '.join(PRODUCTS)} in each of "
                f"{config.n_layers} layers, {names[0]} to {names[-1]}"
            )
        kept.update(found)
    return frozenset(names) - kept


def product_of(name: str) -> str:
    """What the tensor `name` is a weight of, as `layers.3.wqkv` for `layers.3.attention.wq.weight`; "" for others."""
    _, _, inside = name.partition(".")
    layer, _, tensor = inside.partition(".")
    return f"layers.{layer}.{PRODUCT_OF[tensor]}" if tensor in PRODUCT_OF else ""


def split_layers(
    config: ModelConfig, stages: int, split: list[int] | None = None, fp8: frozenset[str] = frozenset()
) -> list[StageLayers]:
    """Cut the decoder into `stages` consecutive parts.

    Without `split` the parts are balanced by the weights a step reads: every layer counts its bytes, with the products
    `fp8` in 8 bits and on average, the last stage also its output head, which is never in 8 bits (an embedding lookup
    reads next to nothing). With `split`, part i gets `split[i]` layers.
    """
    if split is not None:
        if len(split) != stages or sum(split) != config.n_layers or min(split) < 1:
            raise ValueError(
                f"pipeline.split {split} must list {stages} positive numbers of layers that add up to {config.n_layers}"
            )
        counts = split
    else:
        if not 1 <= stages <= config.n_layers:
            raise ValueError(
                f"pipeline.stages must be between 1 and the model's {config.n_layers} layers, got {stages}"
            )
        names = (f"layers.{i}.{part}" for i in range(config.n_layers) for part in config.layer_tensors)
        layers = sum(config.tensor_bytes(name, 2, fp8) for name in names)
        head = 2 * config.embedding_parameters * config.n_layers / layers  # the head's weight, counted in layers
        counts = balanced_counts(config.n_layers, [1.0] * stages, [0.0] * (stages - 1) + [head])
    bounds = [sum(counts[:i]) for i in range(stages + 1)]
    return [StageLayers(bounds[i], bounds[i + 1], config.n_layers) for i in range(stages)]


def balanced_counts(n_layers: int, layer: list[float], rest: list[float]) -> list[int]:
    """How many layers each stage gets, at least one, so that the one that takes longest takes as little as can be.

    A layer costs stage i `layer[i]`, and what it has beside its layers `rest[i]`.
    """
    counts = [1] * len(layer)
    for _ in range(n_layers - len(layer)):
        with_one_more = [r + (n + 1) * cost for n, cost, r in zip(counts, layer, rest, strict=True)]
        counts[with_one_more.index(min(with_one_more))] += 1
    return counts
