"""How GPTQ and AWQ store linear layers in 4 bits, and how that becomes ours.

Both keep a layer [out, in] as `qweight`, `qzeros` and `scales`, with inputs along the first axis, eight numbers to an
int32. GPTQ packs neighbours along the inputs, lowest bits first, and may name the group of each input in `g_idx`. AWQ
packs along the outputs, in the order 0 2 4 6 1 3 5 7; its `qzeros` are packed likewise, GPTQ's without reordering. The
first version of GPTQ's format stores zeros less one in each four bits, as one subtraction from the whole word.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.config import Int4Layout, ModelConfig
from model.errors import CheckpointError

if TYPE_CHECKING:
    import torch

STORED_PARTS = {"zeros": "qzeros", "order": "g_idx"}  # the others are called as we call them
AWQ_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]  # which four bits of a word hold output 0, 1, ...
ONES = 0x11111111
SYMMETRIC_ZERO = 8
REMEDY = (
    "use a checkpoint quantised by GPTQ or AWQ in 4 bits, the one it was made from (model.quantization: fp8 "
    "quantises it at load), or a GGUF"
)
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {  # what must be so, if it is given, for weights to be as said above
    "gptq": {
        "bits": (4,),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "pack_dtype": ("int32",),
        "dynamic": ({},),
        "lm_head": (False,),
        "is_marlin_format": (False,),
    },
    "awq": {"bits": (4,), "w_bit": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,), "lm_head": (False,)},
}


@dataclass(frozen=True, slots=True)
class Int4Format:
    """What a checkpoint's configuration says of it."""

    file: Path  # the configuration
    method: Literal["gptq", "awq"]
    layout: Int4Layout
    symmetric: bool  # all zeros are 8
    less_one: bool  # zeros are stored less one

    def stored_shape(self, config: ModelConfig, stem: str, part: str) -> tuple[int, ...]:
        """Of one part of the weight `stem`, a name of ours."""
        out, inputs = config.tensor_shape(f"{stem}.weight")
        groups = self.layout.groups(inputs)
        if part == "qweight":
            return (inputs // 8, out) if self.method == "gptq" else (inputs, out // 8)
        return {"scales": (groups, out), "zeros": (groups, out // 8)}.get(part, (inputs,))

    def part(self, part: str, stored: "Callable[[str], torch.Tensor]", ordered: bool, where: str) -> "torch.Tensor":
        """Our `part` of a weight, [out, ...], from those that are `stored`, an order among them or not.

        Raises `CheckpointError` that begins with `where`.
        """
        if part == "scales":
            return stored("scales").t()
        if part == "zeros":
            return self._zeros(stored("zeros"), where)
        order = self._order(stored("order"), where) if self.method == "gptq" and ordered else None
        if part == "order":
            assert order is not None
            return order.int()
        return self._words(stored("qweight"), order)

    def _words(self, qweight: "torch.Tensor", order: "torch.Tensor | None") -> "torch.Tensor":
        """As those of an `Int4Weight`, the inputs in `order`."""
        from model.packing import nibbles, packed

        if self.method == "awq":
            return packed(self._outputs(qweight).t())
        q = nibbles(qweight).permute(1, 0, 2).flatten(1)
        return packed(q[:, order] if order is not None and self.layout.act_order else q)

    def _zeros(self, qzeros: "torch.Tensor", where: str) -> "torch.Tensor":
        """[out, G] int16."""
        zeros = self._outputs(qzeros + ONES if self.less_one else qzeros).t().short()
        if self.symmetric and bool((zeros != SYMMETRIC_ZERO).any()):
            raise CheckpointError(
                f"{where} has zeros that are not {SYMMETRIC_ZERO}, but {self.file} says sym = true: the tensor is "
                f"damaged, or checkpoint_format should be {'gptq_v2' if self.less_one else 'gptq'}"
            )
        return zeros

    def _order(self, g_idx: "torch.Tensor", where: str) -> "torch.Tensor":
        """The inputs group by group, [in]."""
        import torch

        inputs = torch.arange(len(g_idx))
        order = torch.argsort(g_idx, stable=True)
        if not torch.equal(g_idx[order].long(), inputs * self.layout.groups(len(inputs)) // len(inputs)):
            raise CheckpointError(f"{where}: g_idx does not make groups of {self.layout.group_size}: it is damaged")
        if not self.layout.act_order and not torch.equal(order, inputs):
            raise CheckpointError(f"{where}: g_idx has an order of its own: {self.file} should say desc_act = true")
        return order

    def _outputs(self, words: "torch.Tensor") -> "torch.Tensor":
        """[n, out / 8], packed along the outputs -> [n, out] uint8."""
        from model.packing import nibbles

        eights = nibbles(words)
        return (eights[..., AWQ_POSITIONS] if self.method == "awq" else eights).flatten(1)


def int4_format(file: Path, raw: Any) -> Int4Format:
    """Of the object that `file` has on how it is quantised. Raises `CheckpointError` for what cannot be served."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: quantization_config = {raw} is not an object")
    method = raw.get("quant_method", "awq" if "w_bit" in raw else "gptq")
    if method not in OPTIONS:
        raise CheckpointError(f"{file}: quant_method = {method} is not supported: {REMEDY}")
    given = {key: value for key, value in raw.items() if value not in (None, "")}
    if method == "gptq":
        given.setdefault("checkpoint_format", given.get("format", "gptq"))
    for key, allowed in OPTIONS[method].items():
        if key in given and given[key] not in allowed:
            raise CheckpointError(f"{file}: {method} with {key} = {given[key]} is not supported: {REMEDY}")
    size, act_order = given.get("group_size", given.get("q_group_size", 128)), given.get("desc_act", False)
    if type(size) is not int or type(act_order) is not bool or ("bits" not in given and "w_bit" not in given):
        raise CheckpointError(
            f"{file}: bits, group_size = {size} or desc_act = {act_order} is missing or of a wrong type"
        )
    gptq = method == "gptq"
    return Int4Format(
        file,
        method,
        Int4Layout(size, act_order and gptq),
        symmetric=gptq and given.get("sym") is True,
        less_one=gptq and given["checkpoint_format"] == "gptq",
    )
