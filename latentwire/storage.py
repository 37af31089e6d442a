"""Places on this machine or in an object store, behind the few methods of pathlib that are needed.

A place is a :class:`pathlib.Path` (local disk, NFS) or a :class:`Remote`: a URI that pyarrow reads
(``s3://…``, ``gs://…``), with the credentials that pyarrow finds (a role, the environment, a
profile). Nothing is ever seen half written: a local file is written aside and renamed, and an
object is there once all of it has arrived.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from latentwire.addresses import expanded, refuse_secrets
from latentwire.errors import UserError


class StorageError(UserError):
    """A place that cannot be read or written; the message names it, the reason and a next move."""


@dataclass(frozen=True)
class Remote:
    """A path in an object store."""

    uri: str

    def __post_init__(self) -> None:
        refuse_secrets(self.uri)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Remote:
        # Options of the file system follow the path: s3://bucket/path?region=…
        address, mark, query = self.uri.partition("?")
        return Remote(f"{address.rstrip('/')}/{name}{mark}{query}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.uri.partition("?")[0]).name

    @property
    def parent(self) -> Remote:
        """The path without its last part."""
        address, mark, query = self.uri.partition("?")
        return Remote(f"{address.rstrip('/').rpartition('/')[0]}{mark}{query}")

    def with_name(self, name: str) -> Remote:
        """A path beside this one."""
        return self.parent / name

    def absolute(self) -> Remote:
        """Return itself."""
        return self

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Do nothing: an object store has no directories of its own."""

    def exists(self) -> bool:
        """Return whether there is a file, or anything below.

        Raises :class:`StorageError` where the store does not say.
        """
        return self._type() != fs.FileType.NotFound

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return self._type() == fs.FileType.File

    def is_dir(self) -> bool:
        """Return whether there is anything below."""
        return self._type() == fs.FileType.Directory

    def _type(self) -> fs.FileType:
        with explained(self):
            system, path = at(self)
            return system.get_file_info(path).type

    def read_bytes(self) -> bytes:
        """Return the whole file. Raises :class:`StorageError`."""
        with explained(self):
            system, path = at(self)
            with system.open_input_stream(path) as stream:
                return stream.readall()

    def read_text(self) -> str:
        """Return the whole file as UTF-8. Raises :class:`StorageError`."""
        return self.read_bytes().decode("utf-8")


Place = Path | Remote


def place(address: str | Place) -> Place:
    """Return a path on this machine, or in the store that a URI names.

    Raises :class:`ValueError`.
    """
    if isinstance(address, Path | Remote):
        return address
    address = expanded(address)
    if address.startswith("file://"):
        return Path(unquote(urlsplit(address).path))
    return Remote(address) if "://" in address else Path(address)


def at(where: Place) -> tuple[fs.FileSystem, str]:
    """Return pyarrow's file system for a place, and the path there."""
    if isinstance(where, Path):
        return fs.LocalFileSystem(), str(where)
    # s3://bucket/path?options → s3, bucket/path, options
    scheme, _, rest = where.uri.partition("://")
    address, _, query = rest.partition("?")
    return _system(scheme, address.partition("/")[0], query), address


@functools.lru_cache(maxsize=16)
def _system(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    """Return a file system, which keeps its connections.

    Making one looks for credentials, which takes a second where there are none.
    """
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}{'?' if query else ''}{query}")[0]


REASONS = {
    r"ACCESS_DENIED|HTTP status 40[13]|SignatureDoesNotMatch|InvalidAccessKeyId": (
        "access is denied: give every node's role or AWS_ACCESS_KEY_ID the right to read, write and list there"
    ),
    r"NO_SUCH_BUCKET|NoSuchBucket|does not exist": (
        "there is no such bucket or file: make it, or name another"
    ),
    r"NETWORK_CONNECTION|REQUEST_TIMEOUT|[Tt]imed? ?out|curlCode|SERVICE_UNAVAILABLE|SLOW_DOWN": (
        "it does not answer: check the network and AWS_ENDPOINT_URL"
    ),
    r"[Tt]runcated compressed|inflate failed|decompress failed": (
        "it is cut, or not compressed as its name says: fetch it anew"
    ),
    r"[Uu]nrecognized filesystem|Cannot parse URI": (
        "pyarrow does not know such a URI: use s3://, gs:// or a directory"
    ),
}
"""Pattern in pyarrow's messages → what it means and what to do."""


@contextlib.contextmanager
def explained(where: object, doing: str = "read") -> Iterator[None]:
    """Turn pyarrow's errors into a :class:`StorageError`.

    It names the place, the reason and the next move.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        reasons = [reason for pattern, reason in REASONS.items() if re.search(pattern, text)]
        reason = reasons[0] if reasons else "see the reason"
        raise StorageError(
            f"{where} cannot be {doing}; {reason}, then give the same command again (a sweep: "
            f"--resume): what is complete is kept ({text[:300]})"
        ) from error


# -------------------------------------------------------------------------------------------- files


def write(where: Place, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a local file and put it in its place, whole or not at all; its directory is made.

    That holds whoever else writes the same one.
    """
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
        # In the same directory: only within one file system does a rename happen at once.
        aside = where.with_name(f".{where.name}.part-{uuid.uuid4().hex[:8]}")
        try:
            fill(aside)
            aside.rename(where)
        finally:
            aside.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / where.name
        fill(file)
        upload(file, where)


