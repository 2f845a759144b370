"""The one config: TOML, then dotted overrides; frozen, unknown keys refused with the nearest known one.

Secrets are never fields: they come from the environment (`OPENAI_API_KEY`, `RAYSTILL_API_KEYS`).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.sizes import parse_bytes

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, field docs from docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """[run] where the run lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Folder of this run below `storage`: letters, digits, dot, dash, underscore."""
    storage: str = "runs"
    """Any filesystem URI that pyarrow opens: a folder, s3://..., gs://..."""
    seed: int = 0
    """Seed of every random choice."""
    stages_from: list[str] = []
    """Other runs (STORAGE/NAME folders or URIs): a stage that this run has not started is read from the first that has it."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = ["tensorboard"]
    """Who gets the training metrics beside metrics.jsonl; mlflow and wandb need their package."""


class TeacherSection(Section):
    """[teacher] the model that learns the course, and then teaches."""

    model: str = "smollm2-135m-instruct"
    """Hub id, local or remote folder, GGUF file, or a built-in name."""


class StudentSection(Section):
    """[student] the model that learns from the teacher."""

    model: str | None = None
    """A model of its own (as in [teacher]); none builds the student from teacher layers."""
    layers: Positive | list[Annotated[int, Field(ge=0)]] = 20
    """Layers to keep of the teacher: a number (evenly spaced, first and last kept) or their indices."""


class DataSection(Section):
    """[data] what the course is made of."""

    documents: list[str] = []
    """Files, folders or globs of Markdown, text, HTML and PDF."""
    pairs: list[str] = []
    """Files, folders or globs of ready question/answer pairs: JSONL, CSV or Parquet."""
    questions: str | None = None
    """Evaluation questions with `question` and `reference`: JSONL, CSV or Parquet."""
    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens of one packed training row."""
    chunk_tokens: Annotated[int, Field(ge=16)] = 256
    """Token budget of one chunk of a document."""
    train_on_chunks: bool = True
    """Whether the chunks themselves are training text, beside the pairs."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of examples held out for the evaluation loss."""
    near_duplicate: Share = 0.8
    """Jaccard similarity of word 3-grams (MinHash estimate) from which an example counts as a repeat."""
    pairs_per_chunk: Annotated[int, Field(ge=0)] = 0
    """Question/answer pairs that `pair_writer` writes from each chunk; 0 writes none."""
    pair_writer: str = "smollm2-135m-instruct"
    """The model that writes pairs from chunks."""
    system_prompt: str = ""
    """System message of every training example and every question; empty for the template's own."""


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
            lora = self.lora
            asked = {"lora.rslora": lora.rslora, "lora.dora": lora.dora, "lora.plus_ratio": lora.plus_ratio, "merge": self.merge}
            for field, value in asked.items():
                if value:
                    raise ValueError(
                        f'{field} = {str(value).lower()} needs an adapter and method = "full" trains every weight: '
                        f'remove it, or use method = "lora" or "qlora"'
                    )
        return self


class DistillSection(OptimSection):
    """[distill] teach the student what the teacher knows (Hinton et al. 2015, arXiv:1503.02531)."""

    kd_temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softens both distributions in the divergence; its square scales the gradient back."""
    kd_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of KL(teacher || student)."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy on the labels."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""

    @model_validator(mode="after")
    def _some_loss(self) -> "DistillSection":
        if self.kd_weight + self.ce_weight == 0:
            raise ValueError("kd_weight and ce_weight are both 0: nothing to learn; set one above 0")
        return self


class AnswerSection(Section):
    """[answer] questions to answers."""

    models: list[Literal["base", "teacher", "student"]] = ["base", "teacher", "student"]
    """Who answers: the untouched base, the fine-tuned teacher, the distilled student."""
    max_new_tokens: Positive = 160
    """Longest answer."""
    sampling_temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy."""
    batch_size: Positive = 16
    """Questions generated together by one actor."""
    num_actors: Positive = 1
    """Actors, each holding one model."""
    dtype: Dtype = "auto"
    """Computation type, as in [finetune]."""


