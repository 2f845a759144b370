"""The run folder, the only thing stages share: STORAGE/NAME/STAGE/, each with a manifest written last.

A stage remembers the settings it was started with (`started.json`). With `manifest.json` it is finished and
skipped; without, it goes on. Other settings are refused; another input (an earlier stage made anew) starts it anew.
"""

import importlib.metadata
import platform
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from ray_jobs import __version__
from ray_jobs.core.config import Config
from ray_jobs.core.config_file import flatten
from ray_jobs.core.errors import ConfigChanged, StageMissing
from ray_jobs.core.memory import peak_bytes, reset_peak
from ray_jobs.core.run_lock import RunLock
from ray_jobs.core.storage import Storage

PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "gensim", "openvino", "onnxruntime", "pyarrow")
FOLDERS = {"answer": "answers"}
NOT_DECIDING = {
    "finetune.merge",
    "finetune.tokens_per_s",
    "distill.tokens_per_s",
    *(f"distill.pool.{name}" for name in ("num_actors", "cpus", "gpus", "memory", "ahead")),
    "distill.cache.folder",
    "distill.cache.budget",
}
"""Fields that change nothing of what their stage makes: a finished stage is not made with other settings for them."""
MODEL_STAGES = {"base": [], "teacher": ["finetune"], "student": ["distill"]}
"""The stages that make each of a run's models."""


class ModelSource(NamedTuple):
    """Where a run's model is: a name for `resolve_model`, and the PEFT adapter folder to merge into it."""

    model: str
    adapter: str | None = None


class Stage:
    """One stage of a run: its folder, and its manifest once it is finished."""

    def __init__(self, name: str, folder: Storage, started: dict[str, Any], lock: RunLock | None = None):
        self.name = name
        self.folder = folder
        self.started = started
        self._lock = lock
        self._clock = time.monotonic()
        self._peak_is_own = reset_peak()

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished stage, else None."""
        return self.folder.read_json("manifest.json") if self.folder.exists("manifest.json") else None

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest, which makes the stage finished, and return it.

        Args:
            facts: counts, results and peak memory of the stage, as JSON values.

        Raises:
            StageHeld: another process took the stage over.
        """
        if self._lock is not None:
            self._lock.check()
        manifest = {
            "stage": self.name,
            "id": uuid.uuid4().hex,
            "settings": self.started["settings"],
            "inputs": self.started["inputs"],
            "seconds": round(time.monotonic() - self._clock, 3),
            "driver_peak_bytes": peak_bytes(),
            "driver_peak_is_own": self._peak_is_own,  # false: it is the peak of the stages before, too
            **facts,
        }
        self.folder.write_json("manifest.json", manifest)
        self.release()
        return manifest

    def release(self) -> None:
        """Let other processes work on the stage; what is here stays."""
        if self._lock is not None:
            self._lock.release()


