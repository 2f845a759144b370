"""What a submitted job takes along: relative paths travel, absolute ones are the cluster's, lost ones are refused."""

import subprocess
import sys

import pytest

from ray_jobs.core import shipment
from ray_jobs.core.config_file import load_config, validate
from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.core.shipment import pack


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with two notes, a hidden file and a file of questions."""
    folder = tmp_path / "here"
    (folder / "notes" / "deep").mkdir(parents=True)
    for name in ("notes/a.md", "notes/deep/b.md", "notes/.hidden", "questions.jsonl", "other.txt"):
        (folder / name).write_text(name)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def parcel(tmp_path):
    folder = tmp_path / "parcel"
    folder.mkdir()
    return folder


def config(storage="s3://bucket/runs", **sections):
    return validate({"run": {"name": "a", "storage": storage}, **sections})


def test_relative_inputs_travel_to_the_same_relative_place(here, parcel):
    settings = config(data={"documents": ["notes"], "pairs": ["https://x/pairs.jsonl", "/shared/pairs"], "questions": "questions.jsonl"})
    sent = pack(settings, parcel)
    names = {str(path.relative_to(parcel)) for path in parcel.rglob("*") if path.is_file()}
    assert {"notes/a.md", "notes/deep/b.md", "questions.jsonl", "config.toml", "ray_jobs/__main__.py", "serve/__init__.py"} <= names
    assert not {"notes/.hidden", "other.txt"} & names
    assert not [name for name in names if "__pycache__" in name]
    assert load_config(parcel / "config.toml") == settings
    assert sent.of_cluster == ["https://x/pairs.jsonl", "/shared/pairs", "s3://bucket/runs"]
    assert sent.num_bytes == sum((parcel / name).stat().st_size for name in names)


def test_globs_travel_as_far_as_they_match(here, parcel):
    pack(config(data={"documents": ["notes/**/*.md"]}), parcel)
    assert (parcel / "notes" / "deep" / "b.md").is_file()


def test_the_packed_program_runs_from_its_folder(here, parcel):
    pack(config(), parcel)
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs", "--version"], cwd=parcel, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("raystill ")


@pytest.mark.parametrize("storage", ["runs", "./runs", "~/runs"])
def test_results_at_a_relative_path_would_be_lost(here, parcel, storage):
    with pytest.raises(ConfigError, match="is relative"):
        pack(config(storage), parcel)
    assert list(parcel.iterdir()) == []


def test_a_model_on_this_machine_is_not_sent(here, parcel):
    with pytest.raises(ConfigError, match="'notes' is a path on this machine"):
        pack(config(teacher={"model": "notes"}), parcel)
    pack(config(teacher={"model": "/models/llama"}), parcel)


@pytest.mark.parametrize(("path", "expected"), [("none.md", "no such file here"), ("../secret.md", "is outside")])
def test_inputs_that_cannot_be_sent_are_one_line(here, parcel, path, expected):
    (here.parent / "secret.md").write_text("")
    with pytest.raises(DataError, match=expected):
        pack(config(data={"documents": [path]}), parcel)


def test_a_link_out_of_the_folder_is_not_followed(here, parcel):
    (here / "link").symlink_to(here.parent)
    with pytest.raises(DataError, match="is outside"):
        pack(config(data={"documents": ["link"]}), parcel)


def test_too_much_is_refused_with_its_size(here, parcel):
    with (here / "big.md").open("wb") as stream:
        stream.truncate(shipment.MAX_BYTES + 2**20)
    with pytest.raises(DataError, match=r"20\d MiB to send, 200 MiB is the most"):
        pack(config(data={"documents": ["big.md"]}), parcel)
