"""Clients whose default way is tools or the Responses API, as they come, in processes of their own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from tests import golden
from tests.deployments.gateway.test_gateway import Recorded
from tests.deployments.local_engine import default_model, running
from tests.deployments.served import served

ROOT = Path(__file__).parents[2]
AGENTS = Path(sys.prefix) / "agents"
NAME = "smollm2-135m-instruct"
ARGS: dict[str, Any] = {
    "model": {"path": golden.MODEL, "name": NAME, "max_model_len": 2048},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.5},
    "gateway": {"constraint_timeout_s": 60},
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(default_model(2048, num_blocks=3000)) as engine:
        app = create_gateway(parse_app_config(ARGS), engine, Recorded())
        with served(app) as address:
            yield address
        app.state.gateway.close()


def check(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=800, cwd=ROOT
    )
    assert done.stdout.endswith("ok\n"), done.stdout[-500:] + done.stderr[-3000:]


@pytest.mark.parametrize("client", ["instructor", "pydantic_ai", "openai_agents"])
def test_python_clients(url: str, client: str) -> None:
    assert AGENTS.is_dir(), "make clients puts them there"
    file = ROOT / f"tests/clients/{client}_checks.py"
    check([sys.executable, "-W", "ignore", str(file), url, NAME], PYTHONPATH=str(AGENTS))


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no Node on this machine")
def test_node_clients(url: str, tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json", "node_checks.mjs"):
        shutil.copy(ROOT / "tests/clients" / name, tmp_path)
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=tmp_path, check=True, timeout=300)
    check(["node", str(tmp_path / "node_checks.mjs"), url, NAME])