class RunFolder:
    """The folder of one run.

    Args:
        config: the resolved config; `[run] storage` and `name` say where the folder is.

    Raises:
        StorageError: the folder cannot be created or written.
    """

    def __init__(self, config: Config):
        self.config = config
        self.storage = Storage(config.run.storage).sub(config.run.name)
        self._others = [Storage(uri) for uri in config.run.stages_from]

    def folder(self, stage: str) -> Storage:
        """Return the storage of a stage's folder, finished or not: another run's where `stages_from` says so."""
        return self.owner(stage).sub(FOLDERS.get(stage, stage))

    def owner(self, stage: str) -> Storage:
        """Return the run that has a stage: this one, or where it has not started the stage, the first of `stages_from` that has."""
        runs = (self.storage, *self._others)
        return next((run for run in runs if run.sub(FOLDERS.get(stage, stage)).exists("started.json")), self.storage)

    def finished(self, stage: str) -> dict[str, Any]:
        """Return the manifest of a finished stage.

        Raises:
            StageMissing: it has not finished.
        """
        folder = self.folder(stage)
        if not folder.exists("manifest.json"):
            raise StageMissing(
                f"stage {stage!r} has not finished in {self.storage.uri}: run `raystill {stage} CONFIG` or `raystill run CONFIG` first"
            )
        return folder.read_json("manifest.json")

    def model(self, name: str) -> ModelSource:
        """Return the source of the base, the teacher or the student; their stages need not have finished.

        The teacher is the base with finetune's adapter, or a folder of its own where finetune trained every weight.
        """
        if name == "student":
            return ModelSource(f"{self.folder('distill').uri}/student")
        if name == "base":
            return ModelSource(self.config.teacher.model)
        finetune = self.folder("finetune")
        if self._finetune_method(finetune) == "full":
            return ModelSource(f"{finetune.uri}/teacher")
        return ModelSource(self.config.teacher.model, f"{finetune.uri}/adapter")

    def stage(self, name: str, *, sections: list[str], after: list[str], force: bool, facts: dict[str, Any] | None = None) -> Stage:
        """Return a stage ready to work in, or finished already (`stage.manifest`).

        Args:
            sections: config sections (or dotted fields) that decide the result.
            after: earlier stages whose results are read.
            force: start anew whatever is there.
            facts: further settings that decide the result, such as hashes of input files.

        Raises:
            ConfigChanged: it was started with other settings.
            StageHeld: another process works on it.
            StageMissing: a stage of `after` has not finished.
        """
        inputs = {stage: self.finished(stage)["id"] for stage in after}
        settings = {**self._settings(sections), **flatten(facts or {})}
        started = {"stage": name, "settings": settings, "inputs": inputs}
        folder = self.storage.sub(FOLDERS.get(name, name))
        if self._to_do(folder, started, force=force):
            self.storage.make()
            lock = RunLock(self.storage, name)
            if not self._to_do(folder, started, force=force):  # another process finished it in the meantime
                lock.release()
                return Stage(name, folder, started)
            if force or not self._goes_on(folder, started):
                clear_stage(folder)
            folder.make()
            self.storage.write_json("config.json", self._provenance())
            folder.write_json("started.json", started)
            return Stage(name, folder, started, lock)
        return Stage(name, folder, started)

    def is_due(self, name: str, *, after: list[str], force: bool) -> bool:
        """Return whether `stage` would have something to do: not finished, started anew, or finished with other inputs.

        Raises:
            StageMissing: a stage of `after` has not finished.
        """
        inputs = {stage: self.finished(stage)["id"] for stage in after}
        folder = self.storage.sub(FOLDERS.get(name, name))
        return force or not folder.exists("manifest.json") or not self._goes_on(folder, {"inputs": inputs})

    def discard(self, stage: Stage) -> None:
        """Delete a stage that came to nothing, and the run's folder where no other stage is in it."""
        clear_stage(stage.folder)
        stage.release()
        if set(self.storage.names()) <= {"config.json"}:
            self.storage.clear()

    def _to_do(self, folder: Storage, started: dict[str, Any], *, force: bool) -> bool:
        before = folder.read_json("started.json") if folder.exists("started.json") else None
        if before and not force and before["inputs"] is not None:
            self._refuse_change(started["stage"], before["settings"], started["settings"])
        return force or not self._goes_on(folder, started) or not folder.exists("manifest.json")

    @staticmethod
    def _goes_on(folder: Storage, started: dict[str, Any]) -> bool:
        """Return whether what is in a stage's folder was made from these inputs; its settings are checked already."""
        return folder.exists("started.json") and folder.read_json("started.json")["inputs"] == started["inputs"]

    def _finetune_method(self, folder: Storage) -> str:
        # another run, named in stages_from, may have trained its teacher in another way than this config would
        made = folder.read_json("started.json")["settings"] if folder.exists("started.json") else {}
        return made.get("finetune.method", self.config.finetune.method)

    def _settings(self, sections: list[str]) -> dict[str, Any]:
        flat = flatten(self.config.model_dump(mode="json"))
        chosen = ["run.seed", *sections]
        kept = {key: value for key, value in flat.items() if any(key == c or key.startswith(c + ".") for c in chosen)}
        return {key: value for key, value in kept.items() if key not in NOT_DECIDING}

    def _refuse_change(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if differing:
            seen = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ConfigChanged(
                f"stage {name!r} of {self.storage.uri} was made with other settings ({seen}{more}): "
                "use another [run] name, the old settings, or --force to make the stage anew"
            )

    def _provenance(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "versions": {"raystill": __version__, "python": platform.python_version(), **versions()},
            "git_revision": git_revision(),
        }


def clear_stage(folder: Storage) -> None:
    """Delete a stage's folder; killed at any point, it leaves nothing that looks finished or that a stage would go on from.

    The manifest goes first and `started.json` last; in between it names no inputs, so that the next start clears the rest.
    """
    folder.delete("manifest.json")
    if folder.exists("started.json"):
        folder.write_json("started.json", {**folder.read_json("started.json"), "inputs": None})
    for name in folder.names():
        if name != "started.json":
            folder.delete(name)
    folder.clear()


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide results; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the commit of the source tree, with -dirty where it differs; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
