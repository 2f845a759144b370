"""Rows in shards: they survive, are shared by writers, stay within a budget, and damage is found before use."""

import threading
import time

import pytest

from ray_jobs.core.storage import Storage
from ray_jobs.distillation.shards import ShardStore

KEYS = [f"{number:064x}" for number in range(40)]
ROWS = {key: bytes([number]) * (100 + number) for number, key in enumerate(KEYS)}
BUDGET = 2**20


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    """A local folder, and one on pyarrow's in-memory file system, which lives as long as the object."""
    if request.param == "local":
        return Storage(str(tmp_path / "s"))
    storage = Storage("mock://s")
    storage.fs.create_dir(storage.root, recursive=True)
    return storage


def store(folder, *, kind="hidden", budget=BUDGET, **options):
    return ShardStore(folder, kind=kind, budget_bytes=budget, **options)


def some(start, stop):
    return {key: ROWS[key] for key in KEYS[start:stop]}


def filled(folder, start=0, stop=10):
    """A folder with one shard; returns its name."""
    before = set(folder.names())
    writer = store(folder)
    writer.put(some(start, stop))
    writer.flush()
    (name,) = set(folder.names()) - before
    return name


def damage(folder, name, change):
    data = bytearray(folder.read_bytes(name))
    with folder.fs.open_output_stream(f"{folder.root}/{name}") as stream:
        stream.write(bytes(change(data)))


def flipped(place):
    def change(data):
        data[place] ^= 1
        return data

    return change


def test_what_was_flushed_is_there_for_the_next_and_what_was_put_can_be_read_at_once(folder):
    writer = store(folder)
    writer.put(some(0, 10))
    assert writer.read(KEYS[3]) == ROWS[KEYS[3]]
    assert KEYS[3] in writer and KEYS[11] not in writer
    assert KEYS[3] not in store(folder), "killed now, it is computed again"
    writer.flush()
    reader = store(folder)
    assert [reader.read(key) for key in KEYS[:10]] == list(some(0, 10).values())
    assert reader.read(KEYS[11]) is None
    assert reader.num_bytes == writer.num_bytes > sum(map(len, some(0, 10).values()))


def test_writers_share_a_folder_without_a_lock(folder):
    writers = [store(folder, refresh_s=0.0) for _ in range(4)]

    def write(number):
        for start in range(number, 40, 4):
            writers[number].put(some(start, start + 1))
            writers[number].flush()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writers[0].refresh()
    assert {key: writers[0].read(key) for key in KEYS} == ROWS
    assert len(folder.names()) == 40


@pytest.mark.parametrize(
    "change",
    [
        flipped(-1),
        flipped(0),
        flipped(20),
        flipped(400),
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data + b"x",
    ],
    ids=["last byte", "length", "header", "deep in header", "cut", "cut in its length", "empty", "longer"],
)
def test_damage_is_said_once_and_nothing_damaged_is_read(folder, change, capsys):
    good, bad = filled(folder, 0, 10), filled(folder, 10, 20)
    damage(folder, bad, change)
    reader = store(folder)
    found = {key: reader.read(key) for key in KEYS[10:20]}
    assert all(data in (None, ROWS[key]) for key, data in found.items())
    assert None in found.values()
    said = capsys.readouterr().err
    assert said.count(bad) == 1
    assert {key: reader.read(key) for key in KEYS[:10]} == some(0, 10)
    reader.put({key: ROWS[key] for key in found if key not in reader})
    reader.flush()
    assert {key: store(folder).read(key) for key in KEYS[:20]} == some(0, 20)
    assert good in folder.names()


def test_another_process_may_delete_a_shard_that_this_one_knows(folder):
    name = filled(folder)
    reader = store(folder)
    folder.delete(name)
    assert reader.read(KEYS[0]) is None
    assert KEYS[1] not in reader


def test_shards_of_another_kind_and_other_files_are_left_alone(folder, capsys):
    name = filled(folder)
    folder.write_bytes("notes.txt", b"mine")
    other = store(folder, kind="top_k")
    assert other.read(KEYS[0]) is None
    assert "holds 'raystill targets 1' of 'hidden', not 'raystill targets 1' of 'top_k'" in capsys.readouterr().err
    assert {name, "notes.txt"} <= set(folder.names())


def test_the_budget_ends_writing_once(folder, capsys):
    filled(folder, 0, 10)
    writer = store(folder, budget=4000)
    for start in (10, 20, 30):
        writer.put(some(start, start + 10))
        writer.flush()
    assert capsys.readouterr().err.count("no longer kept") == 1
    assert len(folder.names()) <= 2
    assert store(folder).num_bytes <= 4000


def test_large_rows_are_written_while_others_come(folder):
    writer = store(folder, flush_bytes=500)
    for key, data in ROWS.items():
        writer.put({key: data})
    assert {key: writer.read(key) for key in KEYS} == ROWS
    writer.flush()
    assert len(folder.names()) >= 8


class Listed:
    """A folder in which something happens while it is listed."""

    def __init__(self, folder):
        self._folder, self.fs, self.meanwhile = folder, self, lambda: None

    def __getattr__(self, name):
        return getattr(self._folder if hasattr(self._folder, name) else self._folder.fs, name)

    def get_file_info(self, selector):
        found = self._folder.fs.get_file_info(selector)
        self.meanwhile()
        return found


def test_what_is_written_while_the_folder_is_listed_is_not_taken_for_gone(tmp_path):
    folder = Listed(Storage(str(tmp_path / "s")))
    writer = store(folder, refresh_s=0)

    def write():
        writer.put(some(0, 10))
        writer.flush()

    folder.meanwhile = write
    writer.refresh()
    assert [writer.read(key) for key in KEYS[:10]] == list(ROWS.values())[:10]


def test_a_writer_that_fails_as_no_storage_does_is_heard(tmp_path):
    class Broken(Listed):
        def write_bytes(self, name, data):
            raise ValueError("no bytes")

    writer = store(Broken(Storage(str(tmp_path / "s"))), flush_bytes=1)
    with pytest.raises(ValueError, match="no bytes"):  # by whichever call comes after it
        writer.put(some(0, 1))
        time.sleep(0.2)
        writer.flush()
