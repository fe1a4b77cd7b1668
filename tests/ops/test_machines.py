"""ops/machines: the files judged by Ray and systemd, and the page's commands run between two namespaces."""

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ops.chaos.namespaces import Namespace, NamespaceError, Network, check_possible
from ops.chaos.nodes import PATIENCE, PROXY_CHECKS

ROOT = Path(__file__).parents[2]
MACHINES = ROOT / "ops" / "machines"
BIN = Path(sys.executable).parent
UNITS = ("caravan-head.service", "caravan-worker.service")


def env_file() -> dict[str, str]:
    lines = (MACHINES / "caravan.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_ray_takes_the_file_of_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((MACHINES / "ray-up.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)  # by ray-schema.json, and by the provider's rules
    with pytest.raises(Exception, match="worker_start_ray_command"):
        validate_config({**prepared, "worker_start_ray_command": []})


def test_settings_are_those_of_the_runbook() -> None:
    wanted = {**PATIENCE, **PROXY_CHECKS}
    wanted.pop("RAY_agent_register_timeout_ms")  # of a machine with 2 cores for all
    env = env_file()
    assert {name: env.get(name) for name in wanted} == wanted
    text = (MACHINES / "ray-up.yaml").read_text()
    assert all(f"{name}={value}" in text for name, value in PATIENCE.items() if name in wanted)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_the_units(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the units are judged by systemd-analyze: install systemd")
    # What is not on this machine is replaced: systemd looks for it.
    text = (
        (MACHINES / unit)
        .read_text()
        .replace("/opt/caravan/bin/ray", "/bin/true")
        .replace("/opt/caravan/bin/python", "/bin/true")
        .replace("User=caravan", "User=root")
    )
    (tmp_path / unit).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / unit)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit in line]) == (0, [])


