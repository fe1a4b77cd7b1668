"""How a checkpoint's makers want answers to be drawn: generation_config.json, as far as sampling goes."""

from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.sampling_params import SamplingParams
from model.weights.hf import read_json

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling_defaults(path: Path) -> dict[str, Any]:
    """What the file beside the weights says of these fields; {} if there is none.

    `do_sample` is not looked at: a request that names no temperature wants an answer that is drawn, as vLLM has it.
    Raises `CheckpointError` for values that cannot be.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    content = read_json(file)
    found = {name: content[name] for name in FIELDS if content.get(name) is not None}
    try:
        SamplingParams(max_tokens=1, seed=0, **found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return found
