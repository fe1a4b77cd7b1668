"""The shape of a Llama model, and which part of it one stage holds."""

from dataclasses import dataclass


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
    max_position_embeddings: int  # the context the model was trained for, in tokens
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"model config: {field} must be positive, got {getattr(self, field)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model config: {self.n_heads} heads do not share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"model config: rotary embedding needs an even head_dim, got {self.head_dim}")

    @property
    def layer_parameters(self) -> int:
        """Number of weights in one decoder layer."""
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        return attention + 3 * self.dim * self.hidden_dim + 2 * self.dim

    @property
    def embedding_parameters(self) -> int:
        """Number of weights in the embedding, which is also the size of the output head."""
        return self.vocab_size * self.dim


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
            names += [f"layers.{i}.{part}.weight" for part in LAYER_TENSORS]
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


LAYER_TENSORS = (
    "attention_norm",
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "ffn_norm",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


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
