"""The image, built and run here: by buildah, as root, on a base made of Debian's packages."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ops.image.build import build_command, pip_settings
from ops.image.sbom import sbom
from ops.image.unneeded import needed
from ops.local import free_port

TAG = "localhost/caravan-test:cpu"
ISOLATED = ("buildah", "run", "--isolation", "chroot")


def test_the_list_of_contents_is_of_this_environment() -> None:
    found = sbom()
    names = {part["name"].lower(): part for part in found["components"]}
    assert (found["bomFormat"], found["metadata"]["component"]["name"]) == ("CycloneDX", "caravan")
    assert names["ray"]["purl"] == f"pkg:pypi/ray@{names['ray']['version']}"
    assert len({part["bom-ref"] for part in found["components"]}) == len(found["components"])


def test_what_runs_is_kept_and_what_tests_is_not() -> None:
    assert {"ray", "torch", "xgrammar", "grpcio", "fastapi-offline", "aiohttp", "opencensus"} <= needed()
    assert not {"pytest", "mypy", "schemathesis", "peft", "boto3", "langchain-core"} & needed()


def test_the_builders_are_called_in_their_ways(tmp_path: Path) -> None:
    buildah = build_command("buildah", "cpu", "x", "base", tmp_path / "pip.conf", [])
    docker = build_command("docker", "gpu", "x", "base", None, [])
    assert {"--layers", "--secret", "--ignorefile"} <= set(buildah)
    assert not {"--layers", "--secret", "--isolation"} & set(docker)
    conf, volumes = pip_settings(tmp_path)
    assert conf.read_text().startswith("[global]\n")
    assert all(Path(volume.removeprefix("--volume=").split(":")[0]).exists() for volume in volumes)


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """A container of the image, which is built first: minutes."""
    if shutil.which("buildah") is None or shutil.which("debootstrap") is None:
        pytest.skip("the image is built with buildah and debootstrap: install both, and be root")
    build = [sys.executable, "-m", "ops.image.build", "--base", "debootstrap", "--tag", TAG]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode and "needs root" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    name = subprocess.run(["buildah", "from", TAG], capture_output=True, text=True, check=True).stdout.strip()
    yield name
    subprocess.run(["buildah", "rm", name], check=True, capture_output=True)
    subprocess.run(["buildah", "rmi", TAG], capture_output=True)


def inside(container: str, command: str) -> str:
    done = subprocess.run([*ISOLATED, container, "--", "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_serves(container: str) -> None:
    assert inside(container, "id -u") == "10001"
    assert inside(container, "caravan version") == "0.1.0"
    contents = json.loads(inside(container, "cat /opt/caravan/sbom.cdx.json"))
    names = {part["name"].lower() for part in contents["components"]}
    assert {"ray", "torch", "caravan", "libc6", "tini"} <= names
    assert not {"pytest", "mypy", "pip"} & names
    written = inside(container, "find / -xdev -writable -type d 2>/dev/null || true").splitlines()
    assert {line for line in written if not line.startswith(("/tmp", "/var/tmp", "/run", "/dev", "/proc"))} == set()

    port = free_port()
    config = f"sed 's/port: 8000/port: {port}/' /etc/caravan/ray_config.yaml > /tmp/ray_config.yaml"
    serve = f"{config} && exec python -m ops.local --config /tmp/ray_config.yaml --host 0.0.0.0"
    process = subprocess.Popen([*ISOLATED, container, "--", "/usr/bin/tini", "-g", "--", "sh", "-c", serve])
    try:
        url = f"http://127.0.0.1:{port}"
        await_ready(url, process)
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 16}
        body["model"] = "smollm2-135m-instruct"
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 5
    finally:
        process.terminate()
        process.wait(60)


def await_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended"
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("not ready within 240 s")
