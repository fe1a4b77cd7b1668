"""Which Caravan this is."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("caravan")
    except PackageNotFoundError:
        return "unknown"
