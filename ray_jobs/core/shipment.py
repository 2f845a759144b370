"""What a job takes along to another cluster: the program, its config, and the input files of relative paths.

One rule: a relative path is of this machine and travels; an absolute path or a URI is of the cluster and does not.
"""

import glob
import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

from ray_jobs.core.config import Config
from ray_jobs.core.config_file import to_toml
from ray_jobs.core.errors import ConfigError, DataError

PACKAGES = ("ray_jobs", "serve", "tune_spaces")
CONFIG_NAME = "config.toml"
MAX_BYTES = 200 * 2**20
"""Ray itself takes 512 MiB; larger inputs belong on a storage that the cluster reads."""
_LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


class Shipment(NamedTuple):
    """A packed folder: its size, and the config's paths that the cluster itself must have."""

    num_bytes: int
    of_cluster: list[str]


def pack(config: Config, folder: Path) -> Shipment:
    """Fill a folder with what the job needs, so that `python -m ray_jobs JOB config.toml` works in it.

    Raises:
        ConfigError: a path that would be lost on the cluster: results or models at a relative path.
        DataError: input files that are missing, outside the current folder, or too large.
    """
    _refuse_lost_paths(config)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        shutil.copytree(next(iter(spec.submodule_search_locations)), folder / package, ignore=_LEFT_BEHIND)
    (folder / CONFIG_NAME).write_text(to_toml(config), encoding="utf-8")
    inputs = [*config.data.documents, *config.data.pairs, *filter(None, [config.data.questions])]
    for pattern in inputs:
        if not _of_cluster(pattern):
            _copy(pattern, folder)
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"the input files make {num_bytes / 2**20:.0f} MiB to send, {MAX_BYTES / 2**20:.0f} MiB is the most: "
            "put them on a storage that the cluster reads, and give its URI or absolute path"
        )
    return Shipment(num_bytes, [path for path in [*inputs, config.run.storage] if _of_cluster(path)])


def _of_cluster(path: str) -> bool:
    return "://" in path or path.startswith("/")


def _refuse_lost_paths(config: Config) -> None:
    if not _of_cluster(config.run.storage):
        raise ConfigError(
            f"[run] storage = {config.run.storage!r} is relative, and a job's own folder is deleted on the cluster: "
            "give a URI like s3://bucket/runs or an absolute path that all its nodes share"
        )
    for path in config.run.stages_from:
        if not _of_cluster(path):
            raise ConfigError(f"[run] stages_from = {path!r} is relative: give the URI or absolute path that the cluster knows")
    for name in filter(None, [config.teacher.model, config.student.model]):
        if not _of_cluster(name) and Path(name).exists():
            raise ConfigError(
                f"model {name!r} is a path on this machine, and models are not sent: give a URI, an absolute path or a hub id"
            )


def _copy(pattern: str, folder: Path) -> None:
    here = Path.cwd()
    matches = [Path(match) for match in ([pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True))]
    if not matches:
        raise DataError(f"[data] {pattern!r}: no such file here to send; absolute paths and URIs are read on the cluster")
    for match in matches:
        if not match.resolve().is_relative_to(here.resolve()) or ".." in match.parts:
            raise DataError(f"[data] {pattern!r} is outside {here}: call from the folder that holds it, or give a URI or absolute path")
        target = folder / match
        target.parent.mkdir(parents=True, exist_ok=True)
        if match.is_dir():
            shutil.copytree(match, target, ignore=_LEFT_BEHIND, dirs_exist_ok=True)
        else:
            shutil.copy2(match, target)
