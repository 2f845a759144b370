"""`raystill run`: the chain, stage by stage, resuming where it stopped."""

import importlib
import time
from typing import Any

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config
from ray_jobs.core.errors import ConfigChanged
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import RunFolder

FOLLOW = ("raystill serve CONFIG", "raystill tune CONFIG", "raystill plan CONFIG")
"""What one may want to do with a finished run."""
STAGES = ("prepare", "finetune", "distill", "answer", "judge", "compress", "report")
ENCODER_STAGES = {"prepare": "prepare", "distill": "distill_encoder", "report": "report"}
"""Those that a run of encoders has, and their verbs: nobody answers questions."""


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Run every stage that has not finished and return the last one's manifest with the stages' seconds.

    Args:
        force: start those stages anew that were made with other settings (and, with them, what builds on them).

    Raises:
        JobError: as the stage that failed; the stages before it are finished and stay so.
    """
    began = time.monotonic()
    for_encoders = config.distill.task != "language_model"
    stages = ENCODER_STAGES if for_encoders else {name: name for name in STAGES}
    if for_encoders:
        left_out = ", ".join(name for name in STAGES if name not in stages)
        say(f'run: distill.task = "{config.distill.task}" needs {", ".join(stages)}; {left_out} are for language models and left out')
    verbs = [importlib.import_module(f"ray_jobs.{name}") for name in stages.values()]
    folder = RunFolder(config)
    for name, verb in zip(stages, verbs, strict=True):
        if hasattr(verb, "check") and (force or not folder.folder(name).exists("manifest.json")):  # a finished stage starts nothing
            verb.check(config)
    with connect():
        require("[workers]", config.workers.bundle, config.workers.min_workers)
        manifests = {}
        for number, (name, verb) in enumerate(zip(stages, verbs, strict=True), start=1):
            say(f"[{number}/{len(stages)}] {name} ...")
            manifests[name] = _run_stage(verb, config, force)
            say(f"[{number}/{len(stages)}] {manifests[name]['headline'][0]} ({manifests[name]['seconds']:.0f} s)")
    return {
        **manifests["report"],
        "stage": "run",
        "stage_seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "seconds": round(time.monotonic() - began, 3),
        "next": [manifests["report"]["next"], *([] if for_encoders else FOLLOW)],
        "headline": [line for manifest in manifests.values() for line in manifest.get("headline", [])],
    }


def _run_stage(verb: Any, config: Config, force: bool) -> dict[str, Any]:
    try:
        return verb.run(config, force=False)
    except ConfigChanged:
        if not force:
            raise
        return verb.run(config, force=True)
