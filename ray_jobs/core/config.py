"""The one config: TOML, then dotted overrides; frozen, unknown keys refused with the nearest known one.

Secrets are never fields: they come from the environment (`OPENAI_API_KEY`, `RAYSTILL_API_KEYS`).
"""

from typing import Annotated, Literal

from pydantic import Field

from ray_jobs.core.config_base import Dtype, Positive, Section, Share
from ray_jobs.core.config_distill import DistillSection, StudentSection
from ray_jobs.core.config_judge import JudgeSection
from ray_jobs.core.config_training import FinetuneSection, WorkersSection

__all__ = ["Config", "DistillSection", "FinetuneSection", "JudgeSection", "WorkersSection"]


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


class DataSection(Section):
    """[data] what the course is made of."""

    documents: list[str] = []
    """Files, folders or globs of Markdown, text, HTML and PDF."""
    pairs: list[str] = []
    """Files, folders or globs of ready question/answer pairs: JSONL, CSV or Parquet."""
    texts: list[str] = []
    """Files, folders or globs of rows with `text`, and `label` for classification: JSONL, CSV or Parquet; for encoders only."""
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
