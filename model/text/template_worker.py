"""A process that renders chat templates, so that one that hangs or fills the memory takes nothing else with it.

`python -m model.text.template_worker`: a JSON object per line in (source, variables, most), one out: the text, or why
there is none (`refused`: the messages do not fit; `broken`: no messages would). It ends with its input.
"""

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

from model.text.template import BrokenTemplate, CompiledTemplate, PromptFormatError

SECONDS = 2.0  # for one prompt: templates take a thousandth of that
START_SECONDS = 60.0
MEMORY_BYTES = 256_000_000  # that a prompt may need beside the process itself


class TemplateProcess:
    """The other end. Safe from any thread; one prompt at a time. Started when first needed, and after a death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: Mapping[str, Any], most: int) -> str:
        """The text, of at most `most` characters. Raises `PromptFormatError`."""
        line = json.dumps({"source": source, "variables": variables, "most": most}).encode("ascii")
        with self._lock:
            try:
                answer = self._ask(line)
            except TimeoutError:
                raise BrokenTemplate(f"the model's chat template takes longer than {SECONDS:g} s") from None
            except (EOFError, BrokenPipeError):
                raise BrokenTemplate("the model's chat template needs too much memory") from None
        if "text" in answer:
            return str(answer["text"])
        raise (BrokenTemplate(answer["broken"]) if "broken" in answer else PromptFormatError(answer["refused"]))

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "model.text.template_worker"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            try:
                self._answer(START_SECONDS)
            except (TimeoutError, EOFError) as error:
                self.close()
                raise OSError("the process that renders chat templates did not start") from error
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            return self._answer(SECONDS)
        except (TimeoutError, BrokenPipeError, EOFError):
            self.close()
            raise

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line. Raises `TimeoutError`, or `EOFError` if the process ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        out, parts = self._process.stdout.fileno(), [b""]
        deadline = time.monotonic() + seconds
        while not parts[-1].endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            parts.append(os.read(out, 1_000_000))
            if not parts[-1]:
                raise EOFError
        found: dict[str, Any] = json.loads(b"".join(parts))
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@cache
def template_process() -> TemplateProcess:
    """The one of this process: a worker renders any template, so that more would be a waste."""
    return TemplateProcess()


def main() -> None:
    compiled = lru_cache(maxsize=16)(CompiledTemplate)
    with open("/proc/self/statm") as statm:
        limit = int(statm.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer_to(json.loads(line), compiled)), flush=True)


def _answer_to(request: dict[str, Any], compiled: Any) -> dict[str, str]:
    try:
        text: str = compiled(request["source"]).render(request["variables"], request["most"])
    except BrokenTemplate as error:
        return {"broken": str(error)}
    except PromptFormatError as error:
        return {"refused": str(error)}
    return {"text": text}


if __name__ == "__main__":
    main()
