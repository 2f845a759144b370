"""A pool of teachers on a real cluster: the worker teacher's own numbers, while actors die, grow and are refused."""

import contextlib
import os
import signal
import time

import pytest
import torch
from packed_rows import write_rows

from ray_jobs.core.cluster import require_together
from ray_jobs.core.errors import ClusterError, MemoryLimitExceeded
from ray_jobs.distillation.pool import PoolTargets, teacher_pool
from ray_jobs.distillation.pool_actors import PoolOptions
from ray_jobs.distillation.pool_size import PoolSize
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.training.batches import PackedRows, collate
from ray_jobs.training.models import load_model

pytestmark = pytest.mark.cluster
ONE = PoolOptions(memory_bytes=2 * 2**30)


@pytest.fixture
def batches(tmp_path):
    rows = PackedRows(write_rows(tmp_path / "rows", [(9, 7), (12,), (5, 5, 6), (16,), (8, 8), (3, 13)]))
    return [collate([rows[index], rows[index + 1]]) for index in range(0, 6, 2)]


@contextlib.contextmanager
def pool_of(model, options=ONE, size=None, *, pids=None, delay_s=0.0, hoard_bytes=0):
    """Targets from a pool, and what its actors wrote down: their process ids, one file each."""

    def load(device):
        import os
        import time
        from pathlib import Path

        import torch

        from ray_jobs.training.models import load_model

        if pids is not None:
            Path(pids, str(os.getpid())).touch()

        model_ = load_model(model, dtype=torch.float32, device=device)
        model_.hoard = torch.ones(hoard_bytes, dtype=torch.uint8)
        model_.get_decoder().register_forward_pre_hook(lambda *_: time.sleep(delay_s))
        return model_

    with teacher_pool(load, dtype="float32", options=options, size=size or PoolSize(options.min_actors, options.max_actors)) as pool:
        yield PoolTargets(pool, lambda: load_model(model, dtype=torch.float32).get_output_embeddings().weight, ahead=2)


def test_the_pool_says_what_a_teacher_in_the_worker_says_also_when_its_actors_are_killed(ray_cluster, tiny_model, batches, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = WorkerTeacher(load_model(tiny_model, dtype=torch.float32))
    expected = [here.of(batch).hidden_NH for batch in batches]
    torch.set_num_threads(threads)
    with pool_of(tiny_model, pids=tmp_path, delay_s=1.0) as targets:  # slow enough to be killed before it is done
        assert not list(tmp_path.glob("[0-9]*")), "nobody has asked"
        targets.announce(batches)
        assert torch.equal(targets.of(batches[0]).hidden_NH, expected[0])
        (pid,) = (int(file.name) for file in tmp_path.glob("[0-9]*"))
        os.kill(pid, signal.SIGKILL)
        for batch, hidden in list(zip(batches, expected, strict=True))[1:]:
            assert torch.equal(targets.of(batch).hidden_NH, hidden)
        assert targets.waited_s > 0
        assert targets.facts() == {"pool_actors": 1, "pool_actors_lost": 1}


def test_it_grows_while_the_student_waits_and_shrinks_when_idle(ray_cluster, tiny_model, batches, tmp_path):
    options = ONE._replace(max_actors=2, cpus=0.5)
    with pool_of(tiny_model, options, PoolSize(1, 2, grow_after_s=0.2, shrink_after_s=2.0), pids=tmp_path, delay_s=0.2) as targets:
        ended = time.monotonic() + 240
        while targets.facts()["pool_actors"] < 2 and time.monotonic() < ended:
            targets.of(batches[0])
        pids = [int(file.name) for file in tmp_path.glob("[0-9]*")]
        assert len(pids) == 2
        ended = time.monotonic() + 240
        while all(is_running(pid) for pid in pids) and time.monotonic() < ended:
            time.sleep(0.1)
        assert sum(is_running(pid) for pid in pids) == 1


def is_running(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_an_actor_past_its_limit_ends_the_pool_with_its_reason(ray_cluster, tiny_model, batches):
    refused = pytest.raises(MemoryLimitExceeded, match=r"raise \[distill\.pool\] memory")
    with pool_of(tiny_model, ONE._replace(memory_bytes=2**30), hoard_bytes=2**31) as targets, refused:
        targets.of(batches[0])


def test_pool_and_workers_that_do_not_fit_beside_each_other_are_refused(ray_cluster):
    each = {"CPU": 3.0, "memory": 2**28}
    require_together([("[workers] of distill", each, 1)])
    with pytest.raises(ClusterError, match=r"\[workers\] of distill 1 x .* and \[distill.pool\] 1 x .* at the same time"):
        require_together([("[workers] of distill", each, 1), ("[distill.pool]", each, 1)])
