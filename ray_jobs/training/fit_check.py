"""Every training job's first step: predict its memory, refuse what cannot fit, and afterwards set the prediction against the peak."""

from typing import Any

import torch

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.progress import say
from ray_jobs.core.sizes import both_units
from ray_jobs.training.alternatives import Limits, methods, obstacle, smallest_change
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.memory_plan import Lora, Request, Work, predict
from ray_jobs.training.models import Quantization, choose_dtype
from ray_jobs.training.plan_table import method_table, row_of
from ray_jobs.training.sharding_plan import Sharding
from ray_jobs.training.teaching_plan import Teaching


def request_of(
    section: dict[str, Any], *, settings: dict[str, Any], length: int, workers: Any, teaching: Teaching | None = None
) -> Request:
    """Return the job that a config asks for.

    Args:
        section: fields of [finetune], or of [distill].
        settings: config.json of the model to train.
        length: tokens of a packed row.
        workers: has strategy, zero_stage, offload, min_workers and gpus, as [workers] has.
        teaching: who teaches it, in distillation.
    """
    device = "cuda" if workers.gpus > 0 else "cpu"
    # Which GPU a worker will get is not known here; both types that auto may choose there have 16 bits.
    dtype = torch.bfloat16 if device == "cuda" and section["dtype"] == "auto" else choose_dtype(section["dtype"])
    work = Work(section["micro_batch_size"], length, dtype, section["gradient_checkpointing"], device)
    sharding = Sharding(workers.strategy, workers.min_workers, workers.zero_stage, workers.offload)
    lora = section["lora"]
    targets = lora["targets"] if isinstance(lora["targets"], str) else tuple(lora["targets"])
    adapter = Lora(lora["rank"], targets, lora["dora"])
    return Request(
        settings, section["method"], work, adapter, Quantization(**section["quantization"]), section["optimizer"], teaching, sharding
    )


def limits_of(workers: Any) -> Limits:
    """Return what [workers] gives one worker."""
    return Limits(workers.gpu_memory_bytes if workers.gpus > 0 else workers.memory_bytes, workers.memory_bytes)


def check_fits(request: Request, limits: Limits) -> JobPlan:
    """Return the plan of a job that fits; one that does not prints its table first.

    Raises:
        ConfigError: a worker would need more than its limit, or could not read the model.
    """
    memory = predict(request)
    plan = JobPlan(memory.parts, memory.total, limits.limit, smallest_change(request, limits), memory.host_total, limits.host)
    if plan.fits:
        if reason := obstacle(request, limits):
            raise ConfigError(f"{memory.method} cannot start: {reason}")
        return plan
    jobs = methods(request) if request.teaching is None else [request]
    rows = [row_of("finetune" if request.teaching is None else "distill", predict(job), limits) for job in jobs]
    first = next((row["method"] for row in rows if row["fits"]), None)
    for line in method_table(rows, first=first, configured=memory.method):
        say(line)
    alternative = f"; first method that fits: {first}" if first else ""
    raise ConfigError(shortage(memory.method, plan, on_gpu=request.work.device == "cuda") + alternative)


def shortage(method: str, plan: JobPlan, *, on_gpu: bool) -> str:
    """Return what a job that does not fit needs, what it is given, and the cheapest way out.

    Args:
        method: the job, for people.
        on_gpu: whether its workers compute on one.
    """
    needed, given = (plan.total, plan.limit) if plan.total > plan.limit else (plan.host_total, plan.host_limit)
    field = "gpu_memory" if on_gpu and plan.total > plan.limit else "memory"
    return (
        f"{method} needs {both_units(needed)} a worker, most of it {plan.largest()}, and [workers] {field} gives "
        f"{both_units(given)}: {plan.smallest_change}"
    )


def against_measured(plan: JobPlan | None, result: dict[str, Any]) -> dict[str, Any]:
    """Return the prediction beside the largest worker's peak, as `predicted_bytes`, `measured_bytes`, `error` and `line`.

    Args:
        plan: of the job; none gives an empty dictionary.
        result: has `peak_bytes`, and `gpu_peak_bytes` with GPUs: one for each rank.
    """
    if plan is None:
        return {}
    measured = max(result.get("gpu_peak_bytes") or [0]) or max(result["peak_bytes"])
    error = plan.total / measured - 1
    kept = "" if plan.is_tight else ", freed memory kept for speed"
    line = f"memory: predicted {plan.total / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB ({error:+.0%}{kept})"
    return {"predicted_bytes": plan.total, "measured_bytes": measured, "error": round(error, 4), "line": line}
