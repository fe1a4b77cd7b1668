"""A GGUF adapter, as llama.cpp's convert_lora_to_gguf.py writes it: rows are in our order already.

Its scale is alpha / rank, or 1 where alpha is 0, as llama.cpp has it.
"""

import math
import re
from pathlib import Path

import numpy as np
from gguf.quants import dequantize

from model.adapters import AdapterError, Matrices, check_pair
from model.config import ModelConfig
from model.weights.gguf import LAYER_NAMES, FastReader

MODULES = {theirs: ours for ours, theirs in LAYER_NAMES.items() if not ours.endswith("norm")}
SAID = ("general.type", "adapter.type", "general.architecture", "adapter.lora.alpha")
KEY = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.weight\.lora_(a|b)")


class GGUFAdapter:
    """See `Adapter`."""

    def __init__(self, file: Path, base: ModelConfig) -> None:
        self._file = file
        try:
            reader = FastReader(file)
            said = {key: reader.fields[key].contents() for key in SAID if key in reader.fields}
        except Exception as error:  # the package raises whatever the damage happens to cause
            raise AdapterError(
                f"adapter {file} cannot be read as GGUF ({error}): it is damaged or truncated"
            ) from error
        kind, alpha = [said.get(key) for key in SAID[:3]], said.get(SAID[3], 0.0)
        if kind != ["adapter", "lora", "llama"]:
            raise AdapterError(f"adapter {file}: is {kind[0]} {kind[1]} of {kind[2]}, not a LoRA adapter of a llama")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"adapter {file}: adapter.lora.alpha is {alpha!r}: not a number")
        self._alpha = float(alpha)
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        pairs: dict[str, set[str]] = {}
        for key in self._stored:
            match = KEY.fullmatch(key)
            if match is None or match[2] not in MODULES:
                raise AdapterError(f"adapter {file}: changes {key[:120]}, not one of the seven products of a layer")
            pairs.setdefault(f"layers.{int(match[1])}.{MODULES[match[2]]}", set()).add(match[3])
        self.ranks = {}
        for name, found in pairs.items():
            if len(found) < 2:
                raise AdapterError(f"adapter {file}: {name} has only one of its two matrices: it is damaged")
            a, b = (tuple(int(n) for n in reversed(self._stored[_key(name, which)].shape)) for which in "ab")
            self.ranks[name] = check_pair(file, name, name, a, b, base)

    def matrices(self, name: str) -> Matrices:
        import torch

        try:
            a, b = (
                torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), np.float32))
                for stored in (self._stored[_key(name, which)] for which in "ab")
            )
        except NotImplementedError as error:
            raise AdapterError(f"adapter {self._file}: {name} is quantised in a way that cannot be read") from error
        return Matrices(a, b * (self._alpha / len(a) if self._alpha else 1.0))


def _key(name: str, which: str) -> str:
    _, layer, stem = name.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[stem]}.weight.lora_{which}"
