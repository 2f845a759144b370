"""The sections of [judge]: who meets, who judges them, and what it may cost."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ray_jobs.core.config_base import Positive, Section, Share
from ray_jobs.core.records import OFFLINE

Model = Literal["base", "teacher", "student"]
Price = Annotated[float, Field(ge=0)] | None
FIRST = "openai"
"""The judge of [judge.openai], which every config has beside the offline one."""


class ModelJudgeSection(Section):
    """[judge.openai] a language model as judge: any OpenAI-compatible endpoint; the key is read from `api_key_env`."""

    model: str = "gpt-4o"
    """Model name the endpoint knows."""
    base_url: str | None = None
    """Endpoint; none is the provider's default."""
    local: str | None = None
    """A model as in [teacher] that judges in the cluster itself, in place of an endpoint: no key, no price."""
    backend: Literal["calls", "batch"] = "calls"
    """calls asks one by one, within the limit; batch hands all to the provider's batch endpoint: half the price, up to a day."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key."""
    requests_per_minute: Positive | None = None
    """The provider's limit for all callers together; none learns it from the endpoint's headers and refusals."""
    tokens_per_minute: Positive | None = None
    """As `requests_per_minute`, for prompt and reply together."""
    max_concurrency: Positive = 256
    """Calls in flight, at most, over all callers; the limit of the provider sets the pace below it."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Retries of one call after 408, 409, 5xx or a lost connection; a refusal for pace (429) is waited out."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest wait for one reply."""
    max_tokens: Positive = 800
    """Longest reply."""
    structured: bool = True
    """Ask for the reply by JSON schema; false for endpoints that refuse `response_format`."""
    usd_per_million_prompt_tokens: Price = None
    """Price; none takes the dated default of a known model on the provider's own endpoint, else leaves the cost unknown."""
    usd_per_million_completion_tokens: Price = None
    """As `usd_per_million_prompt_tokens`."""

    @field_validator("base_url")
    @classmethod
    def _base_url_is_one(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise ValueError('write it like "https://HOST/v1"')
        return url

    @model_validator(mode="after")
    def _one_back_end(self) -> "ModelJudgeSection":
        if self.local is not None and self.backend == "batch":
            raise ValueError('backend = "batch" is for an endpoint, and local names a model of our own: remove one of both')
        return self


class JudgeSection(Section):
    """[judge] answers to similarities and verdicts."""

    pairs: list[tuple[Model, Model]] = [("base", "teacher"), ("teacher", "student")]
    """Which models meet."""
    judges: list[str] = [OFFLINE]
    """coverage works offline; openai asks [judge.openai]; else a name of [judge.jury]. Imported verdicts need not be named."""
    vectors: str = "glove-6b-50d"
    """Word vectors: built-in name, a GloVe, word2vec, fastText or gensim file, or course: trained on what prepare wrote."""
    tie_band: Share = 0.01
    """Cosine differences up to this share of the spread over wrong references count as a tie."""
    min_known_share: Share = 0.85
    """Below this share of words with a vector an answer or sample answer gets no similarity. The embedded English
    vectors know at least 0.91 of each English sample answer of the course and at most 0.83 of each German one."""
    coverage_model: str = "minilm-l6"
    """Sentence encoder of the coverage judge. The built-in one was trained on English: of German it is less sure."""
    coverage_threshold: Share = 0.6
    """Cosine from which a statement of the sample answer counts as covered."""
    coverage_margin: Share = 0.05
    """Difference in mean coverage up to which the coverage judge calls a tie."""
    rubric: str | None = None
    """Text file with the question to a judge in your words; it must have {question}, {reference}, {first} and {second}."""
    repeats: Positive = 1
    """How often each order is asked; from 2 on the judge card tells repeat stability from the order's doing."""
    canaries: Annotated[int, Field(ge=0)] = 4
    """Games with a planted instruction that each language-model judge is asked beside the others, for its card alone."""
    num_callers: Positive = 1
    """Actors that send calls; all of them keep to one limit."""
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    """No call is sent that could pass this sum, over all judges and earlier runs of this command; what is in flight is finished."""
    max_calls: Positive | None = None
    """As `budget_usd`, in calls."""
    openai: ModelJudgeSection = ModelJudgeSection()
    jury: dict[str, ModelJudgeSection] = {}
    """Further judges by name, each a table [judge.jury.NAME] with the fields of [judge.openai]."""
    imports: dict[str, str] = {}
    """Files with verdicts or scores from elsewhere, by the name of their judge; `human` are people's, and calibrate the other judges."""

    @model_validator(mode="after")
    def _judges_are_known(self) -> "JudgeSection":
        known = [OFFLINE, FIRST, *self.jury]
        for name in self.judges:
            if name not in known:
                raise ValueError(f"judges names {name!r}, which is none of {known}: add [judge.jury.{name}] or drop it")
        for name in (*self.jury, *self.imports):
            if name in {OFFLINE, FIRST} or (name in self.jury and name in self.imports):
                raise ValueError(f"two judges would be called {name!r}: rename one")
        return self

    def model_judges(self) -> dict[str, ModelJudgeSection]:
        """Return the language models among the judges, by name."""
        return {name: self.openai if name == FIRST else self.jury[name] for name in self.judges if name != OFFLINE}
