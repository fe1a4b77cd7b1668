"""The Llama decoder, built per stage: only layers [start, stop), the embedding on the first, the head on the last.

Legend: T tokens, C model dim, H query heads, K KV heads, D head dim, F feed-forward dim, V vocabulary.
Names are those of Meta's checkpoints: wq wk wv wo, w1 (gate) w2 (down) w3 (up).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import torch
from torch.nn.functional import embedding

from model.attention import AttentionMetadata, paged_attention
from model.config import PRODUCTS, ModelConfig, StageLayers
from model.kernels import Kernels, kernels_for
from model.kv_cache import KVCache
from model.layers import Int4Linear, Linear, compute_dtype, make_linear, rotary_table

Tensors = Iterator[tuple[str, torch.Tensor]]
Take = Callable[[str], torch.Tensor]  # the tensor of this name, which must be the next one


class Layer:
    """One decoder layer: attention and feed-forward, each behind a norm and added to the residual.

    `fp8`: which of its products are in 8 bits.
    """

    def __init__(
        self, config: ModelConfig, take: Take, dtype: torch.dtype, device: torch.device, fp8: Collection[str]
    ) -> None:
        self.config = config
        compute = compute_dtype(dtype, device)

        def load(product: str, bias: bool) -> Linear:
            stems = PRODUCTS[product]

            def stacked(part: str, as_type: torch.dtype | None = None) -> torch.Tensor:
                return _stacked([f"{stem}.{part}" for stem in stems], config, take, as_type, device)

            weights = [stacked(part, dtype if part == "weight" else None) for part in config.weight_parts]
            biases = stacked("bias", compute) if bias else None
            if config.int4 is None:
                return make_linear(weights[0], dtype, device, product in fp8, biases)
            shapes = [config.tensor_shape(f"layers.0.{stem}.weight") for stem in stems]
            words, scales, zeros, *rest = weights
            orders = rest[0].view(len(stems), -1) if rest else None
            return Int4Linear(words, scales, zeros, [rows for rows, _ in shapes], shapes[0][1], compute, orders, biases)

        self.attention_norm = take("attention_norm.weight").to(device, compute, copy=True)
        self.wqkv = load("wqkv", bias=config.attention_bias)
        self.wo = load("wo", bias=config.attention_bias)
        self.ffn_norm = take("ffn_norm.weight").to(device, compute, copy=True)
        self.w13 = load("w13", bias=config.mlp_bias)
        self.w2 = load("w2", bias=config.mlp_bias)

    @property
    def num_parameters(self) -> int:
        linears: tuple[Linear, ...] = (self.wqkv, self.wo, self.w13, self.w2)
        return sum(x.num_parameters for x in linears) + self.attention_norm.numel() + self.ffn_norm.numel()

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        kernels: Kernels,
        rotary: torch.Tensor,
        kv: KVCache,
        index: int,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, C] and the residual it is to be added to -> the same of this layer.

        Keys and values go to layer `index` of `kv`.
        """
        c, k_cache, v_cache = self.config, kv.k[index], kv.v[index]
        qkv, residual = self.wqkv.after_norm(kernels, x, residual, self.attention_norm, c.norm_eps)
        q = kernels.rotate_and_write(
            qkv, c.n_heads, rotary, metadata.positions, k_cache, v_cache, metadata.slot_mapping
        )
        attended = paged_attention(q, k_cache, v_cache, metadata, kernels)  # [T, H, D]
        attended = self.wo(attended.flatten(1))
        gate_up, residual = self.w13.after_norm(kernels, attended, residual, self.ffn_norm, c.norm_eps)
        return self.w2.after_gate(kernels, gate_up), residual


class Decoder:
    """One stage's share of the model. `tensors` yields its weights in the order of `stage.tensor_names`.

    `fp8`: names of the layers' products that are in 8 bits, see `float8_products`; the others are as `dtype` says.
    Holds what it has built and one tensor at a time. Raises `ValueError` for a tensor of the wrong shape, and for `fp8`
    of layers in 4 bits.
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
        if fp8 and config.int4 is not None:
            raise ValueError("model.quantization: fp8: the checkpoint's layers are in 4 bits already; leave it out")
        self.config, self.stage, self.dtype, self.device = config, stage, compute_dtype(dtype, device), device
        self.kernels = kernels_for(device)
        self.rotary = rotary_table(max_model_len, config, device)

        def take(name: str) -> torch.Tensor:
            found, tensor = next(tensors)
            assert found == name, f"{found} came where {name} was due"
            if tuple(tensor.shape) != config.tensor_shape(name):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model needs {config.tensor_shape(name)}")
            on_tensor(name)
            return tensor

        if stage.is_first:
            self.tok_embeddings = take("tok_embeddings.weight").to(device, self.dtype, copy=True)
        self.layers = [
            Layer(
                config,
                lambda name, i=i: take(f"layers.{i}.{name}"),  # type: ignore[misc]
                dtype,
                device,
                [product for product in PRODUCTS if f"layers.{i}.{product}" in fp8],
            )
            for i in range(stage.start, stage.stop)
        ]
        if stage.is_last:
            self.norm = take("norm.weight").to(device, self.dtype, copy=True)
            self.output = make_linear(self._head(take), dtype, device)

    def _head(self, take: Take) -> torch.Tensor:
        if not self.config.tie_word_embeddings:
            return take("output.weight").to(self.device, copy=True)
        tied = self.tok_embeddings if self.stage.is_first else take("tok_embeddings.weight")
        return tied.to(self.device, copy=not self.stage.is_first)

    @property
    def num_parameters(self) -> int:
        """Weights held, a tied head counted once."""
        count = sum(layer.num_parameters for layer in self.layers)
        count += self.tok_embeddings.numel() if self.stage.is_first else 0
        if self.stage.is_last:
            shared = self.config.tie_word_embeddings and self.stage.is_first
            count += self.norm.numel() + (0 if shared else self.output.num_parameters)
        return count

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, C]; first stage only."""
        return embedding(token_ids, self.tok_embeddings)

    def forward(self, x: torch.Tensor, kv: KVCache, metadata: AttentionMetadata) -> torch.Tensor:
        """x [T, C] through this stage's layers -> [T, C]."""
        residual = None
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, self.kernels, self.rotary, kv, index, metadata)
        assert residual is not None
        return residual + x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, C] -> [rows, V] float32; last stage only."""
        logits, _ = self.output.after_norm(self.kernels, x, None, self.norm, self.config.norm_eps)
        return logits.float()


def _stacked(
    names: Sequence[str], config: ModelConfig, take: Take, dtype: torch.dtype | None, device: torch.device
) -> torch.Tensor:
    """Tensors [rows, ...] of several names, rows one below another; each is let go of before the next is taken.

    `dtype` None: that of the first.
    """
    first = take(names[0])
    dtype = dtype or first.dtype
    if len(names) == 1:
        return first.to(device, dtype, copy=True)
    rows = [config.tensor_shape(f"layers.0.{name}")[0] for name in names]
    whole = torch.empty(sum(rows), *first.shape[1:], dtype=dtype, device=device)
    whole[: rows[0]] = first
    del first
    for name, start, count in zip(names[1:], accumulate(rows), rows[1:], strict=False):
        whole[start : start + count] = take(name)
    return whole
