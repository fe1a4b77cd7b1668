"""The Llama decoder, built per stage: only layers [start, stop), the embedding on the first, the head on the last.

Legend: T tokens, C model dim, H query heads, K KV heads, D head dim, F feed-forward dim, V vocabulary.
Names are those of Meta's checkpoints: wq wk wv wo, w1 (gate) w2 (down) w3 (up).
"""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Self, TypeVar

import torch
from torch.nn.functional import embedding

from model.attention import AttentionMetadata, paged_attention
from model.config import PRODUCTS, ModelConfig, StageLayers
from model.kernels import Kernels, kernels_for
from model.kv_cache import KVCache
from model.layers import Int4Linear, Linear, PaddedLinear, compute_dtype, make_linear, rotary_table
from model.shards import Shard, shards, whole

Result = TypeVar("Result")
# What one of a stage's devices computes. It yields its share of a sum over the devices, [T, C], and is sent what its
# kernels take for the sum: the sum itself, or the share, where they add up by themselves what lies on all devices.
Shares = Generator[torch.Tensor, torch.Tensor, Result]
Tensors = Iterator[tuple[str, torch.Tensor]]
Take = Callable[[str], torch.Tensor | None]  # this device's part of the tensor of this name, if it has one


class Source:
    """The tensors of a stage, read once, for all of its devices.

    Raises `ValueError` for a tensor of the wrong shape. Holds those that some device has not taken yet.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors, on_tensor: Callable[[str], None], devices: int) -> None:
        self._config, self._tensors, self._on_tensor, self._devices = config, tensors, on_tensor, devices
        self._held: dict[str, tuple[torch.Tensor, int]] = {}  # with the number of devices that have taken it

    def take(self, shard: Shard, name: str) -> torch.Tensor | None:
        """A device's part, if it has one."""
        tensor = self._look(name)
        _, taken = self._held.pop(name)
        if taken + 1 < self._devices:
            self._held[name] = tensor, taken + 1
        return shard.part(name, tensor, self._look)

    def _look(self, name: str) -> torch.Tensor:
        while name not in self._held:
            found, tensor = next(self._tensors)
            needed = self._config.tensor_shape(found)
            if tuple(tensor.shape) != needed:
                raise ValueError(f"{found} has shape {tuple(tensor.shape)}, the model needs {needed}")
            self._held[found] = tensor, 0
            self._on_tensor(found)
        return self._held[name][0]


class Layer:
    """One device's share of a decoder layer: attention and feed-forward, each behind a norm and added to the residual.

    `fp8`: which of its products are in 8 bits.
    """

    def __init__(
        self, shard: Shard, take: Take, dtype: torch.dtype, device: torch.device, fp8: Collection[str]
    ) -> None:
        self.config = shard.config
        compute = compute_dtype(dtype, device)

        def load(product: str, bias: bool) -> Linear:
            def stacked(part: str, as_type: torch.dtype | None = None) -> torch.Tensor | None:
                return _stacked([f"{stem}.{part}" for stem in PRODUCTS[product]], shard, take, as_type, device)

            weights = [stacked(part, dtype if part == "weight" else None) for part in shard.whole.weight_parts]
            biases = stacked("bias", compute) if bias else None
            if shard.whole.int4 is not None:
                return _int4_linear(shard, product, weights, biases, compute)
            return make_linear(_there(weights[0]), dtype, device, product in fp8, biases)

        def norm(name: str) -> torch.Tensor:
            return _there(take(name)).to(device, compute, copy=True)

        self.attention_norm = norm("attention_norm.weight")
        self.wqkv = load("wqkv", bias=shard.whole.attention_bias)
        self.wo = load("wo", bias=shard.whole.attention_bias)
        self.ffn_norm = norm("ffn_norm.weight")
        self.w13 = load("w13", bias=shard.whole.mlp_bias)
        self.w2 = load("w2", bias=shard.whole.mlp_bias)

    @property
    def num_parameters(self) -> int:
        linears: tuple[Linear, ...] = (self.wqkv, self.wo, self.w13, self.w2)
        return sum(x.num_parameters for x in linears) + self.attention_norm.numel() + self.ffn_norm.numel()

    def steps(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        kernels: Kernels,
        rotary: torch.Tensor,
        kv: KVCache,
        index: int,
        metadata: AttentionMetadata,
    ) -> Shares[tuple[torch.Tensor, torch.Tensor]]:
        """A share of x [T, C], and the residual it is to be added to -> the same of this layer.

        Keys and values go to layer `index` of `kv`.
        """
        c, k_cache, v_cache = self.config, kv.k[index], kv.v[index]
        wqkv, wo, w13, w2 = self._products(index, metadata)
        x = yield x
        qkv, residual = wqkv.after_norm(kernels, x, residual, self.attention_norm, c.norm_eps)
        tokens = metadata.tokens
        q = kernels.rotate_and_write(qkv, c.n_heads, rotary, tokens.positions, k_cache, v_cache, tokens.cells)
        attended = paged_attention(q, k_cache, v_cache, metadata, kernels)  # [T, H, D]
        attended = yield wo(attended.flatten(1))
        gate_up, residual = w13.after_norm(kernels, attended, residual, self.ffn_norm, c.norm_eps)
        return w2.after_gate(kernels, gate_up), residual

    def _products(self, index: int, metadata: AttentionMetadata) -> list[Linear]:
        """In the order of `PRODUCTS`, with what the step's adapters add to them if it has any."""
        plain, adapters = (self.wqkv, self.wo, self.w13, self.w2), metadata.adapters
        if adapters is None:
            return list(plain)
        return [adapters.on(linear, index, product) for linear, product in zip(plain, PRODUCTS, strict=True)]


