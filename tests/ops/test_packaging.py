"""What `pip install` of the wheel brings: everything a node needs, without the source."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import httpx
import pytest
import yaml

from ops.local import free_port
from tests.conftest import eventually

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {
    "grpc": "grpcio",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
    "google": "protobuf",
    "prometheus_client": "prometheus-client",
}
BROUGHT = {  # by a dependency that is named
    "ray", "fastapi", "starlette", "protobuf", "opentelemetry",  # ray[serve]; sentencepiece's messages
    "triton",  # torch, where there is a GPU
}  # fmt: skip


def imported(folder: Path) -> set[str]:
    """Top-level packages that the files import, anywhere in them, beside Python's own and ours."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"model", "cluster", "deployments", "ops"}


def named(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=~ ]", line)[0].lower() for line in requirements}


def test_extras_name_what_their_commands_import() -> None:
    base = named(PROJECT["dependencies"]) | BROUGHT
    extras = PROJECT["optional-dependencies"]
    for folder, known in (
        ("model", base),
        ("cluster", base),
        ("deployments", base),
        ("ops/watch", base),
        ("ops/bench", base | named(extras["bench"])),
        ("ops/chaos", base | named(extras["chaos"])),
    ):
        unknown = {NAMES.get(name, name) for name in imported(ROOT / folder)} - known
        assert unknown == set(), folder


class Installed:
    """The wheel in an environment that sees the packages it depends on, and nothing of the source."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.bin = directory / "env" / "bin"

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.directory, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    directory = tmp_path_factory.mktemp("wheel")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split():
        if not name.startswith("tests/") and (ROOT / name).exists():
            target = directory / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(directory), str(directory / "source")]
    subprocess.run(build, check=True)
    shutil.rmtree(directory / "source")
    (file,) = directory.glob("caravan-*.whl")
    venv.create(directory / "env", symlinks=True, with_pip=False)
    installed = Installed(directory)
    packages = Path(installed.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*pip, "--python", str(installed.bin / "python"), "install", "--no-deps", "--no-index", str(file)], check=True
    )
    return installed


@pytest.mark.slow
def test_the_wheel_holds_what_a_node_needs(wheel: Installed) -> None:
    where = Path(wheel.run("python", "-c", "import ops; print(ops.__file__)").strip())
    assert wheel.directory in where.parents, "not the source's"
    names = {str(file.relative_to(where.parents[1])) for file in where.parents[1].rglob("*") if file.is_file()}
    assert {"ops/runbook.md", "ops/SECURITY.md", "ops/tls/haproxy.cfg", "deployments/configs/schema.json"} <= names
    assert {f"deployments/configs/{f.name}" for f in (ROOT / "deployments/configs").glob("*.yaml")} <= names
    assert not [name for name in names if name.startswith(("tests/", "ops/results/"))]
    assert any(re.fullmatch(r"caravan-.*dist-info/licenses/LICENSE", name) for name in names)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_command_works_from_the_wheel_and_it_serves(wheel: Installed) -> None:
    config = yaml.safe_load(wheel.run("caravan", "configs", "ray_config.yaml"))
    config["http_options"]["port"] = port = free_port()
    (wheel.directory / "mine.yaml").write_text(yaml.safe_dump(config))
    assert "all good" in wheel.run("caravan", "check", "mine.yaml")
    assert '"panels"' in wheel.run("caravan", "dashboard")
    assert '"groups"' in wheel.run("caravan", "alerts")
    assert wheel.run("caravan", "schema") == (ROOT / "deployments/configs/schema.json").read_text()
    assert wheel.run("caravan", "version").strip() == PROJECT["version"]
    served = subprocess.Popen(  # which calls `serve deploy`
        [str(wheel.bin / "python"), "-m", "ops.local", "--config", "mine.yaml"],
        cwd=wheel.directory, env=wheel.environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with served:
        try:
            eventually(lambda: served.poll() is not None or is_ready(port), 240, "it serves")
            assert served.poll() is None
            asked = {"model": config["applications"][0]["args"]["model"]["name"], "prompt": "Once", "max_tokens": 3}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] <= 3
        finally:
            served.send_signal(signal.SIGINT)
    assert served.returncode == 0


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