class OpenAIJudgeSection(Section):
    """[judge.openai] any OpenAI-compatible endpoint; the key is read from `api_key_env`."""

    model: str = "gpt-4o"
    """Model name the endpoint knows."""
    base_url: str | None = None
    """Endpoint; none is the provider's default."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key."""
    max_concurrency: Positive = 8
    """Calls in flight."""
    max_retries: Annotated[int, Field(ge=0)] = 4
    """Retries of one call after 408, 409, 429, 5xx or a lost connection."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest wait for one reply."""
    max_tokens: Positive = 800
    """Longest reply."""
    structured: bool = True
    """Ask for the reply by JSON schema; false for endpoints that refuse `response_format`."""
    usd_per_million_prompt_tokens: Annotated[float, Field(ge=0)] | None = None
    """Price, for the cost column; none leaves the cost unknown."""
    usd_per_million_completion_tokens: Annotated[float, Field(ge=0)] | None = None
    """Price, for the cost column; none leaves the cost unknown."""


class JudgeSection(Section):
    """[judge] answers to similarities and verdicts."""

    pairs: list[tuple[Literal["base", "teacher", "student"], Literal["base", "teacher", "student"]]] = [
        ("base", "teacher"),
        ("teacher", "student"),
    ]
    """Which models meet."""
    judges: list[Literal["coverage", "openai"]] = ["coverage"]
    """coverage works offline; openai asks an endpoint."""
    vectors: str = "glove-6b-50d"
    """Word vectors: built-in name, or a GloVe, word2vec or gensim file."""
    tie_band: Share = 0.01
    """Cosine differences up to this share of the spread over wrong references count as a tie."""
    min_known_share: Share = 0.85
    """Below this share of words with a vector an answer or sample answer gets no similarity. The embedded English
    vectors know at least 0.91 of each English sample answer of the course and at most 0.83 of each German one."""
    coverage_model: str = "minilm-l6"
    """Sentence encoder of the coverage judge."""
    coverage_threshold: Share = 0.6
    """Cosine from which a statement of the sample answer counts as covered."""
    coverage_margin: Share = 0.05
    """Difference in mean coverage up to which the coverage judge calls a tie."""
    openai: OpenAIJudgeSection = OpenAIJudgeSection()


class CompressSection(Section):
    """[compress] the student's variants, and who they are compared with."""

    variants: list[Literal["torch-int8", "openvino-fp32", "openvino-int8", "onnx-fp32", "onnx-int8"]] = [
        "torch-int8",
        "openvino-fp32",
        "openvino-int8",
        "onnx-int8",
    ]
    """What is made of the student."""
    num_questions: Positive = 3
    """Questions timed for latency and tokens a second."""
    new_tokens: Positive = 32
    """Tokens generated for each timed question."""
    num_rows: Positive = 8
    """Held-out packed rows for the quality column."""
    repetitions: Positive = 2
    """Timed repetitions, interleaved over the variants; the median counts."""


class TuneSection(Section):
    """[tune] a sweep over a named space."""

    job: Literal["finetune", "distill"] = "finetune"
    """What each trial runs."""
    space: str = "lora_rank"
    """A named space: lora_rank or lora_rank_and_learning_rate (finetune), kd_temperature or soft_targets (distill)."""
    metric: str = "auto"
    """The smallest of this number of the job's evaluation wins; auto is teacher_nats or kl_after_nats."""
    num_samples: Positive = 1
    """Draws from the space; a grid is drawn once for each sample."""
    max_concurrent_trials: Positive = 1
    """Trials at once."""
    time_budget_s: Annotated[float, Field(gt=0)] = 3600.0
    """The sweep ends after this time with what it has."""


class ServeSection(Section):
    """[serve] endpoints."""

    host: str = "127.0.0.1"
    """Bind address; anything but loopback needs RAYSTILL_API_KEYS."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """HTTP port."""
    num_replicas: Positive = 1
    """Replicas of each model."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one replica."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica."""
    max_queued: Positive = 32
    """Requests waiting for one model before 429."""
    max_new_tokens: Positive = 512
    """Upper bound of max_tokens in a request."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 180.0
    """Longest wait for the endpoints to become ready."""


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


class Config(Section):
    """Everything one run needs to know."""

    run: RunSection
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    data: DataSection = DataSection()
    finetune: FinetuneSection = FinetuneSection()
    distill: DistillSection = DistillSection()
    answer: AnswerSection = AnswerSection()
    judge: JudgeSection = JudgeSection()
    compress: CompressSection = CompressSection()
    tune: TuneSection = TuneSection()
    serve: ServeSection = ServeSection()
    workers: WorkersSection = WorkersSection()
