"""The sections of [finetune], what [distill] shares with it, and [workers]."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_jobs.core.config_base import Dtype, Positive, Section, Share
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.sizes import parse_bytes


class LoraSection(Section):
    """[finetune.lora] low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Positive = 16
    """Rank r of the update BA."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: str | list[str] = "all-linear"
    """Modules that get an adapter: "all-linear" or a list of names such as ["q_proj", "v_proj"]."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (DoRA: Liu et al. 2024, arXiv:2402.09353)."""
    plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: learning rate of B over that of A (Hayou et al. 2024, arXiv:2402.12354); none trains both alike."""


class QuantizationSection(Section):
    """[finetune.quantization] how QLoRA stores the frozen base (Dettmers et al. 2023, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """4-bit data type, or int8 (LLM.int8: Dettmers et al. 2022, arXiv:2208.07339)."""
    double_quantization: bool = True
    """Quantize the 4-bit quantization constants too: 0.127 instead of 0.5 bit a parameter."""


class OptimSection(Section):
    """What finetune and distill have in common: steps, learning rate, batch, evaluation, checkpoints."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows."""
    max_steps: Positive | None = None
    """Optimizer steps; none lets `epochs` decide."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw keeps two float32 moments, the 8-bit ones a quarter of that; paged ones move to the host when a GPU runs full."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    global_batch_size: Positive = 8
    """Packed rows of one optimizer step, over all workers and accumulation steps."""
    micro_batch_size: Positive = 2
    """Packed rows of one forward pass on one worker."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dtype: Dtype = "auto"
    """Computation type; auto takes bfloat16 where the device has it, else float16 on GPUs, float32 on CPUs."""
    eval_every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step only."""
    checkpoint_every_steps: Positive = 10
    """Steps between checkpoints."""
    log_every_steps: Positive = 1
    """Steps between lines of metrics.jsonl."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept while training."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts from the last checkpoint after a worker is lost, before the job fails."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Rate of one worker that `raystill plan` reckons time with; none takes what this stage measured before in this run."""


class FinetuneSection(OptimSection):
    """[finetune] teach the teacher the course."""

    method: Literal["full", "lora", "qlora"] = "lora"
    """full trains every weight; lora adapters on a frozen base in `dtype`; qlora adapters on a quantized base."""
    merge: bool = False
    """Also write the adapter added into the base it was trained on as a plain model folder (`--merge`)."""
    lora: LoraSection = LoraSection()
    quantization: QuantizationSection = QuantizationSection()

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> "FinetuneSection":
        if self.method == "full":
            refuse_adapter_fields(self.lora, merge=self.merge)
        return self


def refuse_adapter_fields(lora: LoraSection, **further: bool) -> None:
    """Refuse fields that say something about an adapter where every weight is trained.

    Args:
        further: fields of the section itself.

    Raises:
        ValueError: names the first that is set.
    """
    asked = {"lora.rslora": lora.rslora, "lora.dora": lora.dora, "lora.plus_ratio": lora.plus_ratio, **further}
    for field, value in asked.items():
        if value:
            raise ValueError(
                f'{field} = {str(value).lower()} needs an adapter and method = "full" trains every weight: '
                f'remove it, or use method = "lora" or "qlora"'
            )


class WorkersSection(Section):
    """[workers] what one worker gets."""

    num_workers: Positive | tuple[Positive, Positive] = 1
    """Ray Train workers; [min, max] trains with as many as the cluster has, and goes on when nodes come or go."""
    cpus: Annotated[float, Field(gt=0)] = 2.0
    """CPUs of one worker; also its torch threads."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one worker."""
    memory: str = "16GiB"
    """Host memory one worker may use: scheduled by Ray, held and watched by the worker itself. GB is 10^9, GiB is 2^30."""
    gpu_memory: str = "16GiB"
    """Memory of a GPU one worker may use where `gpus` is above 0: what it is planned for, and held to."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """How workers share a step: whole copies, FSDP2 shards, or DeepSpeed ZeRO."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What DeepSpeed keeps in host memory: optimizer state, or (stage 3) parameters too."""

    @property
    def min_workers(self) -> int:
        """Fewest workers that may train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that may train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def memory_bytes(self) -> int:
        """The limit of host memory in bytes."""
        return parse_bytes(self.memory)

    @property
    def gpu_memory_bytes(self) -> int:
        """The limit of GPU memory in bytes."""
        return parse_bytes(self.gpu_memory)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where a worker computes: on a GPU only where it is given one, whatever its node has."""
        return "cuda" if self.gpus > 0 else "cpu"

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker asks of Ray."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}

    @model_validator(mode="after")
    def _fewest_first(self) -> "WorkersSection":
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers = [{self.min_workers}, {self.max_workers}]: write the smaller number first")
        if self.offload != "none" and self.strategy != "deepspeed":
            raise ValueError(f'offload = "{self.offload}" needs strategy = "deepspeed", not "{self.strategy}"')
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f'offload = "parameters" needs zero_stage = 3, not {self.zero_stage}')
        return self

    @model_validator(mode="after")
    def _memories_are_sizes(self) -> "WorkersSection":
        try:
            for size in (self.memory, self.gpu_memory):
                parse_bytes(size)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self
