"""The live page: off unless it is wanted, nothing from elsewhere, keys; a real browser while a stage is killed."""

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.pipeline import Place
from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from deployments.engine.board import PastRecovery, ReplicaStatus, StageStatus
from deployments.engine.engine_metrics import stage_status
from deployments.errors import ApiError
from deployments.gateway.tenants import add_key
from deployments.live.feed import MOST_VIEWERS, Feed
from deployments.live.page import HERE
from model.batch import StageTiming
from ops.local import await_ready, ray_head, session_processes
from tests.conftest import eventually
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine
from tests.deployments.live.browser import browser, missing
from tests.deployments.served import served
from tests.deployments.test_deployed import NAME, cmdline, write_config


def status(replica: str, at: float, tokens: int) -> ReplicaStatus:
    return ReplicaStatus(
        replica=replica, state="ready", reason="", loaded=1.0, updated_at=at, running=3, waiting=1, waiting_tokens=40,
        kv_blocks_used=5, kv_blocks_total=10, max_model_len=256, generated_tokens=tokens,
        stages=[StageStatus("10.0.0.1", "0", 0.9, 0.1, 0.0, 20.0), StageStatus("10.0.0.2", "1", 0.5, 0.4, 0.1, 11.0)],
        recoveries=[PastRecovery("killed", 2.5, 60.0)],
    )  # fmt: skip


def app_of(engine: ScriptedEngine, **args: Any) -> Any:
    return create_gateway(parse_app_config({**ARGS, **args}), engine, Recorded())


ON = {"gateway": {"live_page": True}}


def get(app: Any, path: str, **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get(path, **options)

    return asyncio.run(main())


def first_events(url: str, count: int, **headers: str) -> list[dict[str, Any]]:
    found = []
    with httpx.stream("GET", f"{url}/live/events", headers=headers, timeout=20) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
    return found


def test_it_is_not_there_unless_it_is_wanted() -> None:
    app = app_of(ScriptedEngine())
    assert [get(app, path).status_code for path in ("/live", "/live/events", "/live/page.js")] == [404] * 3
    assert get(app_of(ScriptedEngine(), **ON), "/live").status_code == 200


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_script_of_its_own() -> None:
    app = app_of(ScriptedEngine(), **ON)
    page = get(app, "/live")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert sorted(loaded) == ["data:,", "live/page.css", "live/page.js"]
    assert [get(app, f"/{name}").status_code for name in ("live/page.css", "live/page.js")] == [200, 200]
    for name in ("page.html", "page.css", "page.js"):
        assert not re.search(r"https?://|innerHTML|style=", (HERE / name).read_text()), name


def test_where_keys_are_asked_for_the_page_is_open_and_what_it_shows_is_not(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "ops")
    engine = ScriptedEngine()
    engine.statuses = [status("r1", 1.0, 0)]
    app = app_of(engine, **ON, auth={"keys_file": str(file)})
    assert get(app, "/live").status_code == 200
    assert get(app, "/live/events").status_code == 401
    with served(app) as url:
        assert first_events(url, 1, Authorization=f"Bearer {key}")[0]["replicas"][0]["replica"] == "r1"


def test_events_tell_rates_by_the_replicas_own_clock() -> None:
    engine = ScriptedEngine()
    engine.statuses = [status("r2", 100.0, 500), status("r1", 7.0, 0)]
    with served(app_of(engine, **ON)) as url:
        (before,) = first_events(url, 1)
        engine.statuses = [status("r2", 102.0, 700), status("r1", 7.0, 0)]
        after = first_events(url, 2)[-1]
    assert [replica["replica"] for replica in after["replicas"]] == ["r1", "r2"]
    assert [replica["tokens_per_s"] for replica in before["replicas"]] == [0.0, 0.0]
    assert [replica["tokens_per_s"] for replica in after["replicas"]] == [0.0, 100.0]
    stage = {"node": "10.0.0.1", "gpu": "0", "busy": 0.9, "waiting": 0.1, "transfer": 0.0, "step_ms": 20.0}
    assert after["replicas"][0]["stages"][0] == stage


def test_no_more_look_than_there_is_room_for() -> None:
    engine = ScriptedEngine()
    app = app_of(engine, **ON)

    async def main() -> tuple[int, int]:
        feed = Feed(app.state.gateway)
        viewers = [feed.events() for _ in range(MOST_VIEWERS)]
        for viewer in viewers:
            assert (await anext(viewer)).startswith(b"data: ")
        with pytest.raises(ApiError, match="too many"):
            feed.check_room()
        await viewers[0].aclose()
        feed.check_room()
        looks = engine.looks
        for viewer in viewers[1:]:
            await viewer.aclose()
        return looks, len(viewers)

    looks, viewers = asyncio.run(main())
    assert looks < viewers / 4, "one look at the board is for all"


def test_shares_of_a_stage() -> None:
    timings = [StageTiming(0, i, 1, 10.0 * i, 10.0 * i + 6.0, 3.0, 1.0) for i in range(4)]
    found = stage_status(Place("n", ("2", "3")), timings)
    assert (found.gpu, found.busy, found.waiting, found.transfer, found.step_ms) == ("2,3", 0.6, 0.3, 0.1, 6000.0)
    assert stage_status(Place("n", ()), []).busy == 0.0


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}")
def test_in_a_real_browser_while_a_stage_is_killed(tmp_path: Path) -> None:
    """`make serve`'s configuration. With CARAVAN_SCREENSHOT a picture is left there."""
    file = tmp_path / "config.yaml"
    url = write_config(file, model={"dtype": "float16"})
    assert "live_page: true" in file.read_text()
    with ray_head(2) as head:
        assert head.serve("deploy", str(file)).returncode == 0
        await_ready(head, url)
        with browser(tmp_path) as window:
            window.open(f"{url}/live")
            eventually(lambda: window.text(".stage b") == "stage 0\nstage 1", 60, "both stages are in the picture")
            assert window.text("#model") == NAME
            assert re.fullmatch(r"([\d.]+)\n\1", window.text(".node")), "the address of their node"
            window.type("#question", "Why is the sky blue? Tell it in three long sentences.\n")
            eventually(lambda: len(window.text(".message.assistant")) > 20, 60, "the answer begins")
            begun = window.text(".message.assistant")
            eventually(lambda: len(window.text(".message.assistant")) > len(begun), 30, "it streams")
            eventually(lambda: float(window.text("#rate")) > 0 and window.text(".way.moving") == "", 30, "tokens move")
            if (shot := os.environ.get("CARAVAN_SCREENSHOT")) is not None:
                window.screenshot(Path(shot))
            stages = [pid for pid in session_processes(head) if "StageActor" in cmdline(pid)]
            os.kill(stages[0], signal.SIGKILL)
            eventually(lambda: "rebuilding" in window.text(".reason"), 30, "the page says that it is rebuilt")
            eventually(lambda: "killed" in window.text(".recovery"), 90, "and that it was")
            eventually(lambda: window.script("return !document.querySelector('#send').hidden"), 120, "the answer ends")
            assert window.text(".message.error") == ""
            assert len(window.text(".message.assistant")) > len(begun)
            assert window.errors() == []
