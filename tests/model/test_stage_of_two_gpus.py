"""A stage of several GPUs: its tokens are those of a CPU, captured or not; if one GPU is lost it says so."""

import pytest
import torch

from model.config import ModelConfig, float8_products, split_layers
from model.group import DecoderGroup
from model.llama import Decoder
from model.stage import Stage
from model.weights.dummy import DummyCheckpoint
from tests.model.test_stage_cuda import BLOCK, HEADS, PROMPTS, SLOTS, generate, make, shape

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def made(
    config: ModelConfig, dtype: torch.dtype, captured: bool, count: int = 2, fp8: frozenset[str] = frozenset()
) -> Stage:
    (part,) = split_layers(config, 1)
    devices = [torch.device("cuda", i) for i in range(count)]
    tensors = DummyCheckpoint(config).tensors(part.tensor_names(config))
    group = DecoderGroup(Decoder.sharded(config, part, tensors, dtype, devices, 512, fp8=fp8))
    group.connect(512, 60.0)
    stage = Stage(group, 64, BLOCK, SLOTS)
    stage.capture(512, lambda done, total: None)
    if not captured:
        stage._graphs = None
    return stage


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_tokens_in_float32_equal_the_cpus(heads: tuple[int, int, int], captured: bool) -> None:
    config = shape(*heads)
    expected = generate(make(config, "cpu", torch.float32), PROMPTS, 20)
    stage = made(config, torch.float32, captured)
    assert generate(stage, PROMPTS, 20) == expected
    assert generate(stage, PROMPTS, 20) == expected  # what the first run has left does no harm
    stage.group.check()


@pytest.mark.parametrize("fp8", [False, True])
def test_bfloat16_is_as_near_the_reference_as_on_one_gpu(fp8: bool) -> None:
    config = shape(16, 2, 128)
    products = float8_products(config) if fp8 else frozenset()
    expected = logits(make(config, "cpu", torch.float32, fp8=products))
    one = logits(make(config, "cuda", torch.bfloat16, fp8=products))
    two = logits(made(config, torch.bfloat16, False, fp8=products))
    assert float((two - expected).norm()) < 1.25 * float((one - expected).norm())


def logits(stage: Stage) -> torch.Tensor:
    """After all prompts."""
    seen: list[torch.Tensor] = []
    inner = stage.group.logits
    stage.group.logits = lambda x: seen.append(inner(x)) or seen[-1]  # type: ignore
    generate(stage, PROMPTS, 0)
    return seen[0].double().cpu()


def test_a_gpu_that_does_not_answer_is_named() -> None:
    stage = made(shape(8, 8, 64), torch.bfloat16, True)
    stage._followers.clear()  # it is launched no more
    stage.group._be_patient(100_000)
    generate(stage, PROMPTS[:1], 0)
    with pytest.raises(RuntimeError, match="GPU 0 of this stage has waited in vain"):
        stage.group.check()
