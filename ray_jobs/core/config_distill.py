"""The sections of [student] and [distill]: which student, which loss, and where the teacher's word comes from."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_jobs.core.config_base import Positive, Section, Share, Weight
from ray_jobs.core.config_training import LoraSection, OptimSection, QuantizationSection, refuse_adapter_fields
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.sizes import parse_bytes

Task = Literal["language_model", "masked_language_model", "embedding", "classification"]
PRESETS: dict[str, dict[str, Any]] = {
    "distilbert": {"kd_temperature": 2.0, "kd_weight": 5.0, "ce_weight": 2.0, "hidden_weight": 1.0, "hidden_loss": "cosine"},
}
"""Fields of [distill] that a preset sets where the config does not."""


class StudentSection(Section):
    """[student] the model that learns from the teacher."""

    model: str | None = None
    """A model of its own (as in [teacher]); none builds the student from teacher layers."""
    layers: Positive | list[Annotated[int, Field(ge=0)]] = 20
    """Layers to keep of the teacher: a number, or their indices."""
    choose: Literal["even", "influence"] = "even"
    """How a number of layers is chosen: evenly spaced with first and last kept, or those that change the hidden states
    of the training text most (block influence: Men et al. 2024, arXiv:2403.03853)."""
    start: Literal["teacher", "random"] = "teacher"
    """Whether a student built from the teacher starts with its weights, or with random ones to compare with."""

    @model_validator(mode="after")
    def _choices_have_something_to_choose(self) -> "StudentSection":
        asked = {"choose": self.choose != "even", "start": self.start != "teacher"}
        for field in (field for field, is_set in asked.items() if is_set):
            if self.model is not None:
                raise ValueError(f'{field} = "{getattr(self, field)}" is for a student built from the teacher: remove it, or remove model')
        if self.choose == "influence" and not isinstance(self.layers, int):
            raise ValueError(f'choose = "influence" chooses a number of layers and layers = {self.layers} names them: remove one of both')
        return self


class PoolSection(Section):
    """[distill.pool] teachers in actors of their own, anywhere in the cluster."""

    num_actors: Positive | tuple[Positive, Positive] = 1
    """Actors that each hold the teacher; [min, max] grows while the student waits, and shrinks while actors are idle."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one actor; also its torch threads."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one actor."""
    memory: str = "16GiB"
    """Host memory one actor may use: scheduled by Ray, held by the actor itself."""
    ahead: Positive = 2
    """Steps whose targets are asked for before the student needs them."""

    @property
    def min_actors(self) -> int:
        """Fewest actors."""
        return self.num_actors if isinstance(self.num_actors, int) else self.num_actors[0]

    @property
    def max_actors(self) -> int:
        """Most actors."""
        return self.num_actors if isinstance(self.num_actors, int) else self.num_actors[1]

    @property
    def memory_bytes(self) -> int:
        """The limit of host memory in bytes."""
        return parse_bytes(self.memory)


class CacheSection(Section):
    """[distill.cache] targets kept for the next epoch, a resumed job, other students and sweeps."""

    folder: str | None = None
    """Folder or URI, shared by any number of runs; none keeps nothing."""
    keep: Literal["hidden", "top_k"] = "hidden"
    """hidden keeps final hidden states, from which all logits follow; top_k the likeliest tokens and the sum of the rest."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of what is kept; float32 makes epoch 2 equal epoch 1 to rounding where the teacher computes in float32."""
    top_k: Positive = 64
    """Tokens kept for each position with `keep = "top_k"`."""
    budget: str = "50GiB"
    """Size of one teacher's targets in one form from which nothing more of them is kept; what is missing is computed."""

    @property
    def rounds(self) -> bool | None:
        """True where the student learns from targets that a cache has rounded; else None, as without a cache."""
        return True if self.folder is not None and (self.keep == "top_k" or self.dtype != "float32") else None

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        return parse_bytes(self.budget)


class TextSection(Section):
    """[distill.text] who writes the answers that the student learns from with `targets = "text"`."""

    model: str = "teacher"
    """"teacher" is the fine-tuned teacher; else a model as in [teacher], or the name an endpoint knows."""
    base_url: str | None = None
    """OpenAI-compatible endpoint; none generates in the cluster."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the endpoint's key."""
    max_new_tokens: Positive = 256
    """Longest answer."""
    sampling_temperature: Weight = 0.0
    """0 is greedy."""
    max_concurrency: Positive = 8
    """Calls to the endpoint in flight."""


class OnPolicySection(Section):
    """[distill.on_policy] the student writes, the teacher scores (GKD: Agarwal et al. 2023, arXiv:2306.13649)."""

    share: Share = 0.0
    """Share of the steps whose answers the student writes itself, evenly spread."""
    max_new_tokens: Positive = 128
    """Longest answer."""
    sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the student's sampling."""


class OtherTeacherSection(Section):
    """[distill.teachers.NAME] a further teacher, for some of the training text."""

    model: str
    """As in [teacher]; must have the vocabulary of [teacher]."""
    sources: list[str] = []
    """Input files that it teaches, by name, folder or glob as in [data], or by a file name alone; empty for all."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its weight beside the other teachers of the same text: its share is this over the sum."""


