"""The table of what runs under faults have shown: `python -m ops.chaos.table` makes it from ops/results."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
HEAD = (
    "| fault | times | streams, requests | failed, truncated, wrong | noticed: median, longest | recovered "
    "| longest pause of streams hit | longest gap of all others | first token of new requests | run |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
WORDS = {
    "stage": "stage, kill -9",
    "engine": "engine, kill -9",
    "node": "node, all processes killed",
    "stage-stop": "stage, SIGSTOP",
    "engine-stop": "engine, SIGSTOP for {hold:g} s",
    "gateway-stop": "gateway, SIGSTOP for {hold:g} s",
    "partition": "partition between two stages, {hold:g} s",
    "slow-link": "5 % loss and 100 ms delay between two stages, {hold:g} s",
    "disk-full": "disk of a node full for {hold:g} s",
    "gateway": "gateway, kill -9",
    "controller": "Serve controller, kill -9",
    "proxy": "proxy, kill -9",
    "haproxy": "HAProxy, kill -9",
    "head": "head node killed, restarted after 2 s",
    "drain": "node drained (SIGTERM)",
    "rollout": "rolling update",
    "scale": "1 pipeline more, or 1 less",
}

Run = Mapping[str, Any]  # a report's JSON


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Markdown, a row for each kind of fault in each group of runs; what a group holds several of is added up."""
    rows = []
    for name, group in runs.items():
        by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for run in group:
            for fault in run["faults"]:
                by_kind[fault["kind"]].append(fault)
        rows += [_row(kind, name, group, by_kind[kind]) for kind in WORDS if kind in by_kind]
    return "\n".join([HEAD, *rows])


def _row(kind: str, name: str, group: Sequence[Run], faults: Sequence[Mapping[str, Any]]) -> str:
    setting = group[0]["setting"]
    words = WORDS[kind].format(hold=setting["hold_s"])
    alone = setting["engines"] == 1 and kind != "scale"
    if alone:
        words += "; the only pipeline" + (", with spares" if setting.get("spares") else "")
    counts = [sum(run[key] for run in group) for key in ("failed", "truncated", "wrong", "hung", "excused", "requests")]
    failed, truncated, wrong, hung, excused, requests = counts
    bad = f"{failed}, {truncated}, {wrong}" + (f", {hung} hung" if hung else "")
    bad += f" ({excused} through what was killed)" if excused else ""
    times = [
        spread([fault[key] for fault in faults])
        for key in ("detect_s", "recover_s", "longest_pause_s", "others_longest_gap_s", "longest_first_wait_s")
    ]
    if alone:
        times[-2] = "-"  # there are no others
    cells = [words, str(len(faults)), f"{setting['streams']}, {requests:,}", bad, *times, f"`{name}`"]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float | None]) -> str:
    """Median and maximum of what was measured."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}, {max(known):.1f} s" if known else "-"


def recorded(directory: Path = RESULTS) -> dict[str, list[Run]]:
    """The last runs of each name: `chaos-NAME-DATE.json`, or `chaos-NAME-1-DATE.json` and so on for one in parts."""
    days: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(directory.glob("chaos-*.json")):
        found = re.fullmatch(r"(chaos-[a-z-]+?)(?:-\d)?-(\d{4}-\d\d-\d\d)\.json", file.name)
        if found and "without" not in file.name:
            days[found.group(1)][found.group(2)].append(json.loads(file.read_text()))
    last = {name: by_day[max(by_day)] for name, by_day in days.items()}
    order = list(WORDS)
    return dict(sorted(last.items(), key=lambda item: order.index(item[1][0]["faults"][0]["kind"])))


if __name__ == "__main__":
    print(table(recorded()))
