"""One process at a time works on a stage; a dead holder is no holder; the message names who it is."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ray_jobs.core.errors import StageHeld
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.run_lock import STALE_S, RunLock
from ray_jobs.core.storage import Storage

HOLD = """
import sys
from ray_jobs.core.run_lock import RunLock
from ray_jobs.core.storage import Storage
from ray_jobs.core.errors import StageHeld
storage = Storage(sys.argv[1])
try:
    lock = RunLock(storage, "finetune")
except StageHeld as error:
    print("refused", error, flush=True)
else:
    print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def run(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    storage.make()
    return storage


@pytest.fixture
def start(run):
    """A function that starts a process which takes the stage's lock and keeps it until its input ends."""
    started = []

    def start():
        command = [sys.executable, "-c", HOLD, run.uri]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def held_elsewhere(run, *, seconds_ago):
    """Make the lock look as a process of another machine would have left it."""
    run.delete("finetune.lock")
    lock = RunLock(run, "finetune")
    other = {**run.read_json("finetune.lock"), "machine": "another", "host": "node-7", "token": "theirs"}
    lock.release()
    run.write_json("finetune.lock", {**other, "renewed": time.time() - seconds_ago})


def test_another_process_is_refused_with_who_holds_it_and_since_when(run, start):
    holder = start()
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        StageHeld, match=rf"'finetune' of .* is worked on by process {holder.pid} of .* on .* since 20.*wait for it"
    ) as caught:
        RunLock(run, "finetune")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    RunLock(run, "distill").release()


def test_a_killed_holder_is_none_at_once(run, start):
    holder = start()
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run.exists("finetune.lock")
    RunLock(run, "finetune").release()
    assert run.names() == []


def test_a_holder_that_ends_leaves_nothing(run, start):
    holder = start()
    holder.stdout.readline()
    holder.communicate("\n")
    assert run.names() == []


def test_of_starts_in_one_instant_one_goes_on(run, start):
    words = [process.stdout.readline().split()[0] for process in [start() for _ in range(4)]]
    assert sorted(words) == ["held", "refused", "refused", "refused"]


def test_another_machine_is_believed_until_its_sign_of_life_is_old(run):
    held_elsewhere(run, seconds_ago=STALE_S - 30)
    with pytest.raises(StageHeld, match=r"on node-7 since .*last sign of it 20.*free 120 s after that"):
        RunLock(run, "finetune")
    held_elsewhere(run, seconds_ago=STALE_S + 1)
    lock = RunLock(run, "finetune")
    assert run.read_json("finetune.lock")["host"] != "node-7"
    lock.release()


def test_who_was_taken_over_stops(run):
    lock = RunLock(run, "finetune")
    lock.renew()
    run.write_json("finetune.lock", {**run.read_json("finetune.lock"), "token": "theirs", "machine": "another"})
    with pytest.raises(StageHeld, match="was taken over by process"):
        lock.renew()
    lock.release()
    assert run.read_json("finetune.lock")["token"] == "theirs"


def test_a_hold_ends_with_what_held_it_and_its_thread_too(run):
    before = threading.active_count()
    lock = RunLock(run, "finetune")
    assert threading.active_count() == before + 1
    del lock
    assert run.names() == []


def test_the_same_process_may_begin_again_after_an_error(run):
    first = RunLock(run, "finetune")
    second = RunLock(run, "finetune")
    held = run.read_json("finetune.lock")
    first.renew()
    assert run.read_json("finetune.lock") == held
    first.release()
    assert run.read_json("finetune.lock")["pid"] == os.getpid()
    second.release()
    second.renew()
    assert run.names() == []


def test_a_forked_child_does_not_end_its_parents_hold(run):
    lock = RunLock(run, "finetune")
    child = os.fork()
    if not child:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert run.exists("finetune.lock")
    lock.release()


def test_a_store_without_locks_gives_way_to_who_wrote_last(tmp_path):
    class Overtaken(Storage):
        def write_json(self, name, value):
            super().write_json(name, value)
            super().write_json(name, {**value, "machine": "another", "host": "node-7", "token": "theirs"})

    storage = Overtaken(str(tmp_path))
    storage.is_local = False
    with pytest.raises(StageHeld, match="node-7"):
        RunLock(storage, "finetune")


def test_a_stage_is_held_while_worked_on_and_free_when_finished(tiny_stage, start):
    folder, stage = tiny_stage
    assert folder.storage.exists("finetune.lock")
    other = start()
    assert other.stdout.readline().startswith("refused")
    stage.finish()
    assert folder.storage.names() == ["config.json", "finetune"]
    assert folder.stage("finetune", sections=["finetune"], after=[], force=False).manifest
    assert folder.storage.names() == ["config.json", "finetune"]


@pytest.fixture
def tiny_stage(run):
    from ray_jobs.core.config_file import validate

    parent, _, name = run.uri.rpartition("/")
    folder = RunFolder(validate({"run": {"name": name, "storage": parent}}))
    return folder, folder.stage("finetune", sections=["finetune"], after=[], force=False)


def test_a_held_stage_is_not_cleared_by_force(tiny_stage, start):
    folder, stage = tiny_stage
    stage.folder.write_json("part", {})
    stage.release()
    holder = start()
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StageHeld):
        folder.stage("finetune", sections=["finetune"], after=[], force=True)
    assert stage.folder.exists("part")
