"""Whose word a kept target is: a name for the teacher that changes with any of its weights, and for each row it is asked about.

Shapes: B rows, T positions.
"""

import hashlib
import json
from pathlib import Path

from ray_jobs.core.storage import Storage, cache_folder
from ray_jobs.training.batches import IGNORE, Batch

_DECIDING = ("*.safetensors", "config.json", "adapter_config.json")


def teacher_identity(folder: str | Path, adapter: str | Path | None = None, *, quantization: str = "none", dtype: str) -> str:
    """Return a hash of all that decides a teacher's hidden states: files' contents, not their names.

    Args:
        folder: the model's, local.
        adapter: its PEFT folder, local.
        quantization: how its linear layers are stored.
        dtype: type of its matrix products.
    """
    parts = [[_content(file) for file in _files(Path(each))] for each in (folder, adapter) if each is not None]
    return hashlib.sha256(json.dumps([parts, quantization, dtype]).encode()).hexdigest()


def row_keys(identity: str, batch: Batch) -> list[str | None]:
    """Return a key for each row of a batch on a CPU: the teacher, the tokens, where examples start, and which are labels.

    What stands behind the last label decides nothing, so padding does not either. A row without labels has no key.
    """
    columns = [tensor.numpy() for tensor in (batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)]
    return [_row_key(identity, row) for row in zip(*columns, strict=True)]


def _row_key(identity: str, row: tuple) -> str | None:
    valid = (row[2][1:] != IGNORE).nonzero()[0]
    if not len(valid):
        return None
    end = int(valid[-1]) + 2  # labels are one position behind what predicts them
    digest = hashlib.sha256(identity.encode())
    for column in row:
        digest.update(column[:end].tobytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for pattern in _DECIDING for file in folder.glob(pattern))


def _content(file: Path) -> str:
    """Return the hash of a file's content, remembered on this machine for as long as its size and time are the same."""
    status = file.stat()
    known = Storage(str(cache_folder() / "hashes"))
    name = hashlib.sha256(repr((str(file.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()
    if not known.exists(name):
        with file.open("rb") as stream:
            known.write_bytes(name, hashlib.file_digest(stream, "sha256").hexdigest().encode())
    return known.read_bytes(name).decode()
