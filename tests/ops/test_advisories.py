"""Known holes in pinned packages, and a build that does not need the network."""

from pathlib import Path

import httpx
import pytest

from ops import advisories

ROOT = Path(__file__).parents[2]


def test_what_is_pinned_has_no_known_hole() -> None:
    packages = advisories.pinned([ROOT / "requirements.lock"])
    assert {"h11", "ray", "torch", "starlette"} <= set(packages)
    assert advisories.known_holes(packages) == []


@pytest.mark.parametrize(
    ("version", "holed"), [("0.14.0", True), ("0.16.0", False), ("0.16", False), ("0.16.0rc1", False), ("1.0", False)]
)
def test_versions_are_compared_as_numbers(version: str, holed: bool) -> None:
    assert bool(advisories.known_holes({"h11": version})) == holed
    assert advisories.known_holes({"torch": "2.13.0+cpu"}) == []


def test_an_old_package_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(advisories, "OSV", "http://127.0.0.1:9/")
    file = tmp_path / "lock"
    file.write_text("h11==0.14.0\nhttpx==1.0\n")
    assert advisories.main([str(file)]) == 1
    file.write_text("h11==0.16.0\n")
    assert advisories.main([str(file)]) == 0
    assert "skipped: advisory database not reachable" in capsys.readouterr().out  # type: ignore[attr-defined]


def test_what_the_database_knows_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def post(url: str, json: dict[str, list[object]], timeout: float) -> httpx.Response:
        assert [query["package"]["name"] for query in json["queries"]] == ["a", "b"]  # type: ignore[index]
        answer = {"results": [{}, {"vulns": [{"id": "GHSA-1"}]}]}
        return httpx.Response(200, json=answer, request=httpx.Request("POST", url))

    monkeypatch.setattr(httpx, "post", post)
    assert advisories.advisories({"a": "1", "b": "2"}) == ["b 2: GHSA-1"]
    (tmp_path / "lock").write_text("a==1\nb==2\n")
    assert advisories.main([str(tmp_path / "lock")]) == 1
