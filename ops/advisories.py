"""`make check`: no pinned package is older than a known hole in it, and what the advisory database knows beyond that.

`python -m ops.advisories requirements.lock ...`. The first part needs no network. The second asks OSV
(https://osv.dev) once for all packages; where that cannot be reached it is skipped and says so: a build must not fail
for want of a network.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

OSV = "https://api.osv.dev/v1/querybatch"
TIMEOUT_S = 10.0

# package -> (first version without it, what it is). What this service touches with input from outside.
HOLES: Mapping[str, tuple[str, str]] = {
    "h11": ("0.16.0", "CVE-2025-43859: accepts bad chunk ends, so that requests can be smuggled past a proxy"),
    "ray": ("2.56.0", "CVE-2026-57516 unpickles data sets; CVE-2025-62593 (2.52): a web page could submit jobs"),
    "torch": ("2.6.0", "CVE-2025-32434: code in checkpoints runs in spite of weights_only"),
    "starlette": ("0.49.1", "CVE-2025-62727: a Range header costs quadratic time"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template breaks out of the sandbox"),
    "requests": ("2.32.4", "CVE-2024-47081: sends .netrc credentials to other hosts"),
    "urllib3": ("2.6.0", "CVE-2025-66418, CVE-2025-66471: compressed answers exhaust memory"),
    "protobuf": ("6.31.1", "CVE-2025-4565: nested messages exhaust the stack"),
    "aiohttp": ("3.13.3", "CVE-2025-69223: a compressed body exhausts memory (Ray's dashboard)"),
}


def pinned(files: Sequence[Path]) -> dict[str, str]:
    """name -> version of every `name==version` line."""
    found = {}
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            name, separator, version = line.partition("==")
            if separator:
                found[name.strip().lower().replace("_", "-")] = version.strip()
    return found


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version; what follows them (rc1, +cpu) is of no matter here."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit()) if part[:1].isdigit() else ""
        if not digits:
            break
        numbers.append(int(digits))
    while numbers and numbers[-1] == 0:
        numbers.pop()  # 1.0 is 1
    return tuple(numbers)


def known_holes(packages: Mapping[str, str]) -> list[str]:
    """One line for each package that is older than its hole's end."""
    return [
        f"{name} {packages[name]}: needs {fixed} or newer ({what})"
        for name, (fixed, what) in HOLES.items()
        if name in packages and release(packages[name]) < release(fixed)
    ]


def advisories(packages: Mapping[str, str]) -> list[str]:
    """What OSV has on these versions. Raises `httpx.HTTPError` if it cannot be asked."""
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages.items()
    ]
    response = httpx.post(OSV, json={"queries": queries}, timeout=TIMEOUT_S)
    response.raise_for_status()
    results = response.json()["results"]
    return [
        f"{name} {version}: {vulnerability['id']}"
        for (name, version), result in zip(packages.items(), results, strict=True)
        for vulnerability in result.get("vulns", [])
    ]


def main(files: Sequence[str]) -> int:
    packages = pinned([Path(file) for file in files])
    holes = known_holes(packages)
    print(f"audit: {len(packages)} pinned packages, {len(holes)} older than a known hole")
    try:
        found = advisories(packages)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        print(f"audit: advisories skipped: advisory database not reachable ({type(error).__name__})")
        found = []
    else:
        print(f"audit: {len(found)} advisories at osv.dev")
    for line in [*holes, *found]:
        print(f"  {line}")
    return 1 if holes or found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
