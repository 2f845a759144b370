"""Sweep finetune or distill over a named space: each trial is a run of its own that reads this run's earlier stages.

A trial's folder is named by its point, so a sweep that was killed finds its finished trials again.
"""

import difflib
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ray_jobs.core.autoscaling import groups_fitting
from ray_jobs.core.cluster import connect, node_resources, require
from ray_jobs.core.config import Config
from ray_jobs.core.config_file import to_toml, validate
from ray_jobs.core.errors import ClusterError, ConfigError, StageMissing, TrainingFailed
from ray_jobs.core.progress import Bar, say
from ray_jobs.core.records import content_id
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.storage import Storage

Point = dict[str, Any]


class Sweep(NamedTuple):
    """What a sweep of one job reads, and the numbers it may minimise (the first unless told)."""

    after: list[str]
    sections: list[str]
    metrics: list[str]


SWEEPS = {
    "finetune": Sweep(["prepare"], ["teacher", "finetune"], ["teacher_nats"]),
    "distill": Sweep(["prepare", "finetune"], ["teacher", "student", "distill"], ["kl_after_nats", "ce_after_nats"]),
}
OWN_FIELDS = ["tune.job", "tune.space", "tune.metric", "tune.num_samples"]


def check(config: Config) -> None:
    """Refuse what cannot become a sweep.

    Raises:
        ConfigError: the space or metric is not the job's, varies adapters that there are none of, or each point would be tried twice.
    """
    from tune_spaces.search import repeats

    settings = config.tune
    if config.distill.task != "language_model":
        raise ConfigError(
            f'sweeps are of language models, and distill.task = "{config.distill.task}": run `raystill distill` for each point'
        )
    _one_of("metric", settings.metric, ["auto", *SWEEPS[settings.job].metrics], settings.job)
    space = _param_space(config)
    adapters = [key for key in space if key.startswith("finetune.lora.")]
    if adapters and config.finetune.method == "full":
        raise ConfigError(
            f'[tune] space = {settings.space!r} varies {adapters[0]}, and finetune.method = "full" has no adapter: use lora or qlora'
        )
    if repeats(space, num_samples=settings.num_samples):
        raise ConfigError(f"[tune] num_samples = {settings.num_samples} would try each point of {settings.space!r} again: use 1")


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Run the sweep and return its manifest; writes results.json (best first) and best.toml.

    A sweep that its time budget ended is not finished: the same command goes on with the trials that are left.

    Raises:
        ConfigError: as `check`, or nothing is held out to compare trials by.
        TrainingFailed: no trial gave a result.
    """
    check(config)
    sweep = SWEEPS[config.tune.job]
    run_folder = RunFolder(config)
    if not run_folder.finished("prepare")["counts"]["eval_rows"]:
        raise ConfigError("nothing was held out to compare trials by: prepare the course with [data] eval_share above 0")
    stage = run_folder.stage("tune", sections=[*sweep.sections, *OWN_FIELDS], after=sweep.after, force=force)
    if stage.manifest:
        say("tune: done already")
        return stage.manifest
    metric = sweep.metrics[0] if config.tune.metric == "auto" else config.tune.metric
    with connect():
        rows, num_trials = _sweep(config, metric, stage.folder)
    rows.sort(key=lambda row: row["eval"].get(metric, math.inf))
    stage.folder.write_json("results.json", rows)
    num = {status: sum(row["status"] == status for row in rows) for status in ("done", "failed")}
    if not num["done"]:
        reason = next((row["reason"] for row in rows), "the time budget ended before the first trial")
        raise TrainingFailed(f"no trial of {num_trials} gave a {metric} ({reason}): see {stage.folder.uri}/results.json")
    best = _child(config, rows[0]["values"], storage=config.run.storage, name=f"{config.run.name[:59]}-best")
    stage.folder.write_bytes("best.toml", to_toml(best).encode())
    facts = {
        "counts": {"trials": num_trials, **num},
        "metric": metric,
        "best": rows[0],
        "headline": [f"tune: {num['done']} of {num_trials} trials gave a result, best {metric} first", *_table(rows, metric)],
        "next": f"raystill {config.tune.job} {stage.folder.uri}/best.toml",
    }
    if sum(num.values()) < num_trials:
        return {"stage": "tune", **facts, "next": "the same command with more [tune] time_budget_s runs the trials that are left"}
    return stage.finish(**facts)


def _sweep(config: Config, metric: str, folder: Storage) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each started trial, and the number of trials that the space asks for."""
    from tune_spaces.search import num_trials, search

    settings, workers = config.tune, config.workers
    space = _param_space(config)
    total = num_trials(space, num_samples=settings.num_samples)
    require("[workers]", workers.bundle, workers.max_workers)
    max_concurrent = num_concurrent(settings.max_concurrent_trials, workers.bundle, workers.max_workers, node_resources())
    make_child = functools.partial(_child, config, storage=folder.sub("trials").uri)
    ended = []
    with Bar("tune", "trial") as bar:

        def on_end(point: Point, failed: bool) -> None:
            ended.append(point)
            bar(len(ended), total, "")
            say(f"tune: {len(ended)}/{total} {_words(point)}: {'failed' if failed else 'ended'}")

        folder.delete("ray")
        outcomes = search(
            _trial(settings.job, make_child, metric),
            space,
            seed=config.run.seed,
            num_samples=settings.num_samples,
            max_concurrent=max_concurrent,
            time_budget_s=settings.time_budget_s,
            folder=folder.root,
            filesystem=None if folder.is_local else folder.fs,
            on_end=on_end,
        )
        folder.delete("ray")
    return [_row(settings.job, make_child(point), point, reason) for point, reason in outcomes], total


