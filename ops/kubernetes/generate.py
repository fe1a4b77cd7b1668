"""Writes what of the chart follows from elsewhere: `python -m ops.kubernetes.generate`, or `make chart`.

The schema of `args` is that of the configuration, the rules and the dashboard are those of `caravan alerts` and
`caravan dashboard`.
"""

import json
from pathlib import Path
from typing import Any, get_args

from deployments.config import AppConfig
from deployments.schema import without_titles
from ops.watch.alerts import rules_json
from ops.watch.dashboard import Board, dashboard_json

CHART = Path(__file__).parent / "caravan"
SCHEMA = "values.schema.json"


def generated() -> dict[str, str]:
    """Name in the chart -> content."""
    boards = {f"files/dashboard-{board}.json": dashboard_json(board) for board in get_args(Board)}
    return {SCHEMA: values_schema(), "files/alerts.json": rules_json(), **boards}


def values_schema() -> str:
    """The file as it is, with the definitions of today's configuration: `args` refers to one of them."""
    schema: dict[str, Any] = json.loads((CHART / SCHEMA).read_text("utf-8"))
    ours = AppConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions = ours.pop("$defs")
    schema["$defs"] = without_titles({"Args": ours, **definitions})
    return json.dumps(schema, indent=1) + "\n"


def main() -> None:
    for name, content in generated().items():
        (CHART / name).write_text(content, "utf-8")


if __name__ == "__main__":
    main()
