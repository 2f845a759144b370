"""A folder on any filesystem that pyarrow opens: small atomic files, rows as JSONL or Parquet, model folders."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_jobs.core.errors import StorageError


def cache_folder() -> Path:
    """Return the folder for converted models and downloaded copies: $RAYSTILL_CACHE or ~/.cache/raystill."""
    return Path(os.environ.get("RAYSTILL_CACHE") or Path.home() / ".cache" / "raystill")


class Storage:
    """One folder, local or remote. Files appear whole or not at all; picklable.

    Args:
        uri: a path (made absolute, as Ray workers change directory) or a URI such as s3://bucket/folder.

    Raises:
        StorageError: pyarrow cannot open such a URI.
    """

    def __init__(self, uri: str):
        self.is_local = "://" not in uri or uri.startswith("file://")
        self.uri = str(Path(uri.removeprefix("file://")).expanduser().absolute()) if self.is_local else uri.rstrip("/")
        try:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise StorageError(f"storage {uri!r} cannot be opened: {error}; give a folder or a URI like s3://bucket/folder") from None

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.uri,)

    def sub(self, name: str) -> "Storage":
        """Return the folder `name` below this one."""
        return Storage(f"{self.uri}/{name}")

    def exists(self, name: str) -> bool:
        """Return whether a file or folder is there."""
        return self.fs.get_file_info(f"{self.root}/{name}").type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Return the names of the files and folders directly in here, sorted; [] where there is no folder."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def make(self) -> None:
        """Create the folder and prove that it can be written.

        Raises:
            StorageError: it cannot be created or written.
        """
        probe = ".write-probe"
        try:
            self.fs.create_dir(self.root, recursive=True)
            self.write_bytes(probe, b"")
            self.fs.delete_file(f"{self.root}/{probe}")
        except OSError as error:
            reason = error.__cause__ or error
            raise StorageError(f"storage {self.uri!r} cannot be written: {reason}; choose another [run] storage") from None

    def clear(self) -> None:
        """Delete the folder with all that is in it."""
        if self.fs.get_file_info(self.root).type != pafs.FileType.NotFound:
            self.fs.delete_dir(self.root)

    def delete(self, name: str) -> None:
        """Delete a file or folder, where it is there."""
        kind = self.fs.get_file_info(f"{self.root}/{name}").type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(f"{self.root}/{name}")
        elif kind != pafs.FileType.NotFound:
            self.fs.delete_file(f"{self.root}/{name}")

    def read_bytes(self, name: str) -> bytes:
        """Return a file's bytes."""
        with self.fs.open_input_stream(f"{self.root}/{name}") as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole: a reader sees the old one or the new one.

        Raises:
            StorageError: it cannot be written, as on a full disk; the old one is still there.
        """
        path = f"{self.root}/{name}"
        temporary = f"{path}.tmp-{os.getpid()}"
        try:
            self.fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self.fs.open_output_stream(temporary) as stream:
                stream.write(data)
            self.fs.move(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):  # what cannot be written may not be reached at all
                self.delete(f"{name}.tmp-{os.getpid()}")
            raise StorageError(f"{self.uri}/{name} cannot be written: {error}; make room, or choose another [run] storage") from error

    def read_json(self, name: str) -> Any:
        """Return the object of a JSON file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write an object as indented JSON."""
        self.write_bytes(name, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a JSONL file; a torn last line is left out.

        Raises:
            StorageError: an earlier line is not JSON.
        """
        rows = []
        lines = self.read_bytes(name).split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise StorageError(
                    f"{self.uri}/{name} line {number} is not JSON ({error}): the file was damaged; make its stage anew with --force"
                ) from None
        return rows

    def write_jsonl(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows as JSONL."""
        self.write_bytes(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def read_parquet(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a Parquet file.

        Raises:
            StorageError: it is none, or damaged.
        """
        content = self.read_bytes(name)
        try:
            return pq.read_table(io.BytesIO(content)).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise StorageError(f"{self.uri}/{name} is no Parquet file ({reason}): make its stage anew with --force") from None

    def write_parquet(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows as one Parquet file."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        self.write_bytes(name, buffer.getvalue())

    def upload(self, folder: Path, name: str) -> None:
        """Put a local folder here under `name`, replacing what was there."""
        staging = f"{self.root}/.{name}.tmp"
        self.delete(f".{name}.tmp")
        self.fs.create_dir(staging, recursive=True)
        pafs.copy_files(str(folder), staging, destination_filesystem=self.fs)
        self.delete(name)
        self.fs.move(staging, f"{self.root}/{name}") if self.is_local else self._move_folder(staging, name)

    def uploaded(self, name: str) -> bool:
        """Return whether a folder that `upload` put here is there, and whole: a remote one grows file by file."""
        return self.exists(name) and not self.exists(f".{name}.tmp")

    def _move_folder(self, staging: str, name: str) -> None:
        pafs.copy_files(staging, f"{self.root}/{name}", source_filesystem=self.fs, destination_filesystem=self.fs)
        self.fs.delete_dir(staging)

    def local(self, name: str) -> Path:
        """Return a local path of a folder in here: itself, or a downloaded copy keyed by its listing."""
        if self.is_local:
            return Path(self.root) / name
        return download(self, name)


def local_folder(uri: str) -> Path:
    """Return a local path of a folder given by a path or a URI: itself, or a downloaded copy."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return Storage(parent).local(name)


def download(storage: Storage, name: str) -> Path:
    """Return a cached local copy of a remote folder; a changed listing (path, size, time) makes a new copy."""
    infos = storage.fs.get_file_info(pafs.FileSelector(f"{storage.root}/{name}", recursive=True))
    listing = sorted((info.path, info.size, str(info.mtime)) for info in infos if info.is_file)
    key = hashlib.sha256(repr((storage.uri, name, listing)).encode()).hexdigest()[:16]
    target = cache_folder() / "downloads" / key
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent))
        pafs.copy_files(f"{storage.root}/{name}", str(staging), source_filesystem=storage.fs)
        replace_folder(staging, target)
    return target


def replace_folder(staging: Path, target: Path) -> None:
    """Move a finished folder into place; where another process was first, keep that one."""
    try:
        staging.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(staging)
