"""`raystill JOB CONFIG [--section.field value]`: parses, then imports the job, then runs it."""

import argparse
import contextlib
import importlib
import json
import sys
from typing import Any

from ray_jobs import __version__
from ray_jobs.core.errors import ConfigError, JobError
from ray_jobs.core.interrupts import terminate_as_interrupt

JOBS = {
    "run": "the whole chain, stage by stage, resuming where it stopped",
    "plan": "what will it cost? memory per worker against the limit (no Ray, no weights)",
    "prepare": "documents -> clean chunks -> pairs -> packed token ids",
    "finetune": "teach the teacher the course",
    "distill": "teach the student what the teacher knows",
    "tune": "sweep finetune or distill over a named space",
    "answer": "questions -> answers of each model",
    "judge": "answers -> similarities and verdicts",
    "compress": "the student -> quantized and exported variants, and their table",
    "report": "everything a run wrote -> report.json, report.html, comparisons.csv",
    "serve": "endpoints for the run's teacher and student",
}
OTHER = {"submit": "any job above on a remote cluster", "jobs": "list, status, logs, stop of submitted jobs"}
FORCE_HELP = "run: make anew the stages that were made with other settings, and what builds on them; another job: make its stage anew"
MERGE_HELP = "finetune: also write the adapter added into its base as a plain model folder; a finished stage is only merged"
MODULES = {"run": "ray_jobs.pipeline"}
ENCODER_MODULES = {"distill": "ray_jobs.distill_encoder"}
"""Those of the jobs that do otherwise where `distill.task` is of encoders."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 1 failed, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in OTHER:
            return importlib.import_module("ray_jobs.submit").main(arguments)
        return _run_job(arguments)
    except JobError as error:
        print(f"raystill: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(interrupted(arguments), file=sys.stderr)
        return 130


def interrupted(arguments: list[str]) -> str:
    """Return what to say to an interrupted command: a stage with --force would start over, `run --force` would not."""
    how = "the same command without --force" if "--force" in arguments and "run" not in arguments else "the same command"
    return f"raystill: interrupted; {how} goes on from here"


def _run_job(arguments: list[str]) -> int:
    options, overrides = _parser().parse_known_args(arguments)
    from ray_jobs.core.config_file import load_config

    terminate_as_interrupt()
    if options.merge:
        if options.job != "finetune":
            raise ConfigError(f"--merge is finetune's alone, not of job {options.job!r}: run `raystill finetune CONFIG --merge`")
        overrides = [*overrides, "--finetune.merge", "true"]
    config = load_config(options.config, overrides)
    modules = MODULES | (ENCODER_MODULES if config.distill.task != "language_model" else {})
    module = importlib.import_module(modules.get(options.job, f"ray_jobs.{options.job}"))
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the summary alone, whatever a library prints
        summary = module.run(config, force=options.force)
    print(json.dumps(summary, ensure_ascii=False) if options.json else _for_people(summary, options.config))
    return 0


def _for_people(summary: dict[str, Any], config: str) -> str:
    follow = summary.get("next") or []
    commands = [follow] if isinstance(follow, str) else follow
    return "\n".join([*summary.get("headline", []), *(f"next: {command.replace('CONFIG', config)}" for command in commands)])


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, JOBS | OTHER))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in (JOBS | OTHER).items())
    parser = argparse.ArgumentParser(
        prog="raystill",
        usage="raystill JOB CONFIG [--section.field value ...] [--json] [--force] [--merge]",
        description=f"Teach a small language model what a large one knows, on Ray.\n\njobs:\n{listing}",
        epilog="The same command again resumes. Fields of CONFIG: docs/config.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("job", choices=list(JOBS), metavar="JOB", help="one of the jobs above")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, like ray_jobs/configs/demo.toml")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on stdout")
    parser.add_argument("--force", action="store_true", help=FORCE_HELP)
    parser.add_argument("--merge", action="store_true", help=MERGE_HELP)
    parser.add_argument("--version", action="version", version=f"raystill {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
