"""Checkpoint folders that say what belongs to them, so that a torn one is known by itself.

Ray Train keeps a register of whole checkpoints, but rewrites it in place: a kill or a full disk in that instant tears it.
"""

import json
from pathlib import Path

import pyarrow.fs as pafs

from ray_jobs.core.storage import Storage

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Write down which files a checkpoint has, and their sizes."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / SEAL).write_text(json.dumps(sizes))


def newest_sealed(checkpoints: Storage) -> Storage | None:
    """Return the last (by name) of the folders here in which nothing is missing."""
    folders = (checkpoints.sub(name) for name in reversed(checkpoints.names()) if checkpoints.exists(f"{name}/{SEAL}"))
    return next((folder for folder in folders if _is_whole(folder)), None)


def _is_whole(folder: Storage) -> bool:
    try:
        sizes = folder.read_json(SEAL)
    except ValueError:
        return False
    infos = folder.fs.get_file_info([f"{folder.root}/{name}" for name in sizes])
    return all(info.type == pafs.FileType.File and info.size == size for info, size in zip(infos, sizes.values(), strict=True))
