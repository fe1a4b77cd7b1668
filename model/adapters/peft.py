"""What PEFT's `save_pretrained` writes: adapter_config.json beside safetensors or a .bin.

transformers keeps the rows of q_proj and k_proj by halves of the rotary pairs, we pair by pair: B's rows are permuted
like those of the weight that it is added to. What would change the answer and is not done here is refused by name.
"""

import math
import re
from typing import TYPE_CHECKING, Any

from model.adapters import AdapterError, AdapterFiles, Matrices, check_pair, read_object
from model.config import ModelConfig
from model.errors import CheckpointError
from model.weights import interleave_rotary
from model.weights.hf import ITEM_SIZES, LAYER_NAMES, TensorFile, opened_safetensors, opened_torch

if TYPE_CHECKING:
    import torch

# What says nothing of how it is computed, by the time that an adapter is saved.
HARMLESS = frozenset({
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
WHY = {
    "use_dora": "DoRA scales what it is added to by its own norm",
    "modules_to_save": "whole modules beside LoRA's matrices (often embed_tokens and lm_head) are another model",
    "bias": "biases that were trained with it change the base",
    "init_lora_weights": "the base that it was trained on is not the one that is served",
    "trainable_token_indices": "embeddings that were trained with it change the base",
}
MOST_PATTERNS, LONGEST_PATTERN = 512, 200
MODULES = {theirs: ours for ours, theirs in LAYER_NAMES.items() if not ours.endswith("norm")}
KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d{1,4})\.((?:self_attn|mlp)\.[a-z_]+)\.lora_(A|B)(?:\.default)?\.weight"
)


class PeftConfig:
    """The part of adapter_config.json that decides what is computed. Raises `AdapterError` for what is not done."""

    def __init__(self, files: AdapterFiles) -> None:
        assert files.config is not None
        self._file, raw = files.config, read_object(files.config)
        if raw.get("peft_type") != "LORA":
            self._refuse(f"peft_type is {raw.get('peft_type')!r}: only LORA is served")
        for key, value in raw.items():
            if key in PLAIN:
                if not any(value is plain or value == plain for plain in PLAIN[key]):
                    self._refuse(f"{key}: {value!r} is not supported: {WHY[key]}")
            elif value and key not in HARMLESS:
                self._refuse(f"{key} is not supported" + (f": {WHY[key]}" if key in WHY else ""))
        self._rank, self._alpha = self._number(raw, "r", 8), self._number(raw, "lora_alpha", 8)
        self._ranks, self._alphas = self._patterns(raw, "rank_pattern"), self._patterns(raw, "alpha_pattern")
        self._rslora = bool(raw.get("use_rslora"))

    def rank(self, module: str) -> float:
        """Of a module like model.layers.0.self_attn.q_proj."""
        return next((value for pattern, value in self._ranks if pattern.match(module)), self._rank)

    def scale(self, module: str) -> float:
        alpha = next((value for pattern, value in self._alphas if pattern.match(module)), self._alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self._rslora else rank)

    def _number(self, raw: dict[str, Any], key: str, default: float) -> float:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(f"{key} is {value!r}: not a number")
        if key in ("r", "rank_pattern") and value <= 0:
            self._refuse(f"{key} is {value!r}: a rank is at least 1")
        return float(value)

    def _patterns(self, raw: dict[str, Any], key: str) -> list[tuple[re.Pattern[str], float]]:
        """As PEFT reads them: the first that matches the end of a module's name counts."""
        found = raw.get(key) or {}
        if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
            self._refuse(f"{key} is no object of at most {MOST_PATTERNS} patterns")
        patterns = []
        for pattern in found:
            # Groups that are repeated may take for ever to be matched; no tool writes such.
            if len(pattern) > LONGEST_PATTERN or re.search(r"\)[*+?{]", pattern):
                self._refuse(f"{key}: the pattern {pattern[:60]!r} is too long, or repeats a group")
            try:
                patterns.append((re.compile(rf"(.*\.)?({pattern})$"), self._number(found, pattern, 0)))
            except re.error as error:
                self._refuse(f"{key}: the pattern {pattern[:60]!r} is not valid: {error}")
        return patterns

    def _refuse(self, why: str) -> None:
        raise AdapterError(f"adapter {self._file}: {why}")


class PeftAdapter:
    """See `Adapter`."""

    def __init__(self, files: AdapterFiles, base: ModelConfig) -> None:
        self._files, self._base, self._config = files, base, PeftConfig(files)
        self._safe = files.weights.suffix == ".safetensors"
        pairs: dict[str, dict[str, str]] = {}  # by our name: A's and B's stored names
        try:
            with self._opened() as stored:
                for key in stored.names():
                    name, which = self._ours(key)
                    if pairs.setdefault(name, {}).setdefault(which, key) != key:
                        raise AdapterError(f"adapter {files.weights}: {key} is there twice, under two names")
                self.ranks = {name: self._rank(name, keys, stored) for name, keys in pairs.items()}
        except CheckpointError as error:
            raise error if isinstance(error, AdapterError) else AdapterError(f"adapter {error}") from error
        self._pairs = pairs

    def _opened(self) -> Any:
        return (opened_safetensors if self._safe else opened_torch)(self._files.weights)

    def _ours(self, key: str) -> tuple[str, str]:
        """Our name of what a stored tensor belongs to, and A or B."""
        match = KEY.fullmatch(key)
        if match is not None and match[2] in MODULES:
            return f"layers.{int(match[1])}.{MODULES[match[2]]}", match[3]
        what = (
            "embeddings and the head" if "embed" in key or "lm_head" in key
            else "DoRA" if "magnitude" in key
            else "a bias" if "bias" in key
            else "what is not one of the seven products of a Llama layer"
        )  # fmt: skip
        raise AdapterError(f"adapter {self._files.weights}: changes {what} ({key[:120]}): this is not supported")

    def _rank(self, name: str, keys: dict[str, str], stored: TensorFile) -> int:
        file, module = self._files.weights, _module(name)
        if len(keys) < 2:
            raise AdapterError(f"adapter {file}: {module} has only one of its two matrices: it is damaged")
        for key in keys.values():
            if stored.item_size(key) not in ITEM_SIZES.values() or stored.stored_type(key) in ("I32", "I16", "int32"):
                raise AdapterError(f"adapter {file}: {key} is stored as {stored.stored_type(key)}: not supported")
        rank = check_pair(file, name, module, stored.shape(keys["A"]), stored.shape(keys["B"]), self._base)
        if rank != self._config.rank(module):
            raise AdapterError(
                f"adapter {file}: {module} has rank {rank}, the configuration says {self._config.rank(module):g}"
            )
        return rank

    def matrices(self, name: str) -> Matrices:
        keys = self._pairs[name]
        with self._opened() as stored:
            a, b = (stored.get(keys[which]).float() for which in "AB")
        b = b * self._config.scale(_module(name))
        return Matrices(a, permuted(name, b, self._base))


def permuted(name: str, b: "torch.Tensor", base: ModelConfig) -> "torch.Tensor":
    """B [out, r] with its rows as ours are."""
    return interleave_rotary(b, base.head_dim) if name.endswith(("wq", "wk")) else b


def _module(name: str) -> str:
    """transformers' name of a product."""
    _, layer, stem = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[stem]}"
