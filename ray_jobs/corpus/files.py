"""Which files the config's patterns name, on any filesystem that pyarrow opens, and their hashes."""

import hashlib
import re
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple, cast

import pyarrow.fs as pafs

from ray_jobs.core.errors import DataError
from ray_jobs.core.storage import Storage

_READ_BYTES = 2**20
_WILDCARDS = re.compile(r"[*?]")


class InputFile(NamedTuple):
    """One file: where it is for every node, and its name as the config spells it."""

    uri: str
    name: str

    @property
    def suffix(self) -> str:
        """The suffix in lower case, like ".md"."""
        return PurePosixPath(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """Return the open file, for sequential and random reading."""
        storage = Storage(self.uri)
        return cast(BinaryIO, storage.fs.open_input_file(storage.root))

    def read(self) -> bytes:
        """Return all bytes."""
        with self.open() as stream:
            return stream.read()

    def size(self) -> int:
        """Return the bytes."""
        storage = Storage(self.uri)
        return storage.fs.get_file_info(storage.root).size or 0

    def sha256(self) -> str:
        """Return the hash of the content, read piece by piece."""
        digest = hashlib.sha256()
        with self.open() as stream:
            while piece := stream.read(_READ_BYTES):
                digest.update(piece)
        return digest.hexdigest()


def find_files(patterns: list[str], *, suffixes: Collection[str], what: str) -> tuple[list[InputFile], list[str]]:
    """Return the files of the patterns, each once, and the names of those in folders that have another suffix.

    The order is that of the patterns, then of the names: it decides which of two repeats stays.

    Args:
        patterns: files, folders (taken with all below them) or globs with `*`, `?` and `**`.
        suffixes: those that can be read, in lower case.
        what: the config field, for messages.

    Raises:
        DataError: a pattern matches nothing, or names a file of another suffix.
    """
    found: dict[str, InputFile] = {}
    ignored = []
    for pattern in patterns:
        matches = list(_matches(pattern))
        if not matches:
            raise DataError(f"{what} {pattern!r}: no such file, and no file in such a folder or glob; give an existing path")
        for file in matches:
            if file.suffix in suffixes:
                found.setdefault(file.uri, file)
            elif file.name == pattern:
                raise DataError(f"{what} {pattern!r}: suffix {file.suffix!r} cannot be read; allowed are {', '.join(sorted(suffixes))}")
            else:
                ignored.append(file.name)
    return list(found.values()), ignored


def find_file(path: str, *, suffixes: Collection[str], what: str) -> InputFile:
    """Return the one file of a path.

    Raises:
        DataError: it does not exist, is a folder, or has another suffix.
    """
    files, _ = find_files([path], suffixes=suffixes, what=what)
    if [file.name for file in files] != [path]:
        raise DataError(f"{what} {path!r} is a folder or glob: give one file")
    return files[0]


def is_named(name: str, pattern: str) -> bool:
    """Return whether a pattern, as [data] has them, names a file: by a glob, by a folder it is in, or without a slash by its last part.

    Args:
        name: as `find_files` returns it.
    """
    if "/" not in pattern and re.fullmatch(_regex(pattern), name.rpartition("/")[2]):
        return True
    return bool(re.fullmatch(f"{_regex(pattern.rstrip('/'))}(/.*)?", name))


def _matches(pattern: str) -> Iterator[InputFile]:
    base, inside = _split(pattern)
    storage = Storage(base)
    kind = storage.fs.get_file_info(storage.root).type
    if kind == pafs.FileType.File and not inside:
        yield InputFile(storage.uri, pattern)
    if kind != pafs.FileType.Directory:
        return
    wanted = re.compile(_regex(inside or "**"))
    selector = pafs.FileSelector(storage.root, recursive=True)
    for path in sorted(info.path for info in storage.fs.get_file_info(selector) if info.is_file):
        relative = path.removeprefix(storage.root).lstrip("/")
        if wanted.fullmatch(relative) and not any(part.startswith(".") for part in relative.split("/")):
            yield InputFile(f"{storage.uri}/{relative}", f"{base.rstrip('/')}/{relative}")


def _split(pattern: str) -> tuple[str, str]:
    """Return the fixed folder before the first wildcard, and the rest."""
    wildcard = _WILDCARDS.search(pattern)
    if not wildcard:
        return pattern, ""
    base, _, _ = pattern[: wildcard.start()].rpartition("/")
    return (base or ("/" if pattern.startswith("/") else ".")), pattern[len(base) :].lstrip("/")


def _regex(glob: str) -> str:
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(token) or re.escape(token) for token in re.split(r"(\*\*/|\*\*|\*|\?)", glob))
