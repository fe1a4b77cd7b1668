"""A real Chromium without a screen, by ChromeDriver's own protocol."""

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from ops.local import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of an element
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,760",
)  # fmt: skip


def missing() -> str:
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


class Browser:
    """One window."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http, self._session = http, session

    def call(self, method: str, path: str, **body: Any) -> Any:
        content = {"json": body} if method == "POST" else {}
        answer = self._http.request(method, f"/session/{self._session}{path}", **content).json()["value"]  # type: ignore[arg-type]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(answer["message"])
        return answer

    def open(self, url: str) -> None:
        self.call("POST", "/url", url=url)

    def script(self, text: str) -> Any:
        return self.call("POST", "/execute/sync", script=text, args=[])

    def text(self, selector: str) -> str:
        return str(
            self.script(f"return [...document.querySelectorAll('{selector}')].map(e => e.textContent).join('\\n')")
        )

    def type(self, selector: str, text: str) -> None:
        found = self.call("POST", "/element", using="css selector", value=selector)
        self.call("POST", f"/element/{found[ELEMENT]}/value", text=text)

    def errors(self) -> list[str]:
        """What the console says of scripts, policies and requests that failed."""
        return [
            entry["message"] for entry in self.call("POST", "/se/log", type="browser") if entry["level"] == "SEVERE"
        ]

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    port = free_port()
    log = (directory / "chromedriver.log").open("wb")
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            _await(http)
            options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={directory}/profile"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in made, made
            window = Browser(http, made["sessionId"])
            try:
                yield window
            finally:
                http.delete(f"/session/{made['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(20)


def _await(http: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if http.get("/status", timeout=2).json()["value"]["ready"]:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError("ChromeDriver does not start")
