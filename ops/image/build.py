"""`make image`: builds the image with whatever is there, and on a Debian without a registry its base too.

buildah is taken first, for it needs no daemon; as root it works inside a container too (`--isolation chroot`).
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[2]
UPSTREAM = "docker.io/library/python:3.11-slim-bookworm"
LOCAL_BASE = "localhost/caravan-base:bookworm"
DEBIAN, MIRROR = "bookworm", "http://deb.debian.org/debian"


class ImageError(Exception):
    """The image cannot be built here; the message says what to do."""


def main(
    target: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    tag: Annotated[str, typer.Option(help="name of the image")] = "",
    base: Annotated[
        str, typer.Option(help="image to build on; debootstrap: make one from Debian's packages")
    ] = UPSTREAM,
    own_pip: Annotated[bool, typer.Option(help="let the build's pip use the configuration of this machine's")] = True,
    option: Annotated[list[str] | None, typer.Option(help="one more word for the builder; repeat for more")] = None,
) -> None:
    """Build the image and say how large it is."""
    tag = tag or f"caravan:{target}"
    try:
        builder = find_builder()
        if base == "debootstrap":
            base = LOCAL_BASE
            make_base(builder)
        with tempfile.TemporaryDirectory(prefix="caravan-image") as directory:
            pip_conf, volumes = pip_settings(Path(directory)) if own_pip and builder != "docker" else (None, [])
            command = build_command(builder, target, tag, base, pip_conf, [*volumes, *(option or [])])
            if subprocess.run(command, cwd=ROOT).returncode:
                raise ImageError(
                    f"{builder} could not build it; without a registry: make image BASE=debootstrap, as root"
                )
        typer.echo(f"{tag}: {size_bytes(builder, tag) / 1e9:.2f} GB")
    except ImageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def find_builder() -> str:
    for name in ("buildah", "podman", "docker"):
        if shutil.which(name):
            return name
    raise ImageError("there is none of buildah, podman, docker: install one (Debian: apt-get install buildah)")


def build_command(
    builder: str, target: str, tag: str, base: str, pip_conf: Path | None, options: list[str]
) -> list[str]:
    """Of any of the three: they differ in little."""
    isolation = ["--isolation", "chroot"] if builder == "buildah" and os.geteuid() == 0 else []
    layers = ["--layers"] if builder == "buildah" else []  # the others keep them anyway
    form = ["--format", "docker"] if builder != "docker" else []  # OCI's format has no HEALTHCHECK
    ignored = ["--ignorefile", "ops/image/Containerfile.dockerignore"] if builder != "docker" else []  # which finds it
    secret = ["--secret", f"id=pip,src={pip_conf}"] if pip_conf else []
    return [
        builder, "build", *layers, *ignored, *isolation, *form, *secret, *options,
        "--build-arg", f"BASE={base}", "--target", target,
        "--tag", tag, "--file", str(ROOT / "ops/image/Containerfile"), str(ROOT),
    ]  # fmt: skip


def pip_settings(directory: Path) -> tuple[Path, list[str]]:
    """This machine's pip configuration as a file, and what of the machine it refers to as volumes.

    It is a secret of the build: an index with a password in its address does not get into a layer.
    """
    settings: dict[str, str] = {}
    for line in _run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = str(ast.literal_eval(value)).replace("\\n", "\n")
    volumes: dict[str, str] = {}
    for key, value in settings.items():
        words = value.split()
        for i, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_dir():
                place = path.parent if path.name == "simple" else path  # an index, whose files lie beside it
                volumes[str(place)] = str(place)
            elif path.is_absolute() and path.is_file():  # not where the image may have one of its own
                volumes[str(path)] = words[i] = f"/run/pip/{path.name}"
        settings[key] = "\n  ".join(words)
    conf = directory / "pip.conf"
    conf.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()), "utf-8")
    return conf, [f"--volume={here}:{there}:ro" for here, there in volumes.items()]


def make_base(builder: str) -> None:
    """Debian with Python, if it is not there yet."""
    if builder == "docker":
        raise ImageError("BASE=debootstrap needs buildah or podman")
    if not subprocess.run([builder, "inspect", LOCAL_BASE], capture_output=True).returncode:
        return
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise ImageError("BASE=debootstrap needs root and the Debian package debootstrap")
    with tempfile.TemporaryDirectory(prefix="caravan-base") as directory:
        root = Path(directory) / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        _run("debootstrap", "--variant=minbase", packages, DEBIAN, str(root), MIRROR)
        archive = Path(directory) / "base.tar"
        _run("tar", "-C", str(root), "-cf", str(archive), ".")
        if builder == "podman":
            _run("podman", "import", str(archive), LOCAL_BASE)
        else:
            made = _run("buildah", "from", "scratch")
            _run("buildah", "add", made, str(archive), "/")
            _run("buildah", "commit", "--rm", made, LOCAL_BASE)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"{' '.join(command[:3])} ...: {done.stderr.strip()[-500:] or done.stdout.strip()[-500:]}")
    return done.stdout.strip()


def size_bytes(builder: str, tag: str) -> int:
    """Of all its layers, as they are stored."""
    if builder == "docker":
        return int(_run("docker", "image", "inspect", "--format", "{{.Size}}", tag))
    listed = json.loads(_run(builder, "images", "--json", tag))
    shown = str(listed[0]["size"])
    number, _, unit = shown.partition(" ")
    return int(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper() or "B"])


if __name__ == "__main__":
    typer.run(main)
