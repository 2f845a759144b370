"""A disk that is full, or will be: one line that says where, how much room is left, and what survives."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator

from safetensors import SafetensorError
from torch import nn

from ray_jobs.core.errors import StorageError
from ray_jobs.core.sizes import both_units
from ray_jobs.core.storage import Storage

_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SIGNS = ("no space left", "disk quota exceeded", "file too large")
_WAY_OUT = (
    "make room, lower keep_checkpoints, or choose another [run] storage: the last whole checkpoint is kept, and the same command "
    "goes on from it"
)


def is_full(error: BaseException) -> bool:
    """Return whether an error says that no more can be written."""
    return getattr(error, "errno", None) in _NUMBERS or any(sign in str(error).lower() for sign in _SIGNS)


@contextlib.contextmanager
def name_full_disk(storage: Storage) -> Iterator[None]:
    """Turn any sign of a full disk in the block into one line.

    Raises:
        StorageError: nothing more could be written to the stage's folder, or to the temporary one that checkpoints pass through.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise StorageError(full_disk(storage, error)) from error


def full_disk(storage: Storage, error: BaseException) -> str:
    """Return the line about a full disk."""
    reason = str(error).strip().splitlines()[-1]
    return (
        f"no more can be written ({reason}): {_room(storage)} is left in {storage.uri}, {_free(tempfile.gettempdir())} in "
        f"{tempfile.gettempdir()}; {_WAY_OUT}"
    )


def require_room(storage: Storage, model: nn.Module, *, num_checkpoints: int) -> None:
    """Refuse to train where the checkpoints will not fit, as far as that can be known: in a local folder.

    A checkpoint holds what is trained, and two moments of it in float32.

    Raises:
        StorageError: says the room that is needed, and what there is.
    """
    if not storage.is_local:
        return
    one = sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)
    needed, free = one * num_checkpoints, shutil.disk_usage(storage.root).free
    if needed > free:
        raise StorageError(
            f"checkpoints need {both_units(needed)} ({num_checkpoints} x {both_units(one)}), but {storage.uri} has {both_units(free)} "
            f"left: {_WAY_OUT}"
        )


def _room(storage: Storage) -> str:
    return _free(storage.root) if storage.is_local else "an unknown amount"


def _free(folder: str) -> str:
    return both_units(shutil.disk_usage(folder).free)
