"""How workers share one optimizer step: whole copies (DDP), FSDP2 shards, DeepSpeed ZeRO; chosen by plain arguments."""

from ray_jobs.training.strategies.base import Strategy


def choose_strategy(name: str = "ddp", *, zero_stage: int = 2, offload: str = "none") -> Strategy:
    """Return a strategy for one run; DeepSpeed is imported only where it is chosen.

    Args:
        name: ddp, fsdp or deepspeed.
        zero_stage: what DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 parameters too.
        offload: what DeepSpeed keeps in host memory: none, optimizer, or (stage 3) parameters too.
    """
    if name == "fsdp":
        from ray_jobs.training.strategies.fsdp import Fsdp

        return Fsdp()
    if name == "deepspeed":
        from ray_jobs.training.strategies.deepspeed import DeepSpeed

        return DeepSpeed(zero_stage=zero_stage, offload=offload)
    from ray_jobs.training.strategies.ddp import Ddp

    return Ddp()
