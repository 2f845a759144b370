"""What will it cost? Memory per worker of each method against the limit, from the model's config alone: no Ray, no weights."""

import logging
from typing import TYPE_CHECKING, Any

from ray_jobs.core.config import Config, parse_bytes

if TYPE_CHECKING:
    from ray_jobs.training.architecture import Architecture
    from ray_jobs.training.memory_plan import Memory, Work

GB = 10**9
_COLUMNS = ("weights", "constants", "teacher", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Return the memory of base, LoRA, QLoRA and distillation for one worker, and whether each fits.

    A worker with a GPU is held to `[workers] gpu_memory`, one without to `[workers] memory`.

    Raises:
        ModelError: no config.json under the model's name.
        ConfigError: student layers, LoRA targets or a rank that the model cannot have.
    """
    from ray_jobs.training.architecture import find_architecture

    del force  # nothing is kept
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    teacher = find_architecture(config.teacher.model)
    limit = parse_bytes(getattr(config.workers, _limit_field(config)))
    plans, configured = _plans(config, teacher)
    rows = [{"job": job, **plan._asdict(), "total": plan.total, "fits": plan.total <= limit} for job, plan in plans]
    first = next((row["method"] for row in rows if row["job"] == "finetune" and row["fits"]), None)
    return {
        "stage": "plan",
        "model": config.teacher.model,
        "architecture": teacher.source,
        "limit_bytes": limit,
        "configured": configured,
        "first_that_fits": first,
        "rows": rows,
        "headline": [
            *_introduction(config, teacher.source, limit),
            "",
            *_table(rows, first),
            "",
            *_verdict(config, rows, configured, first),
        ],
        "next": _next(rows, configured),
    }


def _plans(config: Config, teacher: "Architecture") -> tuple[list[tuple[str, "Memory"]], str]:
    """Return (job, plan) for each method, and the name of the one that the config asks finetune for."""
    import torch

    from ray_jobs.training.memory_plan import Lora, plan_base, plan_lora
    from ray_jobs.training.models import Quantization

    section, settings = config.finetune, teacher.settings
    lora = Lora(section.lora.rank, section.lora.targets)
    work = _work(config, section)
    plain = [Quantization(section.quantization.type, double_quantization=dq) for dq in (False, True)]
    base = [plan_base(settings, dtype=dtype, device=work.device) for dtype in (torch.float32, torch.float16)]
    adapted = [plan_lora(settings, lora=lora, work=work, quantization=q) for q in (None, *plain)]
    configured = adapted[0 if section.method == "lora" else 1 + section.quantization.double_quantization]
    plans = [("base", plan) for plan in base] + [("finetune", plan) for plan in adapted]
    return [*plans, ("distill", _distillation(config, teacher))], configured.method


def _distillation(config: Config, teacher: "Architecture") -> "Memory":
    from ray_jobs.distillation.layers import choose_layers
    from ray_jobs.distillation.student import shrink_config
    from ray_jobs.training.architecture import find_architecture
    from ray_jobs.training.memory_plan import plan_distill

    if config.student.model:
        student = find_architecture(config.student.model).settings
    else:
        student = shrink_config(teacher.config, choose_layers(teacher.config.num_hidden_layers, config.student.layers)).to_dict()
    return plan_distill(teacher.settings, student, work=_work(config, config.distill))


def _work(config: Config, section: Any) -> "Work":
    import torch

    from ray_jobs.training.memory_plan import Work
    from ray_jobs.training.models import choose_dtype

    device = config.workers.device
    # Which GPU a worker will get is not known here; both types that auto may choose there have 16 bits.
    dtype = torch.bfloat16 if device == "cuda" and section.dtype == "auto" else choose_dtype(section.dtype)
    return Work(section.micro_batch_size, config.data.max_length, dtype, section.gradient_checkpointing, device)


def _limit_field(config: Config) -> str:
    return "gpu_memory" if config.workers.gpus > 0 else "memory"


def _introduction(config: Config, source: str, limit: int) -> list[str]:
    section = config.finetune
    worker = f"{'GPU' if config.workers.gpus > 0 else 'CPU'} worker of {getattr(config.workers, _limit_field(config))}"
    return [
        f"plan: {config.teacher.model} (architecture from {source}), one {worker} = {limit / GB:.2f} GB",
        f"finetune: {section.micro_batch_size} x {config.data.max_length} tokens at once"
        + (", activations recomputed" if section.gradient_checkpointing else "")
        + f"; distill: {config.distill.micro_batch_size} x {config.data.max_length}",
    ]


def _table(rows: list[dict[str, Any]], first: str | None) -> list[str]:
    width = max(len(row["method"]) for row in rows)
    lines = [f"{'GB per worker':<{width}} " + " ".join(f"{name:>11}" for name in _COLUMNS) + f" {'total':>8}  fits"]
    for row in rows:
        cells = " ".join(f"{row[name] / GB:>11.3f}" if row[name] else f"{'-':>11}" for name in _COLUMNS)
        mark = "  <- first that fits" if row["method"] == first else ""
        lines.append(f"{row['method']:<{width}} {cells} {row['total'] / GB:>8.2f}  {'yes' if row['fits'] else 'no'}{mark}")
    return lines


def _verdict(config: Config, rows: list[dict[str, Any]], configured: str, first: str | None) -> list[str]:
    chosen = next(row for row in rows if row["method"] == configured)
    distill, field = rows[-1], _limit_field(config)
    way_out = f"; first that fits: {first}" if first else f"; no method fits: raise [workers] {field} or take a smaller model"
    return [
        f"finetune as configured ({configured}): {_fits(chosen)}{'' if chosen['fits'] else way_out}",
        f"distill as configured: {_fits(distill)}"
        + ("" if distill["fits"] else f"; keep fewer student.layers, name a smaller student.model, or raise [workers] {field}"),
    ]


def _fits(row: dict[str, Any]) -> str:
    return f"{row['total'] / GB:.2f} GB, {'fits' if row['fits'] else 'does not fit'}"


def _next(rows: list[dict[str, Any]], configured: str) -> str:
    fits = {row["job"]: row["fits"] for row in rows if row["method"] == configured or row["job"] == "distill"}
    if all(fits.values()):
        return "raystill run CONFIG"
    return (
        "raystill prepare CONFIG, then raystill finetune CONFIG"
        if fits["finetune"]
        else "the same with --workers.memory or --finetune.method"
    )
