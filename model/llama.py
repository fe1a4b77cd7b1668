"""The Llama decoder, built per stage: only layers [start, stop), the embedding on the first, the head on the last.

Legend: T tokens, C model dim, H query heads, K KV heads, D head dim, F feed-forward dim, V vocabulary.
Names are those of Meta's checkpoints: wq wk wv wo, w1 (gate) w2 (down) w3 (up).
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import embedding

from model.attention import AttentionMetadata, paged_attention
from model.config import LAYER_TENSORS, ModelConfig, StageLayers
from model.kernels import Kernels, kernels_for
from model.kv_cache import KVCache
from model.layers import Linear, compute_dtype, make_linear, rotary_table

Tensors = Iterator[tuple[str, torch.Tensor]]


class Layer:
    """One decoder layer: attention and feed-forward, each behind a norm and added to the residual."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device, fp8: bool
    ) -> None:
        self.config = config
        self._fp8 = fp8
        _check_shapes(config, weights)
        compute = compute_dtype(dtype, device)
        self.attention_norm = weights["attention_norm"].to(device, compute)
        self.ffn_norm = weights["ffn_norm"].to(device, compute)
        # Products that read the same input are one product: fewer, larger reads of the weights.
        qkv = torch.cat([weights.pop(f"attention.w{x}") for x in "qkv"])
        self.wqkv = make_linear(qkv, dtype, device, fp8)
        self.wo = make_linear(weights.pop("attention.wo"), dtype, device, fp8)
        self.w13 = make_linear(torch.cat([weights.pop(f"feed_forward.w{x}") for x in "13"]), dtype, device, fp8)
        self.w2 = make_linear(weights.pop("feed_forward.w2"), dtype, device, fp8)

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
        normed, residual = kernels.add_rms_norm(x, residual, self.attention_norm, c.norm_eps, self._fp8)
        qkv = self.wqkv(normed)
        q = kernels.rotate_and_write(
            qkv, c.n_heads, rotary, metadata.positions, k_cache, v_cache, metadata.slot_mapping
        )
        attended = paged_attention(q, k_cache, v_cache, metadata, kernels)  # [T, H, D]
        attended = self.wo(attended.flatten(1))
        normed, residual = kernels.add_rms_norm(attended, residual, self.ffn_norm, c.norm_eps, self._fp8)
        return self.w2(kernels.silu_and_mul(self.w13(normed), self._fp8)), residual


class Decoder:
    """One stage's share of the model. `tensors` yields its weights by name, in any order within a layer."""

    def __init__(
        self,
        config: ModelConfig,
        stage: StageLayers,
        tensors: Tensors,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        on_tensor: Callable[[], None] = lambda: None,
        fp8: bool = False,
    ) -> None:
        self.config, self.stage, self.dtype, self.device = config, stage, compute_dtype(dtype, device), device
        self.kernels = kernels_for(device)
        self.rotary = rotary_table(max_model_len, config.head_dim, config.rope_theta, device)
        self.layers: list[Layer] = []
        parts: dict[str, torch.Tensor] = {}
        outer: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            on_tensor()
            if not name.startswith("layers."):
                outer[name] = tensor
                continue
            parts[name.split(".", 2)[2].removesuffix(".weight")] = tensor
            if len(parts) == len(LAYER_TENSORS):
                self.layers.append(Layer(config, parts, dtype, device, fp8))
                parts = {}
        assert not parts, "a layer is incomplete"
        assert len(self.layers) == stage.stop - stage.start
        self._build_ends(outer, dtype)

    def _build_ends(self, outer: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        if self.stage.is_first:
            self.tok_embeddings = outer["tok_embeddings.weight"].to(self.device, self.dtype)
        if self.stage.is_last:
            self.norm = outer["norm.weight"].to(self.device, self.dtype)
            name = "tok_embeddings.weight" if self.config.tie_word_embeddings else "output.weight"
            self.output = make_linear(outer[name], dtype, self.device)

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
        normed, _ = self.kernels.add_rms_norm(x, None, self.norm, self.config.norm_eps)
        return self.output(normed).float()


def _check_shapes(config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    c, f = config.dim, config.hidden_dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    expected = {
        "attention_norm": (c,),
        "attention.wq": (q, c),
        "attention.wk": (kv, c),
        "attention.wv": (kv, c),
        "attention.wo": (c, q),
        "ffn_norm": (c,),
        "feed_forward.w1": (f, c),
        "feed_forward.w2": (c, f),
        "feed_forward.w3": (f, c),
    }
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"weight {name} has shape {tuple(weights[name].shape)}, the model's config needs {shape}")