def write_text(where: Place, text: str) -> None:
    """Write a file of text, by :func:`write`."""
    write(where, lambda file: file.write_text(text, encoding="utf-8"))


def upload(file: Path, where: Remote) -> None:
    """Put a local file into the store.

    Raises :class:`StorageError`; then nothing is there, or the file that was there before.
    """
    with explained(where, "written"):
        system, path = at(where)
        here = fs.LocalFileSystem()
        fs.copy_files(str(file), path, source_filesystem=here, destination_filesystem=system)


@contextlib.contextmanager
def local(where: Place) -> Iterator[Path]:
    """Yield a file or directory as one on this machine: itself, or a copy that the block has."""
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / where.name
        with explained(where):
            system, path = at(where)
            if where.is_dir():
                target.mkdir()
            here = fs.LocalFileSystem()
            fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=here)
        yield target


@contextlib.contextmanager
def directory(where: Place, last: str) -> Iterator[Path]:
    """Yield a directory for the block to make; in a store its file ``last`` arrives last.

    That file makes the directory complete.
    """
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / where.name
        yield target
        files = [file for file in target.rglob("*") if file.is_file()]
        # False sorts before True: ``last`` comes last.
        for file in sorted(files, key=lambda file: file.name == last):
            upload(file, where / file.relative_to(target).as_posix())


def children(where: Place) -> list[Place]:
    """List what stands directly in a directory, by name; nothing where there is none.

    Raises :class:`StorageError`.
    """
    if isinstance(where, Path):
        return [*sorted(where.iterdir())] if where.is_dir() else []
    with explained(where):
        system, path = at(where)
        infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in infos)
    return [where / name for name in names]


def files_below(where: Place) -> dict[str, int]:
    """Return the bytes of every file in a directory, by its path below.

    A file that goes away meanwhile counts nothing.
    """
    with explained(where):
        system, path = at(where)
        infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    # Paths in the store begin with the directory's own, and a slash.
    start = len(path.rstrip("/")) + 1
    return {info.path[start:]: info.size or 0 for info in infos if info.type == fs.FileType.File}


def text_if_there(where: Place) -> str | None:
    """Return a file's text; ``None`` where there is none, or none any more.

    Raises :class:`StorageError`.
    """
    try:
        return where.read_text()
    except (FileNotFoundError, StorageError):
        # A StorageError says that there is nothing, or that the store failed: ask which.
        if where.exists():
            raise
        return None


def delete(where: Place) -> None:
    """Delete a file; nothing where there is none, or none any more.

    Raises :class:`StorageError`.
    """
    if isinstance(where, Path):
        where.unlink(missing_ok=True)
    elif where.is_file():
        system, path = at(where)
        # Another process may delete it between the question and this.
        try:
            with explained(where, "deleted"):
                system.delete_file(path)
        except StorageError:
            if where.is_file():
                raise


def delete_directory(where: Remote) -> None:
    """Delete the marker that a store keeps of a directory whose files are gone.

    Raises :class:`StorageError`.
    """
    with explained(where, "deleted"):
        system, path = at(where)
        system.delete_dir(path)


def rename(where: Place, name: str) -> None:
    """Give a file or directory another name; in a store it is copied first."""
    if isinstance(where, Path):
        where.rename(where.with_name(name))
        return
    with explained(where, "renamed"):
        system, path = at(where)
        _, target = at(where.with_name(name))
        fs.copy_files(path, target, source_filesystem=system, destination_filesystem=system)
        (system.delete_dir if where.is_dir() else system.delete_file)(path)


# ------------------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def opened(where: Place) -> Iterator[Any]:
    """Yield a file's bytes as a stream. Raises :class:`StorageError`."""
    with explained(where):
        system, path = at(where)
        with system.open_input_stream(path) as stream:
            yield stream


def size(where: Place) -> int:
    """Return the bytes of a file. Raises :class:`StorageError`."""
    with explained(where):
        system, path = at(where)
        return int(system.get_file_info(path).size or 0)


def sha256(where: Place) -> str:
    """Return the hash of a file's bytes, in hex. Raises :class:`StorageError`."""
    with opened(where) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_parquet(where: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's rows.

    ``columns``: ``None`` for all. Raises :class:`StorageError`.
    """
    with explained(where):
        system, path = at(where)
        return pq.read_table(
            path, columns=None if columns is None else list(columns), filesystem=system
        )


def read_footer(where: Place) -> pq.FileMetaData:
    """Return a Parquet file's metadata. Raises :class:`StorageError`."""
    with explained(where):
        system, path = at(where)
        return pq.read_metadata(path, filesystem=system)
