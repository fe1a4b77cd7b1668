"""Adapters on disk that tests share: written by peft itself, and by a re-statement of llama.cpp's converter."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.model.test_weights import GGUF_NAMES, HF_NAMES, meta_rows

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, out: Path, seed: int, **config: Any) -> None:
    """A random adapter of the model at `base`, none of whose matrices is zero, as peft saves it."""
    torch.manual_seed(seed)
    llama = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ALL, **config})
    adapted = get_peft_model(llama, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(out)


def write_gguf_adapter(adapter: Path, file: Path, alpha: float, head_dim: int) -> None:
    """As convert_lora_to_gguf.py writes a PEFT adapter."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    ours = {theirs: name for name, theirs in HF_NAMES.items()}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        _, _, _, _, layer, *module, which, _ = key.split(".")
        stem = ours[".".join(module)]
        rotary = which == "lora_B" and stem in ("attention.wq", "attention.wk")
        rows = meta_rows(tensor, head_dim) if rotary else tensor
        stored = f"blk.{layer}.{GGUF_NAMES[stem]}.weight.{which.lower()}"
        writer.add_tensor(stored, np.ascontiguousarray(rows.numpy(), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