class Decoder:
    """One stage's share of the model, or one of its devices' share of that.

    `tensors` yields its weights in the order of `stage.tensor_names`. `fp8`: names of the layers' products that are in
    8 bits, see `float8_products`; the others are as `dtype` says. Holds what it has built and one tensor at a time.
    Raises `ValueError` for a tensor of the wrong shape, and for `fp8` of layers in 4 bits.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: StageLayers,
        tensors: Tensors,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        on_tensor: Callable[[str], None] = lambda name: None,
        fp8: frozenset[str] = frozenset(),
    ) -> None:
        self._begin(whole(config), stage, dtype, device, max_model_len)
        for _ in self._take(Source(config, tensors, on_tensor, 1), dtype, fp8):
            pass

    @classmethod
    def sharded(
        cls,
        config: ModelConfig,
        stage: StageLayers,
        tensors: Tensors,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        max_model_len: int,
        on_tensor: Callable[[str], None] = lambda name: None,
        fp8: frozenset[str] = frozenset(),
    ) -> list[Self]:
        """One for each of `devices`, see `Shard`; holds the tensors of one layer at a time."""
        source = Source(config, tensors, on_tensor, len(devices))
        made = [cls.__new__(cls) for _ in devices]
        for decoder, shard, device in zip(made, shards(config, len(devices)), devices, strict=True):
            decoder._begin(shard, stage, dtype, device, max_model_len)
        for _ in zip(*(decoder._take(source, dtype, fp8) for decoder in made), strict=True):
            pass
        return made

    def _begin(
        self, shard: Shard, stage: StageLayers, dtype: torch.dtype, device: torch.device, max_model_len: int
    ) -> None:
        self.shard, self.config, self.stage = shard, shard.config, stage
        self.dtype, self.device = compute_dtype(dtype, device), device
        self.kernels = kernels_for(device)
        self.sums = self.kernels  # for shares; on several GPUs those that add up what lies on all of them
        self.rotary = rotary_table(max_model_len, shard.whole, device)
        self.layers: list[Layer] = []

    def _take(self, source: Source, dtype: torch.dtype, fp8: frozenset[str]) -> Iterator[None]:
        """Build one part after another."""
        if fp8 and self.shard.whole.int4 is not None:
            raise ValueError("model.quantization: fp8: the checkpoint's layers are in 4 bits already; leave it out")
        tied = self._take_embedding(source) if self.stage.is_first else None
        yield
        for i in range(self.stage.start, self.stage.stop):
            in_8_bits = [product for product in PRODUCTS if f"layers.{i}.{product}" in fp8]
            take = partial(_take_of_layer, source, self.shard, i)
            self.layers.append(Layer(self.shard, take, dtype, self.device, in_8_bits))
            yield
        if self.stage.is_last:
            self.norm = _there(source.take(self.shard, "norm.weight")).to(self.device, self.dtype, copy=True)
            self.output = make_linear(self._head(source, tied), dtype, self.device)
            yield

    def _take_embedding(self, source: Source) -> torch.Tensor | None:
        """Keep it where it is looked up; returns a tied head's part of it."""
        table = _there(source.take(self.shard, "tok_embeddings.weight"))
        if self.shard.leads:
            table = self.tok_embeddings = table.to(self.device, self.dtype, copy=True)
        if not (self.stage.is_last and self.shard.whole.tie_word_embeddings):
            return None
        return self._words_of(table).to(self.device, copy=not self.shard.leads)

    def _head(self, source: Source, tied: torch.Tensor | None) -> torch.Tensor:
        if tied is not None:
            return tied
        is_tied = self.shard.whole.tie_word_embeddings
        table = source.take(self.shard, "tok_embeddings.weight" if is_tied else "output.weight")
        return self._words_of(_there(table)).to(self.device, copy=True)

    def _words_of(self, table: torch.Tensor) -> torch.Tensor:
        return table[self.shard.words.start : self.shard.words.stop]

    @property
    def num_parameters(self) -> int:
        """Weights held, a tied head counted once."""
        count = sum(layer.num_parameters for layer in self.layers)
        count += self.tok_embeddings.numel() if self.stage.is_first and self.shard.leads else 0
        if self.stage.is_last:
            shared = self.config.tie_word_embeddings and self.stage.is_first and self.shard.leads
            count += self.norm.numel() + (0 if shared else self.output.num_parameters)
        return count

    @property
    def embeds(self) -> bool:
        """Whether token ids are what it begins with."""
        return self.stage.is_first and self.shard.leads

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, C]; first device of the first stage only."""
        return embedding(token_ids, self.tok_embeddings)

    def steps(
        self, x: torch.Tensor, kv: KVCache, metadata: AttentionMetadata, kernels: Kernels
    ) -> Shares[torch.Tensor]:
        """A share of x [T, C] through this stage's layers -> [T, C], the whole of it."""
        residual = None
        for index, layer in enumerate(self.layers):
            x, residual = yield from layer.steps(x, residual, kernels, self.rotary, kv, index, metadata)
        assert residual is not None
        x = yield x
        return kernels.add(x, residual)

    def forward(self, x: torch.Tensor, kv: KVCache, metadata: AttentionMetadata) -> torch.Tensor:
        """`steps` at once, where nothing is left to be done between them: on one device, or by kernels that add up."""
        steps = self.steps(x, kv, metadata, self.sums)
        share = next(steps)
        try:
            while True:
                share = steps.send(share)
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, C] -> [rows, words of this device] float32; last stage only."""
        logits, _ = self.output.after_norm(self.kernels, x, None, self.norm, self.config.norm_eps)
        return logits.float()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, C] -> [rows, V] float32; what a device that does not lead returns is of no use."""
        return self.sums.gather(self.head(x))


