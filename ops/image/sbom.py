"""What is in this environment, as CycloneDX: Python's packages, and Debian's where there is dpkg.

`python -m ops.image.sbom > sbom.cdx.json`; the image has it at /opt/caravan/sbom.cdx.json.
"""

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any
from uuid import uuid4

DPKG = ("dpkg-query", "--show", "--showformat", "${Package}\t${Version}\t${Architecture}\n")
Component = dict[str, Any]


def python_packages() -> Iterator[Component]:
    for found in distributions():
        name, number = found.metadata["Name"], found.version
        said = found.metadata.json
        licence = str(said.get("license_expression") or said.get("license") or "").strip()
        known = {"licenses": [{"license": {"name": licence.splitlines()[0][:100]}}]} if licence else {}
        yield component(name, number, f"pkg:pypi/{name.lower().replace('_', '-')}@{number}", **known)


def debian_packages() -> Iterator[Component]:
    try:
        listed = subprocess.run(DPKG, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return  # not a Debian
    distribution = "ubuntu" if "ID=ubuntu" in Path("/etc/os-release").read_text() else "debian"
    for line in listed.splitlines():
        name, number, architecture = line.split("\t")
        yield component(name, number, f"pkg:deb/{distribution}/{name}@{number}?arch={architecture}")


def component(name: str, number: str, purl: str, **rest: Any) -> Component:
    return {"type": "library", "name": name, "version": number, "purl": purl, "bom-ref": purl, **rest}


def sbom() -> dict[str, Any]:
    """The whole document."""
    parts = {part["purl"]: part for part in (*python_packages(), *debian_packages())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {"type": "application", "name": "caravan", "version": version("caravan")},
        },
        "components": sorted(parts.values(), key=lambda part: str(part["purl"])),
    }


if __name__ == "__main__":
    print(json.dumps(sbom(), indent=1))
