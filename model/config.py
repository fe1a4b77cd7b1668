"""The shape of a Llama model, and which part of it one stage holds."""

import math
from dataclasses import dataclass
from typing import Literal

CODE_LLAMA_THETA = 1e6
CODE_LLAMA_CONTEXT = 100_000  # where Code Llama still works, trained on 16,384 (arXiv 2308.12950, section 3.3)


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
        if self.factor < 1.0:
            raise ValueError(f"rope_scaling: factor must be at least 1, got {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor = {self.low_freq_factor} must be positive and below "
                f"high_freq_factor = {self.high_freq_factor}"
            )
        if self.kind in ("dynamic", "llama3") and self.original_max_position_embeddings < 1:
            raise ValueError(f"rope_scaling: {self.kind} needs original_max_position_embeddings")


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

    def __post_init__(self) -> None:
        for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"model config: {field} must be positive, got {getattr(self, field)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model config: {self.n_heads} heads do not share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"model config: rotary embedding needs an even head_dim, got {self.head_dim}")
        if self.rope_scaling and self.rope_scaling.divisors and len(self.rope_scaling.divisors) != self.head_dim // 2:
            raise ValueError(
                f"model config: {len(self.rope_scaling.divisors)} rotary factors do not fit head_dim {self.head_dim}"
            )

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
            *linear_tensors("attention.wq", "attention.wk", "attention.wv", bias=attention),
            *linear_tensors("attention.wo", bias=attention),
            "ffn_norm.weight",
            *linear_tensors("feed_forward.w1", "feed_forward.w3", bias=mlp),
            *linear_tensors("feed_forward.w2", bias=mlp),
        )

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        c, f = self.dim, self.hidden_dim
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        if name in ("tok_embeddings.weight", "output.weight"):
            return self.vocab_size, c
        stem, _, kind = name.split(".", 2)[-1].rpartition(".") if name.startswith("layers.") else name.rpartition(".")
        shape = {
            "attention.wq": (q, c),
            "attention.wk": (kv, c),
            "attention.wv": (kv, c),
            "attention.wo": (c, q),
            "feed_forward.w1": (f, c),
            "feed_forward.w2": (c, f),
            "feed_forward.w3": (f, c),
        }.get(stem, (c,))  # the others are norms
        return shape[:1] if kind == "bias" else shape

    @property
    def layer_parameters(self) -> int:
        """Number of weights in one decoder layer."""
        return sum(math.prod(self.tensor_shape(f"layers.0.{name}")) for name in self.layer_tensors)

    @property
    def embedding_parameters(self) -> int:
        """Number of weights in the embedding, which is also the size of the output head."""
        return self.vocab_size * self.dim

    @property
    def num_parameters(self) -> int:
        """Number of weights in all, a tied head counted once."""
        ends = self.embedding_parameters * (1 if self.tie_word_embeddings else 2) + self.dim
        return self.n_layers * self.layer_parameters + ends


def linear_tensors(*stems: str, bias: bool) -> tuple[str, ...]:
    """Names of what makes up linear layers that read the same input: their weights, then their biases."""
    return (*(f"{stem}.weight" for stem in stems), *(f"{stem}.bias" for stem in stems if bias))


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


def split_layers(config: ModelConfig, stages: int, split: list[int] | None = None) -> list[StageLayers]:
    """Cut the decoder into `stages` consecutive parts.

    Without `split` the parts are balanced by the weights a step reads: every layer counts its parameters, the last
    stage also its output head (an embedding lookup reads next to nothing). With `split`, part i gets `split[i]` layers.
    """
    if split is not None:
        if len(split) != stages or sum(split) != config.n_layers or min(split) < 1:
            raise ValueError(
                f"pipeline.split {split} must list {stages} positive numbers of layers that add up to {config.n_layers}"
            )
        counts = split
    else:
        counts = _balanced_counts(config, stages)
    bounds = [sum(counts[:i]) for i in range(stages + 1)]
    return [StageLayers(bounds[i], bounds[i + 1], config.n_layers) for i in range(stages)]


def _balanced_counts(config: ModelConfig, stages: int) -> list[int]:
    if not 1 <= stages <= config.n_layers:
        raise ValueError(f"pipeline.stages must be between 1 and the model's {config.n_layers} layers, got {stages}")
    head = config.embedding_parameters / config.layer_parameters  # the head's weight, counted in layers
    counts = [1] * stages
    for _ in range(config.n_layers - stages):
        loads = [counts[i] + (head if i == stages - 1 else 0.0) for i in range(stages)]
        counts[loads.index(min(loads))] += 1
    return counts