def _take_of_layer(source: Source, shard: Shard, layer: int, name: str) -> torch.Tensor | None:
    return source.take(shard, f"layers.{layer}.{name}")


def _int4_linear(
    shard: Shard, product: str, weights: list[torch.Tensor | None], bias: torch.Tensor | None, compute: torch.dtype
) -> Linear:
    """`weights`: words, scales, zeros, and where inputs have an order of their own, that."""
    stems = PRODUCTS[product]
    words, scales, zeros = map(_there, weights[:3])
    order = weights[3] if len(weights) > 3 else None
    orders = order.view(len(stems), -1) if order is not None else None
    rows, inputs = [shard.rows(stem) for stem in stems], shard.inputs(stems[0])
    made = Int4Linear(words, scales, zeros, rows, inputs, compute, orders, bias)
    if product == "wo" and shard.keeps_wo_whole:
        return PaddedLinear(made, shard.heads.start * shard.whole.head_dim, inputs)
    return made


def _stacked(
    names: Sequence[str], shard: Shard, take: Take, dtype: torch.dtype | None, device: torch.device
) -> torch.Tensor | None:
    """Tensors [rows, ...] of several names, rows one below another; each is let go of before the next is taken.

    `dtype` None: that of the first. None if they have no part here.
    """
    first = take(names[0])
    if first is None or len(names) == 1:
        return first.to(device, dtype or first.dtype, copy=True).contiguous() if first is not None else None
    rows = [len(first)] + [_rows(shard, name) for name in names[1:]]
    whole = torch.empty(sum(rows), *first.shape[1:], dtype=dtype or first.dtype, device=device)
    whole[: rows[0]] = first
    del first
    for name, start, count in zip(names[1:], accumulate(rows), rows[1:], strict=False):
        whole[start : start + count].copy_(_there(take(name)))
    return whole


def _there(part: torch.Tensor | None) -> torch.Tensor:
    assert part is not None, "every device has a part of this one"
    return part


def _rows(shard: Shard, name: str) -> int:
    """Of the tensor `name` of a layer, as this device has it."""
    stem, _, part = name.rpartition(".")
    return shard.whole.tensor_shape(f"layers.0.{name}")[0] if part == "order" else shard.rows(stem)
