"""The names that stand for adapters, and what each of them stands for at this moment.

A name is looked up when a request comes: in the configuration, among those that operators have named, in
`model.adapter_dir`. What it leads to is an adapter's digest, so that a new version counts from the next request on, and
requests that are open go on with the one that they began with.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.config import ModelArgs
from cluster.errors import RequestRejected
from cluster.scheduling.sequence import AdapterRef
from deployments.errors import ApiError, bad_request
from model.adapters import NAME, AdapterError, AdapterFiles
from model.errors import CheckpointError
from model.weights import resolve_path

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.5  # how soon a gateway knows what another one was told


class AdapterClient(Protocol):
    """What engines do with adapters, and what gateways share of them."""

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Have an engine read it. Raises `RequestRejected` if it cannot be served."""
        ...

    async def named_adapters(self) -> Mapping[str, AdapterRef]:
        """What operators have named, on whatever gateway."""
        ...

    async def name_adapters(self, named: Mapping[str, AdapterRef]) -> None:
        """The same from now on, for all gateways."""
        ...


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter as a client calls it."""

    name: str
    ref: AdapterRef


class AdapterNames:
    """Of one gateway."""

    def __init__(self, model: ModelArgs, client: AdapterClient) -> None:
        self._model, self._client = model, client
        self._digests: dict[Path, tuple[tuple[tuple[int, int, int], ...], str]] = {}  # by the state of the files
        self._known: set[str] = set()  # digests that an engine has read
        self._runtime: Mapping[str, AdapterRef] = {}
        self._looked_at = float("-inf")

    @property
    def any(self) -> bool:
        """Whether adapters are served at all."""
        return self._model.num_adapters > 0

    async def find(self, name: str) -> Named | None:
        """What it stands for now; None if for nothing. Raises `ApiError` if that cannot be served."""
        if not self.any or NAME.fullmatch(name) is None:
            return None
        try:
            ref = await self._ref(name)
            if ref is None:
                return None
            if ref.digest not in self._known:
                await self._client.load_adapter(ref)
                self._known.add(ref.digest)
        except (CheckpointError, RequestRejected) as error:
            log.warning("adapter %s cannot be served: %s", name, error)
            raise bad_request(f"the adapter `{name}` cannot be served: {error}", "model", "adapter_error") from error
        return Named(name, ref)

    async def names(self) -> list[str]:
        """All there are, sorted; of the directory, what looks like an adapter."""
        if not self.any:
            return []
        found = {*self._model.adapters, *await self._named()}
        if self._model.adapter_dir is not None:
            found.update(await asyncio.to_thread(_listed, Path(self._model.adapter_dir)))
        return sorted(found)

    async def load(self, name: str, path: str, replace: bool) -> None:
        """Name one, once an engine has read it. Raises `ApiError`."""
        if not self.any:
            raise bad_request("this service has no room for adapters: set model.max_loaded_adapters")
        if NAME.fullmatch(name) is None:
            raise bad_request(f"lora_name: must match {NAME.pattern}", "lora_name")
        if name in (self._model.name, *self._model.aliases, *self._model.adapters):
            raise bad_request(f"lora_name: `{name}` is in the configuration already", "lora_name")
        named = dict(await self._client.named_adapters())
        if name in named and not replace:
            raise bad_request(f"lora_name: `{name}` is loaded already: unload it, or say load_inplace", "lora_name")
        try:
            ref = AdapterRef(await self._digest(resolve_path(path)), path)
            await self._client.load_adapter(ref)
        except (CheckpointError, RequestRejected) as error:
            raise bad_request(str(error), "lora_path", "adapter_error") from error
        await self._publish({**named, name: ref})

    async def unload(self, name: str) -> None:
        """Forget a name that was given at run time. Raises `ApiError` 404."""
        named = dict(await self._client.named_adapters())
        if named.pop(name, None) is None:
            raise ApiError(404, f"the adapter `{name[:200]}` was not loaded at run time", param="lora_name")
        await self._publish(named)

    async def _publish(self, named: Mapping[str, AdapterRef]) -> None:
        await self._client.name_adapters(named)
        self._runtime, self._looked_at = named, time.monotonic()

    async def _named(self) -> Mapping[str, AdapterRef]:
        if time.monotonic() - self._looked_at > LOOK_AGAIN_S:
            self._runtime, self._looked_at = await self._client.named_adapters(), time.monotonic()
        return self._runtime

    async def _ref(self, name: str) -> AdapterRef | None:
        if (path := self._model.adapters.get(name)) is not None:
            return AdapterRef(await self._digest(resolve_path(path)), path)
        if (ref := (await self._named()).get(name)) is not None:
            return ref
        if self._model.adapter_dir is None:
            return None
        found = await asyncio.to_thread(_in_directory, Path(self._model.adapter_dir), name)
        return AdapterRef(await self._digest(found), str(found)) if found is not None else None

    async def _digest(self, path: Path) -> str:
        """Read only if a file has changed."""
        files = await asyncio.to_thread(AdapterFiles, path)
        state = files.state()
        if (known := self._digests.get(path)) is None or known[0] != state:
            known = self._digests[path] = state, await asyncio.to_thread(files.digest)
        return known[1]


def _in_directory(directory: Path, name: str) -> Path | None:
    """The adapter of this name there, if there is one. Raises `AdapterError` if a link leads elsewhere."""
    path = next((p for p in (directory / name, directory / f"{name}.gguf") if p.exists()), None)
    if path is None:
        return None
    files, inside = AdapterFiles(path), directory.resolve()
    for file in (path, files.weights, files.config):
        if file is not None and not file.resolve().is_relative_to(inside):
            raise AdapterError(f"adapter {path}: a link leads out of model.adapter_dir")
    return path


def _listed(directory: Path) -> list[str]:
    """Names of what looks like an adapter."""
    names = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = path.name.removesuffix(".gguf")
        if NAME.fullmatch(name) is None:
            continue
        try:
            if _in_directory(directory, name) is not None:
                names.append(name)
        except (CheckpointError, OSError):
            continue
    return names


def configured(model: ModelArgs) -> list[Named]:
    """Those of the configuration, as they are now. Raises `AdapterError`."""
    named = []
    for name, path in model.adapters.items():
        named.append(Named(name, AdapterRef(AdapterFiles(resolve_path(path)).digest(), path)))
    return named
