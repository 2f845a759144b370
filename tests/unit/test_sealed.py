"""A checkpoint in which something is missing is not gone on from."""

import pytest

from ray_jobs.core.storage import Storage
from ray_jobs.training.sealed import newest_sealed, seal


@pytest.fixture
def checkpoints(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"step-{step:06d}" / "shards"
        folder.mkdir(parents=True)
        (folder / "0.safetensors").write_bytes(b"x" * 100)
        (folder.parent / "progress.json").write_text("{}")
        seal(folder.parent)
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"torn": ')
    return Storage(str(tmp_path))


def test_the_last_whole_one_is_found(checkpoints):
    assert newest_sealed(checkpoints).uri.endswith("step-000010")
    assert newest_sealed(checkpoints.sub("nothing")) is None


@pytest.mark.parametrize("tear", ["truncate", "delete", "unsealed", "half a seal"])
def test_a_torn_one_is_passed_over(checkpoints, tmp_path, tear):
    folder = tmp_path / "step-000010"
    if tear == "truncate":
        (folder / "shards" / "0.safetensors").write_bytes(b"x" * 99)
    elif tear == "delete":
        (folder / "shards" / "0.safetensors").unlink()
    elif tear == "unsealed":
        (folder / "seal.json").unlink()
    else:
        (folder / "seal.json").write_text('{"progress.json": ')
    assert newest_sealed(checkpoints).uri.endswith("step-000005")
