"""Tensor parallelism: the part of each tensor that one of several devices of a stage holds (arXiv 1909.08053).

What makes queries, keys, values and hidden units is cut by outputs; wo and w2, which read them, by inputs: what these
give are shares of a sum over the devices. A device has whole heads, with the keys and values that they attend to. The
output head is cut by words, the embedding is on the first device alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from model.config import INT4_BLOCK, PRODUCTS, ModelConfig

if TYPE_CHECKING:
    import torch

HIDDEN_UNITS = (256, 128, 64, 32, 16, 8)  # cuts that kernels like, best first
WORDS = 16
SUMMED = (*PRODUCTS["wo"], *PRODUCTS["w2"])  # cut by inputs


@dataclass(frozen=True, slots=True)
class Shard:
    """What device `rank` of `of` holds. The first one leads: it embeds, samples, and speaks to other stages."""

    rank: int
    of: int
    whole: ModelConfig
    heads: range
    kv_heads: range
    hidden: range
    words: range

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def config(self) -> ModelConfig:
        """The shape of what this device computes in a layer."""
        if self.of == 1:
            return self.whole
        return replace(
            self.whole,
            n_heads=len(self.heads),
            n_kv_heads=len(self.kv_heads),
            hidden_dim=len(self.hidden),
            int4=None,  # how weights are stored is the whole's affair
        )

    @property
    def keeps_wo_whole(self) -> bool:
        """Weights in 4 bits can be cut at their groups only, and not at all if their order mixes heads."""
        return self.of > 1 and not _fits_int4(self.whole, self._inputs("attention.wo"), self.whole.n_heads)

    def rows(self, stem: str) -> int:
        """Outputs of the product `stem`."""
        outputs = self._outputs(stem)
        return len(outputs) if outputs is not None else self.whole.tensor_shape(f"layers.0.{stem}.weight")[0]

    def inputs(self, stem: str) -> int:
        """Inputs of the product `stem`, as its weight has them here."""
        if stem in SUMMED and not (stem == "attention.wo" and self.keeps_wo_whole):
            return len(self._inputs(stem))
        return self.whole.dim if stem not in SUMMED else self.whole.n_heads * self.whole.head_dim

    def part(self, name: str, tensor: "torch.Tensor", peek: Callable[[str], "torch.Tensor"]) -> "torch.Tensor | None":
        """The part of the tensor `name` that belongs here; None: there is none.

        `peek(name)` looks at another tensor of the checkpoint: in which order w2 has its inputs decides which hidden
        units are together.
        """
        if self.of == 1:
            return tensor
        if not name.startswith("layers."):
            return tensor
        layer, stem, kind = _split(name)
        if stem in SUMMED:
            return self._of_summed(stem, kind, tensor)
        outputs = self._outputs(stem)
        if outputs is None or kind == "order":  # a norm; the inputs are whole, and so is their order
            return tensor
        if stem in PRODUCTS["w13"] and self.whole.int4 is not None and self.whole.int4.act_order:
            order = peek(f"{layer}.feed_forward.w2.order")
            return tensor[order[self.hidden.start : self.hidden.stop].long()]
        return tensor[outputs.start : outputs.stop]

    def _of_summed(self, stem: str, kind: str, tensor: "torch.Tensor") -> "torch.Tensor | None":
        if kind == "bias":
            return tensor if self.leads else None  # added once
        if stem == "attention.wo" and self.keeps_wo_whole:
            return tensor
        inputs = self._inputs(stem)
        if kind == "weight":
            return tensor[:, inputs.start : inputs.stop]
        if kind == "order":
            return None  # its hidden units are in this order already
        if kind == "qweight":
            return tensor[:, inputs.start // 8 : -(-inputs.stop // INT4_BLOCK) * INT4_BLOCK // 8]
        groups = tensor.shape[1]
        if groups == 1:
            return tensor
        size = (self.whole.tensor_shape(f"layers.0.{stem}.order")[0]) // groups
        return tensor[:, inputs.start // size : inputs.stop // size]

    def _inputs(self, stem: str) -> range:
        return _times(self.heads, self.whole.head_dim) if stem == "attention.wo" else self.hidden

    def _outputs(self, stem: str) -> range | None:
        if stem == "attention.wq":
            return _times(self.heads, self.whole.head_dim)
        if stem in ("attention.wk", "attention.wv"):
            return _times(self.kv_heads, self.whole.head_dim)
        return self.hidden if stem in PRODUCTS["w13"] else None


def whole(config: ModelConfig) -> Shard:
    """Of a stage with one device."""
    return shards(config, 1)[0]


def shards(config: ModelConfig, count: int) -> list[Shard]:
    """What each of `count` devices holds. Raises `ValueError` if the model cannot be cut so."""
    if count > config.n_heads:
        raise ValueError(f"pipeline.tensor_parallel: {count} devices cannot share {config.n_heads} heads")
    hidden, words = _cut(config.hidden_dim, count, _hidden_unit(config, count)), _words(config, count)
    if any(len(part) == 0 for part in (*hidden, *words)):
        raise ValueError(
            f"pipeline.tensor_parallel: {config.hidden_dim} hidden units and {config.vocab_size} words cannot be cut "
            f"for {count} devices"
        )
    return [
        Shard(rank, count, config, heads, kv_heads, hidden[rank], words[rank])
        for rank, (heads, kv_heads) in enumerate(_heads(config, count))
    ]


def _heads(config: ModelConfig, count: int) -> list[tuple[range, range]]:
    """Query and KV heads of each device: whole groups; or, where there are fewer KV heads, a part of one group each."""
    kv, group = config.n_kv_heads, config.n_heads // config.n_kv_heads
    if count <= kv:
        parts = [range(i * kv // count, (i + 1) * kv // count) for i in range(count)]
        return [(_times(part, group), part) for part in parts]
    found: list[tuple[range, range]] = []
    for head in range(kv):
        sharing = sum(i * kv // count == head for i in range(count))
        if sharing > group:
            raise ValueError(
                f"pipeline.tensor_parallel: {sharing} devices cannot share the {group} heads of one group of keys"
            )
        for part in _cut(group, sharing, 1):
            found.append((range(head * group + part.start, head * group + part.stop), range(head, head + 1)))
    return found


def _words(config: ModelConfig, count: int) -> list[range]:
    return _cut(config.vocab_size, count, WORDS if config.vocab_size % WORDS == 0 else 1)


def _hidden_unit(config: ModelConfig, count: int) -> int:
    """Hidden units that stay together."""
    if config.int4 is not None and count > 1:
        return math.lcm(INT4_BLOCK, max(1, config.int4.group_size))
    return next((unit for unit in HIDDEN_UNITS if config.hidden_dim % (count * unit) == 0), 1)


def _fits_int4(config: ModelConfig, inputs: range, heads: int) -> bool:
    """Whether these inputs of wo begin and end where its stored groups do."""
    if config.int4 is None:
        return True
    unit, total = math.lcm(INT4_BLOCK, max(1, config.int4.group_size)), heads * config.head_dim
    return not config.int4.act_order and inputs.start % unit == 0 and (inputs.stop % unit == 0 or inputs.stop == total)


def _cut(total: int, count: int, unit: int) -> list[range]:
    """`total` in `count` parts as equal as can be, at multiples of `unit`."""
    units = -(-total // unit)
    bounds = [min(total, unit * (i * units // count)) for i in range(count)] + [total]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _times(part: range, size: int) -> range:
    return range(part.start * size, part.stop * size)


def _split(name: str) -> tuple[str, str, str]:
    """`layers.3`, `attention.wq` and `weight` of `layers.3.attention.wq.weight`."""
    layers, number, rest = name.split(".", 2)
    stem, _, kind = rest.rpartition(".")
    return f"{layers}.{number}", stem, kind
