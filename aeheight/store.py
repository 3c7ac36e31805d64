"""Folders and object stores through one factory: small objects, and the stores that Zarr writes.

A `Store` is only its URI (and how it may be read), so that it travels to workers as text; the
connection is opened where it is used. Writes are atomic (an object is whole or absent) on a local
disk as on S3. What may pass (a store that is away, a body that breaks off) is tried again for two
minutes; what a user must mend (credentials, a bucket's name) fails at once.
"""

import asyncio
import builtins
import json
import os
import re
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from aeheight.errors import InputError
from aeheight.settings import AccessSettings

T = TypeVar("T")

_PATIENCE, _FIRST_PATIENCE = timedelta(seconds=120), timedelta(seconds=15)
"""How long a store that is away is asked again: in the midst of work, and at first contact."""
_UPLOADS = 5
"""Times that an object is sent whose upload in parts is said to be missing."""
_BACKOFF: dict[str, Any] = {
    "init_backoff": timedelta(milliseconds=200),
    "max_backoff": timedelta(seconds=5),
    "base": 3,
}
_TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "10min"}
"""A connection that stalls is given up soon; a shard of 100 MB may come slowly."""
_S3_VARIABLES = (
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN where they have one), AWS_REGION, "
    "and AWS_ENDPOINT_URL where the store is not Amazon's"
)
_VARIABLES = {
    "s3": _S3_VARIABLES,
    "s3a": _S3_VARIABLES,
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (the path of a key file)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_CREDENTIALS = {
    "s3": (
        "AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_METADATA_ENDPOINT",
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN", "GOOGLE_SKIP_SIGNATURE",
    ),
}  # fmt: skip
"""Variables that show where credentials come from; without any, the cloud's machine is asked."""
_METADATA = {"s3": "169.254.169.254", "gs": "metadata.google.internal"}
_REMEDIES = {
    "NoSuchBucket": "create the bucket, or mend its name, or AWS_ENDPOINT_URL",
    "ExpiredToken": "the credentials have run out: renew {variables}",
    "RequestTimeTooSkewed": "set this machine's clock",
    "AuthorizationHeaderMalformed": "set AWS_REGION (or `access: {{region: ...}}`) to the bucket's",
}
_PUBLIC = "or, to read a public source, set `access: {{anonymous: true}}`"


@dataclass(frozen=True, slots=True)
class Store:
    """One folder, or one prefix of a bucket."""

    uri: str
    """Absolute path, or a URI such as `s3://bucket/prefix`, without a slash at the end."""
    access: AccessSettings | None = None
    """How a source lets readers in; None: with the credentials of the environment."""

    @classmethod
    def at(cls, uri: str | Path, access: AccessSettings | None = None) -> "Store":
        """The store of a path (made absolute) or URI."""
        text = str(uri).rstrip("/")
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        access = None if access == AccessSettings() else access
        return cls(text if "://" in text else str(Path(text).absolute()), access)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return "://" not in self.uri

    def child(self, name: str) -> "Store":
        """A folder inside this one."""
        return replace(self, uri=f"{self.uri}/{name}")

    def read(self, key: str) -> bytes:
        """A whole object.

        Raises:
            FileNotFoundError: there is none.
            InputError: no such bucket, or no right to read it.
            OSError: the store cannot be reached.
        """
        with plain_errors(f"read {self.uri}/{key}"):
            self._need_folder()
            return _again(lambda: bytes(obstore.get(_open(self), key).bytes()))

    def end(self, key: str, size: int) -> bytes:
        """The last bytes of an object; errors as in `read`."""
        options: Any = {"range": {"suffix": size}}
        with plain_errors(f"read {self.uri}/{key}"):
            self._need_folder()
            return _again(lambda: bytes(obstore.get(_open(self), key, options=options).bytes()))

    def parts(self, key: str, starts: Sequence[int], sizes: Sequence[int]) -> Sequence[Any]:
        """Parts of an object, as buffers; errors as in `read`. Near ones come in one request."""
        if not starts:
            return []
        with plain_errors(f"read {self.uri}/{key}"):
            return _again(
                lambda: obstore.get_ranges(_open(self), key, starts=starts, lengths=sizes)
            )

    def read_json(self, key: str) -> dict[str, Any]:
        """An object that aeheight wrote as JSON.

        Raises:
            FileNotFoundError: there is none.
            InputError: it is damaged.
        """
        data = self.read(key)
        try:
            found = json.loads(data)
        except ValueError as error:
            raise InputError(
                f"{self.uri}/{key} is damaged ({error}); remove it, or run with --overwrite"
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{self.uri}/{key} is damaged; remove it, or run with --overwrite")
        return found

    def pieces(self, key: str, size: int = 1 << 24) -> Iterator[bytes]:
        """A whole object from first to last byte, at most `size` at once; errors as in `read`."""
        with plain_errors(f"read {self.uri}/{key}"):
            self._need_folder()
            left = int(_again(lambda: obstore.head(_open(self), key))["size"])
        for start in range(0, left, size):
            (part,) = self.parts(key, [start], [min(size, left - start)])
            yield bytes(part)

    def write(self, key: str, data: bytes | Path) -> None:
        """Put a whole object (or a file of this machine) in place of whatever was there.

        Raises:
            OSError: the store cannot be written (a full disk, no right).
        """
        with plain_errors(f"write {self.uri}/{key}"):
            for left in reversed(range(_UPLOADS)):
                try:
                    _again(lambda: obstore.put(_open(self), key, data))
                    return
                except FileNotFoundError:
                    # A large object goes in parts; where the answer to the last request breaks off,
                    # obstore aborts an upload that is over.
                    if not left:
                        raise

    def create(self, key: str, data: bytes) -> bool:
        """Put an object only where none is; whether it is there by this very call."""
        try:
            with plain_errors(f"write {self.uri}/{key}"):
                _again(lambda: obstore.put(_open(self), key, data, mode="create"))
        except FileExistsError:
            # An answer lost on the way makes a retry meet our own object.
            try:
                return self.read(key) == data
            except FileNotFoundError:  # gone again: it was another's
                return False
        return True

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        try:
            with plain_errors(f"look for {self.uri}/{key}"):
                self._need_folder()
                _again(lambda: obstore.head(_open(self), key))
        except FileNotFoundError:
            return False
        return True

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Names of all objects below a folder, relative to this store."""
        if self.is_local and not Path(self.uri).exists():
            return
        with plain_errors(f"list {self.uri}/{prefix}"):
            yield from _listed(_open(self), prefix)

    def copy(self, source: str, target: str) -> None:
        """Make one object the same as another, atomically, without moving its bytes through here.

        Raises:
            FileNotFoundError: there is no such source.
            OSError: the store cannot be written.
        """
        with plain_errors(f"copy {self.uri}/{source} to {target}"):
            self._need_folder()
            _again(lambda: obstore.copy(_open(self), source, target))

    def remove(self, prefix: str = "") -> None:
        """Delete an object, or every object below a folder."""
        keys = list(self.keys(prefix))
        if prefix and not keys and self.exists(prefix):
            keys = [prefix]
        self.remove_many(keys)

    def remove_many(self, keys: Sequence[str]) -> None:
        """Delete just these objects, a thousand in one request; those not there are passed over."""
        if self.is_local and not Path(self.uri).exists():
            return
        with plain_errors(f"delete from {self.uri}"):
            for start in range(0, len(keys), 1000):
                _delete(_open(self), keys[start : start + 1000])

    def _need_folder(self) -> None:
        """Looking for something makes no folder; only writing does."""
        if self.is_local and not Path(self.uri).exists():
            raise FileNotFoundError(self.uri)

    def zarr(self, *, read_only: bool = False) -> ObjectStore[Any]:
        """What Zarr opens."""
        return _ZarrStore(_open(self), read_only=read_only)


class _ZarrStore(ObjectStore[Any]):
    """Zarr's own, but what breaks off is tried again, and folders are deleted in bulk."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await _again_async(lambda: super(_ZarrStore, self).get(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> builtins.list[Buffer | None]:
        ranges = [*key_ranges]
        parent: Any = super()
        return await _again_async(lambda: parent.get_partial_values(prototype, ranges))

    async def exists(self, key: str) -> bool:
        return await _again_async(lambda: super(_ZarrStore, self).exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        await _again_async(lambda: super(_ZarrStore, self).set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await _again_async(lambda: super(_ZarrStore, self).set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        await _again_async(lambda: super(_ZarrStore, self).delete(key))

    async def delete_dir(self, prefix: str) -> None:
        self._check_writable()
        keys = await asyncio.to_thread(_listed, self.store, prefix.strip("/"))
        for start in range(0, len(keys), 1000):
            await asyncio.to_thread(_delete, self.store, keys[start : start + 1000])

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        for key in await asyncio.to_thread(_listed, self.store, prefix):
            yield key

    def list(self) -> AsyncGenerator[str, None]:
        return self.list_prefix("")

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        async def names() -> builtins.list[str]:
            listed = super(_ZarrStore, self).list_dir(prefix)
            return [name async for name in listed]

        for name in await _again_async(names):
            yield name


def _listed(opened: Any, prefix: str) -> list[str]:
    """Names of all objects below a folder."""
    return _again(
        lambda: [
            entry["path"]
            for page in obstore.list(opened, prefix or None, chunk_size=1000)
            for entry in page
        ]
    )


def _delete(opened: Any, keys: Sequence[str]) -> None:
    try:
        _again(lambda: obstore.delete(opened, keys))
    except FileNotFoundError as error:  # not from S3, which passes over what is not there
        if "NoSuchBucket" in str(error):
            raise
        for key in keys:
            with suppress(FileNotFoundError):
                obstore.delete(opened, key)


class _Trials:
    """Obstore tries again itself what it knows to be safe; here are the rest.

    Those are an answer that breaks off where it is no object's body (a listing, a refusal), and a
    put-if-absent that times out. Each may be repeated: a put is the same put.
    """

    def __init__(self, patience: timedelta) -> None:
        self._end = time.monotonic() + patience.total_seconds()
        self._pause: float = _BACKOFF["init_backoff"].total_seconds()

    def pause(self, error: GenericError) -> float:
        """Seconds to wait, or the error, where the server has answered or time is up."""
        text = str(error)
        answered = any(word in text for word in ("status code", "builder error", "LocalFileSystem"))
        if answered or time.monotonic() > self._end:
            raise error
        pause = self._pause
        self._pause = min(pause * _BACKOFF["base"], _BACKOFF["max_backoff"].total_seconds())
        return pause


def _again(call: Callable[[], T], patience: timedelta = _PATIENCE) -> T:
    trials = _Trials(patience)
    while True:
        try:
            return call()
        except GenericError as error:
            time.sleep(trials.pause(error))


async def _again_async(call: Callable[[], Awaitable[T]]) -> T:
    trials = _Trials(_PATIENCE)
    while True:
        try:
            return await call()
        except GenericError as error:
            await asyncio.sleep(trials.pause(error))


@lru_cache(maxsize=64)
def _open(store: Store) -> Any:
    if store.is_local:
        return LocalStore(store.uri, mkdir=True, automatic_cleanup=True)
    scheme, _, rest = store.uri.partition("://")
    # A bucket is met once; where the path holds more than the bucket, the whole of it is.
    bucket = rest.partition("/")[0] if scheme in _METADATA else rest
    if scheme != "memory":
        _meet(f"{scheme}://{bucket}", store.access)
    with plain_errors(f"open {store.uri}"):
        return _connect(store.uri, store.access, _PATIENCE)


def _connect(uri: str, access: AccessSettings | None, patience: timedelta) -> Any:
    if uri.startswith("memory://"):
        return from_url(uri)
    scheme, access = uri.partition("://")[0], access or AccessSettings()
    # The web knows no signatures, and obstore takes no setting for it.
    signed = not scheme.startswith("http")
    config: Any = {"skip_signature": True} if access.anonymous and signed else {}
    client: Any = dict(_TIMEOUTS)
    if scheme.startswith("s3"):
        config |= {"request_payer": True} if access.requester_pays else {}
        config |= {"region": access.region} if access.region else {}
        endpoint = s3_endpoint()
        if endpoint:
            config["endpoint"], client["allow_http"] = endpoint, endpoint.startswith("http://")
    if scheme == "http":
        client["allow_http"] = True
    if scheme == "gs" and access.requester_pays:
        client["default_headers"] = {"x-goog-user-project": paying_project()}
    retries: Any = {"max_retries": 1000, "retry_timeout": patience, "backoff": _BACKOFF}
    return from_url(uri, config=config or None, client_options=client, retry_config=retries)


def s3_endpoint() -> str | None:
    """Address of an S3 store that is not Amazon's, from the usual variables."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name].rstrip("/") for name in names if os.environ.get(name)), None)


def paying_project() -> str:
    """The Google project that pays for reading.

    Raises:
        InputError: the environment does not name it.
    """
    project = os.environ.get("GOOGLE_CLOUD_PROJECT")
    if not project:
        raise InputError("access.requester_pays: set GOOGLE_CLOUD_PROJECT to the project that pays")
    return project


@lru_cache(maxsize=64)
def _meet(bucket: str, access: AccessSettings | None) -> None:
    """Refuse early what no patience would mend: no credentials, wrong ones, no bucket, no store.

    Raises:
        InputError: what the user must mend.
        OSError: nothing answers.
    """
    doing = f"open {bucket}"
    if not (access and access.anonymous):
        _need_credentials(bucket)
    try:
        with plain_errors(doing):
            first = _connect(bucket, access, _FIRST_PATIENCE)
            _again(lambda: obstore.get(first, "aeheight-looks-for-the-bucket"), _FIRST_PATIENCE)
    except FileNotFoundError:
        return  # the bucket is there
    except InputError as error:
        # Without the right to list, a store says of an absent object that it is forbidden.
        if "AccessDenied" not in str(error):
            raise


def _need_credentials(bucket: str) -> None:
    """Object stores would ask for two minutes for a cloud's metadata where there is no cloud."""
    scheme = bucket.partition("://")[0].replace("s3a", "s3")
    if scheme not in _METADATA or any(os.environ.get(name) for name in _CREDENTIALS[scheme]):
        return
    login = Path.home() / ".config/gcloud/application_default_credentials.json"
    if scheme == "gs" and login.exists():
        return
    if scheme == "gs" or os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        with suppress(OSError), socket.create_connection((_METADATA[scheme], 80), timeout=1):
            return
    profiles = "; profiles of ~/.aws are not read: export theirs" if scheme == "s3" else ""
    raise InputError(
        f"cannot open {bucket}: there are no credentials; set {_VARIABLES[scheme]}{profiles}; "
        + _PUBLIC.format()
    )


@contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """Turn the object store's errors into Python's own, in one line that names the object."""
    try:
        yield
    except AlreadyExistsError as error:
        raise FileExistsError(f"cannot {doing}: it is already there") from error
    except InputError:
        raise
    except (BaseError, OSError) as error:
        raise _plain(doing, error) from error


def _plain(doing: str, error: Exception) -> Exception:
    text = str(error)
    status, code = (_first(r, text) for r in (r"status code: (\d{3}[ \w]*)", r"<Code>(\w+)</Code>"))
    said = " ".join(filter(None, [status, code]))
    if "redirect without LOCATION" in text:
        code, said = "AuthorizationHeaderMalformed", "the bucket lies in another region"
    if "/latest/api/token" in text or "/latest/meta-data" in text:
        said = "there are no credentials, and this machine's role gives none"
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
    if refused or code in _REMEDIES or status[:3] in ("401", "403") or "this machine" in said:
        return InputError(f"cannot {doing}: {said or 'no right to'}; {_remedy(doing, code)}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"cannot {doing}: there is none")
    if "Unable to recognise URL" in text:
        return InputError(f"cannot {doing}: no such kind of store; name a folder, or s3:, gs:, az:")
    hint = "; is the store up, and its address right?"
    asks = "error sending request" in text and hint not in text
    return OSError(f"cannot {doing}: {text.splitlines()[0].strip()}" + hint * asks)


def _remedy(doing: str, code: str) -> str:
    scheme = _first(r"(\w+)://", doing)
    variables = _VARIABLES.get(scheme, "the credentials")
    if not scheme:
        return "check the rights of the folder"
    return _REMEDIES.get(code, "check {variables}; " + _PUBLIC).format(variables=variables)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""
