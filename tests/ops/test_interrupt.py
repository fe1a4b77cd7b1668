"""Commands that are asked to end, and what they have started."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops import interrupt
from ops.processes import living_processes
from tests.conftest import eventually

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from ops.interrupt import end_on_signals
end_on_signals()
try:
    Path("begun").touch()
    time.sleep(60)
finally:
    time.sleep(0.2)
    Path("ended").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_command_with_all_it_has_begun(number: signal.Signals, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stderr=-1)
    with child:
        eventually((tmp_path / "begun").exists, 30, "it runs")
        child.send_signal(number)
    assert (tmp_path / "ended").exists()


def test_a_command_that_takes_too_long_may_end_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(subprocess.TimeoutExpired):
        interrupt.run([sys.executable, "-c", CHILD], timeout_s=5.0)
    assert (tmp_path / "ended").exists()
    done = interrupt.run([sys.executable, "-c", "import sys; print('o'); sys.exit('e')"], timeout_s=60.0)
    assert (done.returncode, done.stdout, done.stderr) == (1, "o\n", "e\n")


def test_a_command_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "GRACE_S", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        interrupt.run([sys.executable, "-c", deaf], timeout_s=2.0)
    assert time.monotonic() - began < 30


def descendants(pid: int) -> dict[int, str]:
    """Living processes that it has started, and those that these have: their names."""
    processes = list(living_processes())
    found: dict[int, str] = {}
    while new := {p.pid: p.name for p in processes if p.parent in {pid, *found} and p.pid not in found}:
        found |= new
    return found


HELD = """
import os, signal
from ops.interrupt import end_on_signals, held_back
end_on_signals()
try:
    with held_back():
        os.kill(os.getpid(), signal.SIGINT)
        print("first", flush=True)
    print("never")
except KeyboardInterrupt:
    print("then", flush=True)
try:
    with held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        print("never")
except KeyboardInterrupt:
    print("at once")
"""


def test_a_signal_is_held_back_and_a_second_one_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["first", "then", "at once", ""], done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_signal_while_ray_starts_leaves_nothing_behind(process: str, tmp_path: Path) -> None:
    """As soon as there is such a process, of which Ray itself does not know yet that it has started it."""
    command = ["bench", "offline", "ray_config.yaml", "--output", str(tmp_path / "o.json")]
    with subprocess.Popen([sys.executable, "-m", "ops.cli", *command], cwd=ROOT, stderr=subprocess.DEVNULL) as own:
        started: dict[int, str] = {}
        deadline = time.monotonic() + 120
        while not any(process in name for name in started.values()):
            assert time.monotonic() < deadline, started
            started |= descendants(own.pid)
        own.send_signal(signal.SIGINT)
        while own.poll() is None:
            started |= descendants(own.pid)
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert own.returncode == 130
    eventually(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()], 20, "no process is left")


@pytest.mark.faults
@pytest.mark.parametrize("row", ["bfloat16x2", "http-2x1"])
def test_a_benchmark_that_is_ended_leaves_no_ray_behind(row: str, tmp_path: Path) -> None:
    """A row of the engine alone, in a process of its own, and one of a service."""
    command = ["bench", "scaling", str(tmp_path / "s.json"), "--device", "cpu", "--rows", row]
    with subprocess.Popen([sys.executable, "-m", "ops.cli", *command], cwd=ROOT) as own:
        started: dict[int, str] = {}

        def has_stages() -> bool:
            started.update(descendants(own.pid))
            return "ray::StageActor" in started.values()

        eventually(has_stages, 120, "Ray runs stages")
        own.terminate()
    assert own.returncode == 130
    eventually(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()], 20, "no process is left")
