"""Who asks: tenants with their API keys, from a file or an environment variable, read again whenever they change.

Keys are random (256 bits), so that their plain sha256 is enough to keep: nobody finds a key by trying. A tenant may
have several, to change them without a gap. Logs and metrics know tenants by name and no key at all.

What a file says counts from the moment at which it is whole. `caravan keys` replaces it at once, and as a YAML document
with a beginning (---) and an end (...): one that has been cut is known by its missing end. A file without these marks
is taken once it has been the same for two looks. A file that is gone or cannot be read changes nothing; to revoke every
key, leave the tenants and take their keys out.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from cluster.config import PositiveInt, Strict
from deployments.config import AuthArgs, ConfigError, describe

log = logging.getLogger(__name__)

KEY_PREFIX = "cv-"
LOOK_AGAIN_S = 1.0  # how soon a changed file is noticed

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Tenant(Strict):
    """One user of the service, and what it may use."""

    name: Name = Field(description="as metrics and logs call it")
    keys: list[Digest] = Field(default=[], description="sha256 of its keys, in hex")
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="its share of a busy engine, compared with other tenants'"
    )
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(
        default=0, description="the most urgent priority it may ask for; lower is more urgent"
    )
    requests_per_minute: PositiveInt | None = Field(default=None, description="more get 429")
    cache_salt: Annotated[str, Field(pattern=r"^[!-~]{0,256}$")] = Field(
        default="", description="it shares cached keys and values only with tenants of the same salt"
    )
    operator: bool = Field(
        default=False, description="it may change the service itself: reset caches, load and unload adapters"
    )
    tokens_per_minute: PositiveInt | None = Field(default=None, description="prompt and output; beyond it, 429")


ANONYMOUS = Tenant.model_construct(name="anonymous", priority=-1000)  # everybody, where no keys are asked for


class KeyFile(Strict):
    """The file of keys, or the text in the environment variable."""

    tenants: Annotated[list[Tenant], Field(min_length=1)]


def parse_keys(text: str, source: str, *, any_key: bool = True) -> list[Tenant]:
    """Raises `ConfigError` that names `source` and what is wrong; with `any_key`, if there is not a single key too."""
    if _begins(text) and not _ends(text):
        raise ConfigError(f"{source}: begins with --- and does not end with ...: it has been cut")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not valid YAML: {str(error).splitlines()[0]}") from None
    if not content:
        raise ConfigError(f"{source}: holds no tenants: make a key with `caravan keys add NAME`")
    try:
        tenants = KeyFile.model_validate(content).tenants
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in describe(error))) from None
    names, keys = [t.name for t in tenants], [key for t in tenants for key in t.keys]
    for what, values in (("tenant", names), ("key", keys)):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{source}: {what} {twice[:12]} is there twice")
    if any_key and not keys:
        raise ConfigError(f"{source}: no tenant has a key: make one with `caravan keys add NAME`")
    return tenants


class KeyRing:
    """The tenants by key. Raises `ConfigError` if keys are asked for and none are to be had."""

    def __init__(self, auth: AuthArgs, on_change: Callable[[list[Tenant]], None] = lambda tenants: None) -> None:
        """`on_change` is told the tenants, now and whenever the file says something else."""
        self._on_change = on_change
        self._path = Path(auth.keys_file) if auth.keys_file else None
        self._taken: bytes | None = None  # what the file held when it was taken in, or refused
        self._growing: bytes | None = None  # what it held at the last look, if it may not be whole
        self._looked_at = 0.0
        self._tenants: list[Tenant] = []
        if self._path is not None:
            self._taken = self._content()
            self._tenants = self._read(self._path)
        elif auth.keys_env:
            self._tenants = parse_keys(os.environ.get(auth.keys_env, ""), f"auth.keys_env, {auth.keys_env}")
        self._on_change(self._tenants)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self._tenants)

    @property
    def tenants(self) -> list[Tenant]:
        self._look_again()
        return self._tenants

    def find(self, key: str) -> Tenant | None:
        """Whose key this is. Takes as long for a wrong key as for a right one."""
        digest, found = sha256(key), None
        for tenant in self.tenants:
            for known in tenant.keys:
                if hmac.compare_digest(digest, known):
                    found = tenant
        return found

    def _look_again(self) -> None:
        """Take in a changed file; one that cannot be read leaves the keys as they were, and says so."""
        now = time.monotonic()
        if self._path is None or now - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now
        content = self._content()
        if content == self._taken:  # by what is in it: sizes and times can be the same for another file
            return
        if content is not None and not content.startswith(b"---") and content != self._growing:
            self._growing = content
            return
        self._taken, self._growing = content, None
        try:
            self._tenants = self._read(self._path, any_key=False)
            self._on_change(self._tenants)
            log.info("API keys were read again: %d tenants", len(self._tenants))
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)

    def _content(self) -> bytes | None:
        assert self._path is not None
        try:
            return self._path.read_bytes()
        except OSError:
            return None

    @staticmethod
    def _read(path: Path, *, any_key: bool = True) -> list[Tenant]:
        source = f"auth.keys_file, {path}"
        try:
            return parse_keys(path.read_text("utf-8"), source, any_key=any_key)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read: {error}") from None


def _begins(text: str) -> bool:
    return text.startswith("---")


def _ends(text: str) -> bool:
    return text.rstrip().endswith("\n...")


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(path: Path, name: str, **settings: float | int | str | bool | None) -> str:
    """Make a key for a tenant, new or known, and put its digest into the file. Returns the key: it is kept nowhere.

    Raises `ConfigError` if the file or a setting is not valid.
    """
    entries = [t.model_dump(exclude_defaults=True) for t in KeyRing._read(path, any_key=False)] if path.exists() else []
    entry = next((e for e in entries if e["name"] == name), None)
    if entry is None:
        entry = {"name": name, "keys": []}
        entries.append(entry)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    entry["keys"] = [*entry.get("keys", []), sha256(key)]
    entry |= {name: value for name, value in settings.items() if value is not None}
    text = yaml.safe_dump({"tenants": entries}, sort_keys=False, explicit_start=True, explicit_end=True)
    parse_keys(text, str(path))
    with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8", delete=False) as temporary:
        temporary.write(text)
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).replace(path)  # at once: whoever reads it sees the old file or the new one
    return key
