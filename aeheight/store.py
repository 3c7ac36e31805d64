"""Folders and object stores through one factory: small objects, and the stores that Zarr writes.

A `Store` is only its URI, so that it travels to workers as text; the connection is opened where it
is used. Writes are atomic (an object is whole or absent) on a local disk as on S3.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url
from zarr.storage import ObjectStore

from aeheight.errors import InputError


@dataclass(frozen=True, slots=True)
class Store:
    """One folder, or one prefix of a bucket."""

    uri: str
    """Absolute path, or a URI such as `s3://bucket/prefix`, without a slash at the end."""

    @classmethod
    def at(cls, uri: str | Path) -> "Store":
        """The store of a path (made absolute) or URI."""
        text = str(uri).rstrip("/")
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        return cls(text if "://" in text else str(Path(text).absolute()))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return "://" not in self.uri

    def child(self, name: str) -> "Store":
        """A folder inside this one."""
        return Store(f"{self.uri}/{name}")

    def read(self, key: str) -> bytes:
        """A whole object.

        Raises:
            FileNotFoundError: there is none.
            OSError: the store cannot be reached.
        """
        with plain_errors(f"read {self.uri}/{key}"):
            self._need_folder()
            return bytes(obstore.get(_open(self.uri), key).bytes())

    def read_json(self, key: str) -> dict[str, Any]:
        """An object that aeheight wrote as JSON.

        Raises:
            FileNotFoundError: there is none.
            InputError: it is damaged.
        """
        try:
            found = json.loads(self.read(key))
        except ValueError as error:
            raise InputError(
                f"{self.uri}/{key} is damaged ({error}); remove it, or run with --overwrite"
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{self.uri}/{key} is damaged; remove it, or run with --overwrite")
        return found

    def write(self, key: str, data: bytes) -> None:
        """Put a whole object in place of whatever was there.

        Raises:
            OSError: the store cannot be written (a full disk, no right).
        """
        with plain_errors(f"write {self.uri}/{key}"):
            obstore.put(_open(self.uri), key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Put an object only where none is; whether it is there by this very call."""
        try:
            with plain_errors(f"write {self.uri}/{key}"):
                obstore.put(_open(self.uri), key, data, mode="create")
        except FileExistsError:
            # An answer lost on the way makes a retry meet our own object.
            return self.read(key) == data
        return True

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        try:
            with plain_errors(f"look for {self.uri}/{key}"):
                self._need_folder()
                obstore.head(_open(self.uri), key)
        except FileNotFoundError:
            return False
        return True

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Names of all objects below a folder, relative to this store."""
        if self.is_local and not Path(self.uri).exists():
            return
        with plain_errors(f"list {self.uri}/{prefix}"):
            for page in obstore.list(_open(self.uri), prefix or None):
                for entry in page:
                    yield entry["path"]

    def remove(self, prefix: str = "") -> None:
        """Delete an object, or every object below a folder."""
        keys = list(self.keys(prefix))
        if prefix and not keys and self.exists(prefix):
            keys = [prefix]
        with plain_errors(f"delete {self.uri}/{prefix}"):
            for start in range(0, len(keys), 1000):
                obstore.delete(_open(self.uri), keys[start : start + 1000])

    def _need_folder(self) -> None:
        """Looking for something makes no folder; only writing does."""
        if self.is_local and not Path(self.uri).exists():
            raise FileNotFoundError(self.uri)

    def zarr(self, *, read_only: bool = False) -> ObjectStore[Any]:
        """What Zarr opens."""
        return ObjectStore(_open(self.uri), read_only=read_only)


@lru_cache(maxsize=64)
def _open(uri: str) -> Any:
    if "://" not in uri:
        return LocalStore(uri, mkdir=True, automatic_cleanup=True)
    with plain_errors(f"open {uri}"):
        return from_url(uri)


@contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """Turn the object store's errors into Python's own, in one line that names the object."""
    try:
        yield
    except AlreadyExistsError as error:
        raise FileExistsError(f"cannot {doing}: it is already there") from error
    except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
        raise InputError(f"cannot {doing}: no right to; check the credentials") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"cannot {doing}: there is none") from error
    except (BaseError, OSError) as error:
        raise OSError(f"cannot {doing}: {str(error).splitlines()[0]}") from error