class DistillSection(OptimSection):
    """[distill] teach the student what the teacher knows (Hinton et al. 2015, arXiv:1503.02531)."""

    task: Task = "language_model"
    """What both models are: decoders, BERT-type encoders with a masked-token head, sentence encoders, or classifiers.
    embedding has no distribution: kd_weight and ce_weight do not apply there."""
    preset: Literal["none", "distilbert"] = "none"
    """distilbert: temperature 2 and weights 5 / 2 / 1 of divergence, labels and cosine (Sanh et al. 2019, arXiv:1910.01108)."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"] = "forward_kl"
    """Between next-token distributions; forward_kl is KL(teacher || student)."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of jsd."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Weight of the teacher in the mixture of skewed_kl (Ko et al. 2024, arXiv:2402.03898)."""
    kd_temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softens both distributions in the divergence; its square scales the gradient back."""
    kd_weight: Weight = 0.9
    """Weight of the divergence."""
    ce_weight: Weight = 0.1
    """Weight of the cross-entropy on the labels."""
    hidden_weight: Weight = 0.0
    """Weight of the loss on hidden states; where widths differ they are projected, and the projection is not exported."""
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    """1 - cosine, or the mean squared error over the width."""
    hidden_layers: Literal["last", "mapped"] | list[tuple[int, int]] = "last"
    """Which layers' outputs meet: the last ones, each kept layer with its own, or [student, teacher] pairs from 0."""
    embedding_weight: Weight = 0.0
    """Weight of the loss on sentence embeddings (`task = "embedding"`): 1 - cosine of the mean-pooled outputs."""
    balance: Literal["none", "magnitude"] = "none"
    """magnitude rescales each further term to the size of the divergence before the weights apply."""
    vocabulary: Literal["same", "uld"] = "same"
    """uld compares sorted probabilities, for a student with another tokenizer (Boizard et al. 2024, arXiv:2402.12030)."""
    method: Literal["full", "lora", "qlora"] = "full"
    """How the student is trained, as in [finetune]; adapters are merged into the exported student."""
    lora: LoraSection = LoraSection()
    quantization: QuantizationSection = QuantizationSection()
    teacher_quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How the frozen teacher is stored where it is loaded for its targets."""
    targets: Literal["worker", "pool", "text"] = "worker"
    """Where the teacher speaks: in each worker, from `pool`, or beforehand in text alone."""
    pool: PoolSection = PoolSection()
    cache: CacheSection = CacheSection()
    text: TextSection = TextSection()
    on_policy: OnPolicySection = OnPolicySection()
    teachers: dict[str, OtherTeacherSection] = {}
    """Further teachers by name, each a table [distill.teachers.NAME] with `model`, `sources` and `weight`."""
    teacher_sources: list[str] = []
    """Input files that [teacher] itself teaches beside them, named as in `sources`; empty for all."""
    teacher_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of [teacher] beside the other teachers of the same text."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""

    @property
    def teacher_dtype(self) -> str:
        """Type of the teacher's products; with `dtype = "auto"` one for all actors of a pool, whose nodes may differ."""
        if self.targets != "pool" or self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.pool.gpus else "float32"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        return PRESETS.get(data.get("preset", "none"), {}) | data if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _some_loss(self) -> "DistillSection":
        if self.task == "embedding" and self.hidden_weight + self.embedding_weight == 0:
            raise ValueError('task = "embedding" learns by embedding_weight and hidden_weight, and both are 0: set embedding_weight = 1')
        if self.kd_weight + self.ce_weight + self.hidden_weight + self.embedding_weight == 0:
            raise ValueError("kd_weight, ce_weight, hidden_weight and embedding_weight are all 0: nothing to learn; set one above 0")
        if self.embedding_weight and self.task != "embedding":
            raise ValueError(f'embedding_weight = {self.embedding_weight} needs task = "embedding", not "{self.task}"')
        if self.on_policy.share and self.targets == "text":
            raise ValueError('on_policy.share above 0 needs a teacher that scores: use targets = "worker" or "pool"')
        return self

    @model_validator(mode="after")
    def _teachers_are_told_apart(self) -> "DistillSection":
        for name in self.teachers:
            if name == "teacher":
                raise ValueError("[distill.teachers.teacher] is the name of [teacher] itself: give the further teacher another")
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"[distill.teachers.{name}]: names have letters, digits, _ and - alone, as the term of each is logged by it"
                )
        alone = {"teacher_sources": [], "teacher_weight": 1.0} if not self.teachers else {}
        for field in (field for field, default in alone.items() if getattr(self, field) != default):
            raise ValueError(f"{field} = {getattr(self, field)} is for several teachers: leave it out, or add [distill.teachers.NAME]")
        return self

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> "DistillSection":
        if self.method == "full":
            refuse_adapter_fields(self.lora)
        return self

    @model_validator(mode="after")
    def _memories_are_sizes(self) -> "DistillSection":
        try:
            for size in (self.pool.memory, self.cache.budget):
                parse_bytes(size)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self
