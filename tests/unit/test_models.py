"""From a model's name to a folder: one line for each thing that is no model, without the hub."""

import json

import pytest

from ray_jobs.core.errors import ModelError
from ray_jobs.core.models import package_folder, resolve_model


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like a whole model; tests take a part away."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(json.dumps({}))
    return folder


def test_a_whole_folder_is_itself(folder):
    assert resolve_model(str(folder)) == folder


def test_a_relative_folder_becomes_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model") == folder


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("config.json", "no config.json"), ("tokenizer.json", "has no tokenizer"), ("model.safetensors", "no safetensors weights")],
)
def test_a_folder_without_a_part_is_one_line_naming_it(folder, missing, expected):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=expected) as caught:
        resolve_model(str(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2


def test_pickled_weights_are_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        resolve_model(str(folder))


def test_a_gguf_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("name", ["no/such-model", "not a name", "./nowhere"])
def test_a_name_that_is_nothing_lists_the_built_in_ones(name):
    with pytest.raises(ModelError, match="smollm2-135m-instruct") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


def test_a_remote_folder_is_copied_here_and_checked(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("RAYSTILL_CACHE", str(tmp_path / "cache"))
    assert (resolve_model(f"file://{folder}") / "config.json").is_file()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        resolve_model(f"file://{folder}")


def test_a_package_that_is_not_installed_is_one_line():
    with pytest.raises(ModelError, match="'no-such-package' is not installed"):
        package_folder("no_such_package", "no-such-package")


@pytest.mark.parametrize("name", ["./none", "/no/such", "~/none", "../none", "runs/none/student"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist: give a folder"):
        resolve_model(name)
