"""What holds for the source as a whole."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from deployments.config import markdown_table

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
# Who may import whom. Tests may import all.
ALLOWED = {
    "model": {"model"},
    "cluster": {"model", "cluster"},
    "deployments": {"model", "cluster", "deployments"},
    "ops": {"model", "cluster", "deployments", "ops"},
}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_downwards_only(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports(file)} & set(ALLOWED)
        assert ours <= ALLOWED[package], f"{file.relative_to(ROOT)} imports {ours - ALLOWED[package]}"


def test_the_model_knows_nothing_of_ray_and_nobody_pickles() -> None:
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            roots = {name.split(".")[0] for name in imports(file)}
            assert not roots & {"pickle", "cloudpickle", "marshal", "shelve"}, file
            if package == "model":
                assert "ray" not in roots, file


def test_the_top_level_is_what_the_readme_says() -> None:
    folders = {name.split("/")[0] for name in TRACKED if "/" in name}
    assert folders <= {"cluster", "deployments", "model", "ops", "tests", ".ci"}
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{folder}/`" in readme for folder in folders - {".ci"})


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[`\n ])", readme)) <= targets
    cli = (ROOT / "ops/cli.py").read_text()
    for command in re.findall(r"^caravan ([a-z]+)", readme, re.MULTILINE):
        assert f"def {command}(" in cli or f'name="{command}"' in cli


def test_tests_that_the_readme_names_exist() -> None:
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    readme = (ROOT / "README.md").read_text("utf-8")
    names = set(re.findall(r"`(test_\w+)`", readme))
    assert len(names) > 20
    assert {name for name in names if f"def {name}(" not in tests} == set()
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", readme))


def test_no_paths_of_a_machine() -> None:
    for name in TRACKED:
        file = ROOT / name
        if file.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".lock", ""} and file.is_file():
            assert not re.search(r"/(home|root|work|Users)/[a-z]", file.read_text("utf-8")), name


def test_the_locks_name_each_package_once_and_no_host() -> None:
    for lock in ("requirements.lock", "tests/clients/requirements.lock"):
        lines = (ROOT / lock).read_text().splitlines()
        for line in lines:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line), line
        names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
        assert len(set(names)) == len(names), lock


def test_results_that_documents_name_are_there() -> None:
    for document in ("README.md", "ops/results/README.md", "ops/runbook.md"):
        named = re.findall(r"([\w*-]+-20[\d*-]+\.(?:json|png))", (ROOT / document).read_text("utf-8"))
        assert {name for name in named if not any((ROOT / "ops/results").glob(name))} == set(), document


def test_results_are_json() -> None:
    for file in (ROOT / "ops/results").glob("*.json"):
        json.loads(file.read_text())


def test_the_configuration_table_in_the_readme_is_true() -> None:
    assert markdown_table() in (ROOT / "README.md").read_text(), "python -m deployments.config prints the new one"
