"""Files that `torch.save` wrote, read lazily: mapped into memory, and never able to run code."""

from pathlib import Path

import torch

from model.errors import CheckpointError

ITEM_SIZES = {torch.float64: 8, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}  # bytes


def open_torch_file(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name; what they hold is read from the file when it is looked at.

    Raises `CheckpointError` if the file is damaged, is of the format before torch 1.6, or holds anything but tensors:
    a pickle can name code to run, and `weights_only` refuses it unread.
    """
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises what the damage happens to cause
        reason = str(error).split("\n")[0][:200]
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{file} holds more than tensors, perhaps code, and is not opened ({reason}): get the checkpoint "
                "from whom you trust, as safetensors if you can"
            ) from error
        raise CheckpointError(f"{file} cannot be read ({reason}): it is damaged, truncated or too old") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} does not hold tensors by name: it is no checkpoint")
    return content


def item_size(file: Path, name: str, tensor: torch.Tensor) -> int:
    """Bytes per element. Raises `CheckpointError` for types that are not weights."""
    if tensor.dtype not in ITEM_SIZES:
        raise CheckpointError(f"{file}: tensor {name} is stored as {tensor.dtype}: not supported")
    return ITEM_SIZES[tensor.dtype]
