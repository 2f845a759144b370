"""Files appear whole or not at all, on local and other file systems; folders replace each other."""

import pickle
import resource
import threading

import pyarrow.fs as pafs
import pytest

from ray_jobs.core.errors import StorageError
from ray_jobs.core.storage import Storage, download, replace_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["local", "remote"])
def storage(request, tmp_path):
    """A local folder, and one on pyarrow's in-memory file system, which lives as long as the object."""
    if request.param == "local":
        return Storage(str(tmp_path / "s"))
    storage = Storage("mock://s")
    storage.fs.create_dir(storage.root, recursive=True)
    return storage


def test_rows_and_objects_come_back_equal(storage):
    rows = [{"a": 1, "text": "größer\n"}, {"a": 2, "text": ""}]
    storage.write_jsonl("x/rows.jsonl", rows)
    storage.write_parquet("x/rows.parquet", rows)
    storage.write_json("x/one.json", {"rows": rows})
    assert storage.read_jsonl("x/rows.jsonl") == rows
    assert storage.read_parquet("x/rows.parquet") == rows
    assert storage.read_json("x/one.json") == {"rows": rows}
    assert storage.exists("x/one.json")
    assert not storage.exists("x/two.json")


def test_names_exists_delete_and_clear(tmp_path):
    storage = Storage(str(tmp_path))
    assert storage.sub("none").names() == []
    storage.write_bytes("a/b", b"1")
    assert storage.exists("a")
    assert storage.exists("a/b")
    storage.delete("a/b")
    storage.delete("a/never")
    assert not storage.exists("a/b")
    storage.delete("a")
    assert not storage.exists("a")
    storage.sub("b").write_bytes("c", b"")
    storage.sub("b").clear()
    storage.sub("b").clear()
    assert not storage.exists("b")


def test_a_torn_last_line_is_left_out(tmp_path):
    storage = Storage(str(tmp_path))
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert storage.read_jsonl("log.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_broken_earlier_line_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(StorageError, match=r"log\.jsonl line 2 is not JSON"):
        Storage(str(tmp_path)).read_jsonl("log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": 2}')
    assert Storage(str(tmp_path)).read_jsonl("log.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_reader_never_sees_half_a_file(tmp_path):
    storage = Storage(str(tmp_path))
    wholes = [b"a" * 2**20, b"b" * 2**20]
    storage.write_bytes("f", wholes[0])
    ended = threading.Event()

    def write():
        for number in range(60):
            storage.write_bytes("f", wholes[number % 2])
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert storage.read_bytes("f") in wholes
    writer.join()
    assert storage.names() == ["f"]


def test_a_relative_path_is_made_absolute_and_survives_pickling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs")
    assert storage.uri == str(tmp_path / "runs")
    assert pickle.loads(pickle.dumps(storage)).uri == storage.uri
    assert Storage(f"file://{tmp_path}/runs").uri == storage.uri


@pytest.mark.parametrize("uri", ["nonsense://x", "s3:/ /x y://"])
def test_a_uri_that_pyarrow_does_not_know_is_one_line(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="give a folder or a URI"):
        Storage(uri)


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Storage(str(tmp_path / "file" / "below")).make()


def test_make_leaves_nothing_behind(tmp_path):
    Storage(str(tmp_path / "new")).make()
    assert list((tmp_path / "new").iterdir()) == []


def test_upload_replaces_the_folder_that_was_there(tmp_path):
    storage = Storage(str(tmp_path / "s"))
    storage.make()
    for content in ("old", "new"):
        folder = tmp_path / content
        (folder / "below").mkdir(parents=True)
        (folder / "below" / content).write_text(content)
        storage.upload(folder, "model")
    assert storage.sub("model/below").names() == ["new"]
    assert storage.names() == ["model"]
    assert storage.local("model") == tmp_path / "s" / "model"


def test_upload_does_not_mix_in_what_a_killed_one_left(tmp_path):
    storage = Storage(str(tmp_path / "s"))
    storage.write_bytes(".model.tmp/torn", b"")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "whole").write_text("")
    storage.upload(tmp_path / "new", "model")
    assert storage.sub("model").names() == ["whole"]


def test_a_folder_that_a_kill_left_half_uploaded_is_not_taken_for_whole(tmp_path):
    storage = Storage(str(tmp_path / "s"))
    assert not storage.uploaded("model")
    for place in (".model.tmp/weights", ".model.tmp/config", "model/config"):  # the second copy of a remote upload, cut short
        storage.write_bytes(place, b"")
    assert storage.exists("model") and not storage.uploaded("model")
    (tmp_path / "new").mkdir()
    for name in ("weights", "config"):
        (tmp_path / "new" / name).write_text("")
    storage.upload(tmp_path / "new", "model")
    assert storage.uploaded("model") and storage.sub("model").names() == ["config", "weights"]


def test_download_makes_a_new_copy_only_when_the_listing_changed(tmp_path, cache):
    storage = Storage(str(tmp_path / "s"))
    storage.write_bytes("model/a", b"1")
    first = download(storage, "model")
    assert download(storage, "model") == first
    assert (first / "a").read_bytes() == b"1"
    storage.write_bytes("model/a", b"22")
    second = download(storage, "model")
    assert second != first
    assert (second / "a").read_bytes() == b"22"


def test_of_two_processes_that_make_a_folder_the_first_wins(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    target = tmp_path / "target"
    replace_folder(tmp_path / "first", target)
    replace_folder(tmp_path / "second", target)
    assert (target / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def test_local_means_the_local_file_system(tmp_path):
    assert isinstance(Storage(str(tmp_path)).fs, pafs.LocalFileSystem)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_the_old_one(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"/a cannot be written: .*make room, or choose another \[run\] storage"):
            storage.write_bytes("a", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert storage.read_bytes("a") == b"old"
    assert storage.names() == ["a"]


def test_what_cannot_be_reached_at_all_is_said_as_what_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        Storage(str(tmp_path)).write_bytes("x" * 300, b"")