def num_concurrent(at_most: int, bundle: dict[str, float], num_workers: int, nodes: list[dict[str, float]]) -> int:
    """Return how many trials run at once: each takes its workers and a process of its own.

    Raises:
        ClusterError: not even one fits, though its workers do.
    """
    from tune_spaces.search import TRIAL_BUNDLE

    found = groups_fitting([bundle] * num_workers + [TRIAL_BUNDLE], nodes, at_most=at_most)
    if not found:
        raise ClusterError(
            f"[workers] leave no room for a trial's own process ({TRIAL_BUNDLE['memory'] / 2**30:g} GiB memory) beside "
            f"{num_workers} x {bundle.get('memory', 0) / 2**30:g} GiB: lower [workers] memory or num_workers, or add nodes"
        )
    return found


def _trial(job: str, make_child: Callable[[Point], Config], metric: str) -> Callable[[Point], None]:
    def trial(point: Point) -> None:
        from ray import tune

        manifest = importlib.import_module(f"ray_jobs.{job}").run(make_child(point), force=False)
        tune.report({metric: manifest["eval"][metric]})

    return trial


def _child(config: Config, point: Point, *, storage: str, name: str = "") -> Config:
    """Return the config with a point's values, as a run of its own that reads the earlier stages of this one."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for key, value in point.items():
        *sections, field = key.split(".")
        functools.reduce(dict.__getitem__, sections, tree)[field] = value
    stages_from = [RunFolder(config).storage.uri, *config.run.stages_from]
    tree["run"] |= {"storage": storage, "name": name or content_id(point), "stages_from": stages_from}
    return validate(tree)


def _row(job: str, child: Config, point: Point, reason: str) -> dict[str, Any]:
    """Return what the trial's own manifest says, so that nothing a killed sweep remembered can be stale."""
    row = {"trial": child.run.name, "values": point, "status": "done", "reason": "", "eval": {}}
    try:
        manifest = RunFolder(child).finished(job)
    except StageMissing:
        return {**row, "status": "failed" if reason else "unfinished", "reason": reason or "the time budget ended first"}
    return {**row, "eval": manifest["eval"], "seconds": manifest["seconds"]}


def _param_space(config: Config) -> Point:
    from tune_spaces import SPACES

    own = [name for name, (job, _) in SPACES.items() if job == config.tune.job]
    _one_of("space", config.tune.space, own, config.tune.job)
    return SPACES[config.tune.space][1]()


def _one_of(field: str, value: str, allowed: list[str], job: str) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"write one of {', '.join(allowed)}"
        raise ConfigError(f"[tune] {field} = {value!r} is no {field} of {job}: {hint}")


def _words(point: Point) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" for key, value in point.items())


def _table(rows: list[dict[str, Any]], metric: str) -> list[str]:
    lines = []
    for row in rows:
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in sorted(row["eval"].items(), key=lambda item: item[0] != metric))
        lines.append(f"  {_words(row['values'])}: {numbers or row['reason']}")
    return lines
