"""What a full disk says, whoever noticed it."""

import errno
import resource

import pytest
import torch
from safetensors.torch import save_file

from ray_jobs.core.errors import StorageError
from ray_jobs.core.storage import Storage
from ray_jobs.training.full_disk import name_full_disk, require_room


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] No space left"), OSError(errno.EDQUOT, "quota")],
)
def test_a_full_disk_is_one_line_with_the_room_that_is_left(storage, error):
    with pytest.raises(StorageError, match=rf"no more can be written .*iB .* is left in {storage.uri}.*same command goes on") as caught:
        with name_full_disk(storage):
            raise error
    assert "\n" not in str(caught.value)


def test_what_safetensors_says_of_a_file_too_large_is_understood(storage, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="no more can be written"), name_full_disk(storage):
            save_file({"a": torch.zeros(10000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_pass_through(storage):
    with pytest.raises(FileNotFoundError), name_full_disk(storage):
        open(storage.uri + "/missing")


def test_checkpoints_that_will_not_fit_are_refused_before_training(storage):
    model = torch.nn.Linear(10**6, 10**9, bias=False, device="meta")
    with pytest.raises(StorageError, match=r"checkpoints need .* \(3 x .*12000000\.00 GB\)\), but .* left: make room"):
        require_room(storage, model, num_checkpoints=3)
    require_room(storage, model.requires_grad_(False), num_checkpoints=3)
