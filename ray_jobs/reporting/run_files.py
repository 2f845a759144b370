"""Everything a run folder holds so far, read into plain rows; what is not there yet stays empty."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_jobs.core.records import check_version
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.storage import Storage

Rows = list[dict[str, Any]]
STAGES = ("prepare", "finetune", "distill", "answer", "judge", "compress")
ENCODER_STAGES = ("prepare", "distill")
MODELS = ("base", "teacher", "student")


@dataclass(frozen=True)
class RunFiles:
    """What a run has written.

    `manifests` has the finished stages only, and a stage that has not finished leaves its rows empty.
    `answers` is {model: {question_id: Answer row}}.
    """

    name: str
    provenance: dict[str, Any]
    manifests: dict[str, dict[str, Any]]
    questions: Rows
    answers: dict[str, dict[str, dict[str, Any]]]
    similarities: Rows
    verdicts: Rows
    finetune_steps: Rows
    distill_steps: Rows
    compression: Rows

    @property
    def missing(self) -> list[str]:
        """Stages that have not finished, of those that the run's models have."""
        stages = ENCODER_STAGES if self.is_of_encoders else STAGES
        return [stage for stage in stages if stage not in self.manifests]

    @property
    def is_of_encoders(self) -> bool:
        """Whether teacher and student are encoders: nobody answers questions."""
        return made_of_encoders(self.manifests)

    @property
    def outdated(self) -> dict[str, list[str]]:
        """{stage: inputs that were made anew after it}: its numbers belong to files that are gone."""
        found = {}
        for stage, manifest in self.manifests.items():
            inputs = manifest.get("inputs", {})
            stale = [name for name, made_from in inputs.items() if self.manifests.get(name, {}).get("id") != made_from]
            if stale:
                found[stage] = stale
        return found

    @property
    def tie_band(self) -> float:
        """Largest difference of two cosines that counts as a tie; 0 before the judge stage."""
        return float(self.manifests.get("judge", {}).get("similarity", {}).get("tie_band", 0.0))

    @property
    def vectors(self) -> str | None:
        """The name of the word vectors that similarity stands on; None before the judge stage."""
        return self.manifests.get("judge", {}).get("similarity", {}).get("vectors")

    @property
    def seed(self) -> int:
        """Seed of the bootstrap intervals: the judge stage's, so that both print the same figures."""
        return int(self.manifests.get("judge", {}).get("settings", {}).get("run.seed", 0))


def made_of_encoders(manifests: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the distillation of a run, by its finished stages, was one of encoders."""
    return manifests.get("distill", {}).get("settings", {}).get("distill.task", "language_model") != "language_model"


def finished_stages(folder: RunFolder) -> list[str]:
    """Return the names of the stages that have finished, in the order of the chain."""
    return [stage for stage in STAGES if folder.folder(stage).exists("manifest.json")]


def read_run(folder: RunFolder) -> RunFiles:
    """Return what the run has written.

    Raises:
        DataError: a table's rows are of another schema version.
    """
    manifests = {stage: folder.finished(stage) for stage in finished_stages(folder)}

    def rows(stage: str, name: str) -> Rows:
        return _read(folder.folder(stage), name) if stage in manifests else []

    answers = {model: rows("answer", f"{model}.parquet") for model in MODELS}
    return RunFiles(
        name=folder.config.run.name,
        provenance=folder.storage.read_json("config.json"),
        manifests=manifests,
        questions=rows("prepare", "questions.jsonl"),
        answers={model: {row["question_id"]: row for row in found} for model, found in answers.items() if found},
        similarities=rows("judge", "similarities.parquet"),
        verdicts=rows("judge", "verdicts.parquet"),
        finetune_steps=rows("finetune", "metrics.jsonl"),
        distill_steps=rows("distill", "metrics.jsonl"),
        compression=rows("compress", "table.json"),
    )


def _read(folder: Storage, name: str) -> Rows:
    readers = {"jsonl": folder.read_jsonl, "json": folder.read_json, "parquet": folder.read_parquet}
    rows = readers[name.rpartition(".")[2]](name) if folder.exists(name) else []
    check_version(rows, place=f"{folder.uri}/{name}")
    return rows