class Machine:
    """A namespace in which /opt/caravan, /etc/caravan and /var/lib/caravan are its own."""

    def __init__(self, space: Namespace, directory: Path, head: str, token: str) -> None:
        self.space = space
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log = directory / f"{space.port}.log"
        self.directory = directory / str(space.port)
        for name in ("etc", "state"):
            (self.directory / name).mkdir(parents=True)
        filled = {"RAY_AUTH_TOKEN": token, "NODE_ADDRESS": space.address, "HEAD_ADDRESS": head}
        text = (MACHINES / "caravan.env").read_text()
        for name, value in filled.items():
            text = text.replace(f"\n{name}=\n", f"\n{name}={value}\n")
        assert all(f"{name}={value}\n" in text for name, value in filled.items())
        (self.directory / "etc" / "caravan.env").write_text(text)

    def command(self, shell: str) -> list[str]:
        places = {
            self.directory / "etc": "/etc/caravan", self.directory / "state": "/var/lib/caravan",
            BIN.parent: "/opt/caravan",
        }  # fmt: skip
        mounts = "".join(f"mount --bind {here} {place}; " for here, place in places.items())
        return [*self.space.prefix, "sh", "-ec", f"{mounts}{shell}"]

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONPATH": str(ROOT)}

    def start_unit(self, unit: str) -> None:
        """As systemd would: its lines, with its environment."""
        lines = re.findall(r"^(Environment|ExecStartPre|ExecStart)=(.*)$", (MACHINES / unit).read_text(), re.MULTILINE)
        exports = [f"export {value}" for key, value in lines if key == "Environment"]
        before = [value for key, value in lines if key == "ExecStartPre"]
        start = next(value for key, value in lines if key == "ExecStart")
        shell = "; ".join(["set -a; . /etc/caravan/caravan.env; set +a", *exports, *before, f"exec {start}"])
        with self.log.open("ab") as log:
            command = self.command(shell)
            process = subprocess.Popen(command, env=self.environment(), stdout=log, stderr=log, start_new_session=True)
        self.unit = unit
        self.processes.append(process)

    def restart(self) -> None:
        """A unit that has ended, as Restart=always says: a worker's ends if the head is not there yet."""
        if self.processes[-1].poll() is not None:
            self.start_unit(self.unit)

    def run(self, shell: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
        prepared = f"set -a; . /etc/caravan/caravan.env; set +a; {shell}"
        return subprocess.run(self.command(prepared), env=self.environment(), cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    try:
        check_possible()
    except NamespaceError as error:
        pytest.skip(str(error))
    made = [place for place in map(Path, ("/etc/caravan", "/var/lib/caravan", "/opt/caravan")) if not place.exists()]
    for place in made:
        place.mkdir()  # to mount on, in namespaces only
    try:
        with Network(2) as network, tempfile.TemporaryDirectory(prefix="cv", dir="/tmp") as directory:
            head, token = network.spaces[0].address, secrets.token_hex(16)
            found = [Machine(space, Path(directory), head, token) for space in network.spaces]
            try:
                yield found
            finally:
                for process in (p for machine in found for p in machine.processes):
                    process.terminate()
                for process in (p for machine in found for p in machine.processes):
                    try:
                        process.wait(40)
                    except subprocess.TimeoutExpired:
                        process.kill()
    finally:
        for place in made:
            place.rmdir()


def page_commands(step: int) -> list[str]:
    """Of one of the page's steps."""
    text = (MACHINES / "README.md").read_text().partition(f"## {step}. ")[2].partition("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_pages_commands_between_two_machines(machines: list[Machine], tmp_path: Path) -> None:
    one, two = machines
    for machine, line in zip(machines, page_commands(3), strict=True):
        unit = line.split()[-1]
        assert line == f"systemctl enable --now {unit}"
        machine.start_unit(f"{unit}.service")
    nodes = 'python -c \'import ray; ray.init(address="\'$NODE_ADDRESS\':6379", logging_level="ERROR"); '
    count = nodes + 'assert sum(n["Alive"] for n in ray.nodes()) == 2\''
    deadline = time.monotonic() + 200
    while one.run(count, tmp_path).returncode:
        two.restart()
        assert time.monotonic() < deadline, two.log.read_text(errors="replace")[-1500:]
        time.sleep(1)
    for line in page_commands(4):
        done = one.run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        if line.startswith("caravan configs"):
            assert "llama-2-70b" in (tmp_path / "my.yaml").read_text()
            (tmp_path / "my.yaml").write_text(small_config())  # two stages that do not fit on one of the machines
    ready, models, chat = page_commands(5)
    await_success(one, f"{ready} --fail", tmp_path, 240)
    assert "smollm2" in one.run(models, tmp_path).stdout
    said = one.run(f"printf 'Say hello.\\n\\n' | {chat}", tmp_path)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout) > 60
    shown = one.run("caravan top --once --metrics http://$NODE_ADDRESS:8080/metrics", tmp_path)
    assert shown.returncode == 0, shown.stderr
    two.processes[-1].terminate()  # systemctl stop
    two.processes[-1].wait(60)


def small_config() -> str:
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    config["proxy_location"] = "EveryNode"
    config["http_options"]["host"] = "0.0.0.0"
    args = config["applications"][0]["args"]
    for deployment in config["applications"][0].get("deployments", []):
        if deployment["name"] == "Engine":
            deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
    cpus = os.cpu_count() or 2
    args["resources"] = {"gateway_cpus": 0.2, "engine_cpus": 0.2, "stage_cpus": 0.55 * cpus, "drain_timeout_s": 20.0}
    return yaml.safe_dump(config, sort_keys=False)


def await_success(machine: Machine, command: str, cwd: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while (done := machine.run(command, cwd)).returncode:
        words = machine.log.read_text(errors="replace")[-1500:]
        assert time.monotonic() < deadline, f"{shlex.quote(command)}: {done.stdout} {done.stderr[-1500:]}\n{words}"
        time.sleep(1)
