"""Stages that several tests begin with: run once a session for the same settings, copied after that."""

import shutil
from pathlib import Path

import pytest

from ray_jobs import finetune, prepare
from ray_jobs.core.config import Config
from ray_jobs.core.records import content_id
from ray_jobs.core.run_folder import RunFolder


@pytest.fixture(scope="session")
def kept_stages(tmp_path_factory) -> Path:
    """The folders of finished stages, by what decides them."""
    return tmp_path_factory.mktemp("kept-stages")


def finish(verb, config: Config, kept: Path, *sections: str) -> None:
    """Finish a stage: copied from where these sections of the config made it before, else run."""
    stage = verb.__name__.rpartition(".")[2]
    key = content_id(stage, *(getattr(config, name).model_dump_json() for name in ("teacher", "data", *sections)))
    folder = RunFolder(config).folder(stage).root
    if not (kept / key).exists():
        verb.run(config, force=False)
        shutil.copytree(folder, kept / key)
    elif not Path(folder, "manifest.json").exists():
        shutil.copytree(kept / key, folder)


@pytest.fixture
def prepared(tiny_config, ray_cluster, kept_stages):
    """A function that returns a tiny config whose `prepare` has finished."""

    def make(**overrides) -> Config:
        config = tiny_config(**overrides)
        finish(prepare, config, kept_stages)
        return config

    return make


@pytest.fixture
def finetuned(prepared, kept_stages):
    """A function that returns a tiny config whose `prepare` and `finetune` have finished."""

    def make(**overrides) -> Config:
        config = prepared(**overrides)
        finish(finetune, config, kept_stages, "finetune", "workers")
        return config

    return make
