"""What a distillation can be refused for before anything starts, and the memory plan of its workers; loads no weights."""

from collections.abc import Sequence
from typing import Any

from ray_jobs.core.models import check_context, resolve_model
from ray_jobs.distillation.job import DistillJob
from ray_jobs.distillation.loss_checks import check_losses
from ray_jobs.distillation.plan import check_pool, distill_request, pool_plan
from ray_jobs.distillation.shares import share_out, teaching_of
from ray_jobs.distillation.sources import check_cache
from ray_jobs.distillation.teacher import check_teacher
from ray_jobs.training.alternatives import Limits
from ray_jobs.training.architecture import find_architecture
from ray_jobs.training.fit_check import check_fits, limits_of
from ray_jobs.training.job_plan import JobPlan
from ray_jobs.training.pairings import Pairing, refuse_pairing


def check_job(
    job: DistillJob, *, finetuned: dict[str, Any], workers: Any, pool_bytes: int, sources: Sequence[str] | None = None
) -> JobPlan:
    """Refuse a distillation that cannot be, and return its memory plan.

    Args:
        finetuned: fields of [finetune], which trains the teacher.
        workers: has the fields of [workers].
        pool_bytes: host memory of one actor of the pool.
        sources: names of those in the packed rows; none where there are no rows yet.

    Raises:
        ConfigError: layers that the teacher does not have, a student with another vocabulary, rows longer than a model's
            positions, a strategy that cannot work with the optimizer or a quantized student, adapters that the student cannot
            hold, or more memory than a worker has (the table is then on stderr).
        ModelError: a model cannot be found, or is quantized already where it is to be cut or stored in fewer bits.
    """
    section, start = job.distill, job.first_start()
    cache, lora, stored = section["cache"], section["lora"], section["quantization"]["type"]
    check_cache(cache["folder"], cache["keep"], kd_temperature=section["kd_temperature"])
    strategy = (workers.strategy, workers.zero_stage)
    refuse_pairing(Pairing(*strategy, section["optimizer"], section["method"], stored, lora["dora"]))
    if job.others and sources is not None:
        share_out(teaching_of(section), sources)
    for name in filter(None, (job.base, job.student["model"], *job.others.values())):
        check_context(resolve_model(name), name, job.row_tokens)
    job.student_from(start).check(job.student_settings, device=workers.device)
    has_magnitudes = finetuned["method"] != "full" and finetuned["lora"]["dora"]
    for name, dora in ((job.base, has_magnitudes), *((other, False) for other in job.others.values())):
        check_teacher(resolve_model(name), section["teacher_quantization"], dora=dora, device=workers.device)
    check_losses(
        section,
        student=job.student_settings,
        teacher=find_architecture(job.base).settings,
        start=start,
        cuts_parameters=strategy[0] == "fsdp" or strategy == ("deepspeed", 3),
    )
    return _memory_plan(job, finetuned, workers, pool_bytes)


def _memory_plan(job: DistillJob, finetuned: dict[str, Any], workers: Any, pool_bytes: int) -> JobPlan:
    teacher, gpus = find_architecture(job.base).settings, job.distill["pool"]["gpus"]
    models = {"teacher": teacher, "student": job.student_settings}
    models["others"] = [find_architecture(model).settings for model in job.others.values()]
    request = distill_request(job.distill, finetuned, length=job.row_tokens, workers=workers, **models)
    if job.distill["targets"] == "pool":
        limit = workers.gpu_memory_bytes if gpus else pool_bytes
        check_pool(pool_plan(request, gpus=gpus), Limits(limit, pool_bytes))
    return check_fits(request, limits_of(workers))
