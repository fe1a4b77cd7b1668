"""What holds for the source as a whole."""

import ast
import json
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from deployments.config import markdown_table
from deployments.schema import schema_json
from ops.kubernetes.generate import CHART, generated

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
# Who may import whom. Tests may import all.
ALLOWED = {
    "model": {"model"},
    "cluster": {"model", "cluster"},
    "deployments": {"model", "cluster", "deployments"},
    "ops": {"model", "cluster", "deployments", "ops"},
}
MAX_LINES, MAX_FILES = 500, 14  # of a file; of a folder of deployments/ or ops/, beside its door
DOCUMENTS = [name for name in TRACKED if name.endswith(".md")]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
PROSE = {"of"}  # what else follows the word make
USERS_FILES = {"my.yaml", "my_config.yaml", "keys.yaml"}


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


@pytest.mark.parametrize("room", ["model/text", "deployments/gateway", "deployments/routes", "deployments/routing"])
def test_what_gateways_run_knows_no_torch(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & {"torch", "triton", "transformers"}, file


def rooms() -> dict[str, set[str]]:
    """Which rooms each room imports. A room is a folder, or a file that stands beside folders."""
    files = {f.relative_to(ROOT).with_suffix("") for package in ALLOWED for f in (ROOT / package).rglob("*.py")}
    modules = {".".join(f.parts).removesuffix(".__init__"): f for f in files}
    divided = {f.parent for f in files if any(other.parent.parent == f.parent for other in files)}

    def room(module: str) -> str:
        file = modules[module]
        return str(file) if file.parent in divided else str(file.parent)

    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        if file.name != "__init__":
            path = ROOT / file.with_suffix(".py")
            ours = {name if name in modules else name.rpartition(".")[0] for name in imports(path)} & modules.keys()
            found.setdefault(room(module), set()).update({room(name) for name in ours} - {room(module)})
    return found


def test_no_circle_between_rooms() -> None:
    list(TopologicalSorter(rooms()).static_order())  # raises CycleError, which names the circle


def test_a_room_has_a_dozen_files_and_a_file_fits_in_the_head() -> None:
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            assert len(file.read_text("utf-8").splitlines()) <= MAX_LINES, file
            if package in ("deployments", "ops"):
                names = {f.name for f in file.parent.glob("*.py")} - {"__init__.py", "__main__.py"}
                assert len(names) <= MAX_FILES, file.parent


def test_the_top_level_is_what_the_readme_says() -> None:
    folders = {name.split("/")[0] for name in TRACKED if "/" in name}
    assert folders <= {"cluster", "deployments", "model", "ops", "tests", ".ci"}
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{folder}/`" in readme for folder in folders - {".ci"})


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    assert all(f"({package}/README.md#" in (ROOT / "README.md").read_text() for package in ALLOWED)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if not target.startswith("https://"):
            file = (ROOT / document).parent / target if target else ROOT / document
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[`\n ])", text)) - PROSE <= targets
    known = "".join((ROOT / name).read_text() for name in ("ops/cli.py", "ops/bench/cli.py"))
    for command in re.findall(r"(?:^|`)caravan (?:bench )?([a-z]+)", text, re.MULTILINE):
        assert f"def {command}(" in known or f'name="{command}"' in known, command
    for module in re.findall(r"python -m ((?:ops|deployments|cluster|model)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_every_benchmark_is_in_the_readme() -> None:
    readme = (ROOT / "ops/README.md").read_text("utf-8")
    names = re.findall(
        r"^@bench\.command\((?:.*\n)*?def (\w+)\(", (ROOT / "ops/bench/cli.py").read_text(), re.MULTILINE
    )
    assert len(names) > 10
    assert [name for name in names if f"caravan bench {name}" not in readme] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_tests_that_documents_name_exist(document: str) -> None:
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    text = (ROOT / document).read_text("utf-8")
    names = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in names if f"def {name}(" not in tests} == set()
    near = (ROOT, (ROOT / document).parent)
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|yaml))`", text):
        found = any((folder / path).is_file() for folder in (*near, ROOT / "deployments/configs"))
        assert found or path in USERS_FILES, path


def test_every_threat_has_its_test() -> None:
    text = (ROOT / "ops/SECURITY.md").read_text("utf-8")
    rows = re.findall(r"^\| (.*) \|$", text.partition("## Threat model")[2].partition("Not protected")[0], re.MULTILINE)
    assert len(rows) > 15
    assert [row for row in rows[2:] if "`test_" not in row.split(" | ")[-1]] == []


def test_what_the_api_does_is_tested() -> None:
    assert len(set(re.findall(r"`(test_\w+)`", (ROOT / "deployments/README.md").read_text("utf-8")))) > 20


def test_the_four_answers_are_where_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    answers = re.findall(r"^\| (?:does|is) .*\? \| (.*) \|$", readme, re.MULTILINE)
    assert len(answers) == 4
    for answer in answers:
        for name, file in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", answer):
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            for part in name.split("."):
                defined = {node.name: node for node in ast.iter_child_nodes(tree) if isinstance(node, DEFINITIONS)}
                assert part in defined, f"{name} in {file}"
                tree = defined[part]  # type: ignore[assignment]


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
    for document in DOCUMENTS:
        named = re.findall(r"([\w*-]+-20[\d*-]+\.(?:json|png))", (ROOT / document).read_text("utf-8"))
        assert {name for name in named if not any((ROOT / "ops/results").glob(name))} == set(), document


def test_results_are_json() -> None:
    for file in (ROOT / "ops/results").glob("*.json"):
        json.loads(file.read_text())


def test_the_schema_is_true() -> None:
    shipped = ROOT / "deployments/configs/schema.json"
    assert shipped.read_text() == schema_json(), "caravan schema --output deployments/configs/schema.json"
    for file in (ROOT / "ray_config.yaml", *shipped.parent.glob("*.yaml")):
        found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", file.read_text("utf-8"))
        assert found is not None, file
        assert (file.resolve().parent / found[1]).resolve() == shipped


def test_what_of_the_chart_is_generated_is_true() -> None:
    for name, content in generated().items():
        assert (CHART / name).read_text("utf-8") == content, f"{name}: make chart writes it anew"


def test_the_configuration_table_is_true() -> None:
    assert markdown_table() in (ROOT / "deployments/README.md").read_text(), (
        "python -m deployments.config prints the new one"
    )
