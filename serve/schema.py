"""What goes over the wire: the part of OpenAI's API that is answered here, its error objects, and the app's arguments.

A field outside this part is refused by name: a client never believes that an ignored setting was obeyed.
"""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.engines import Completion, Prompt


class ModelArgs(BaseModel):
    """One served model.

    `model` is anything `resolve_model` takes; `adapter` is the folder of a PEFT adapter to merge into it.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    adapter: str | None = None


class ServeArgs(BaseModel):
    """Arguments of `serve.app:build_app`, in Python and in Serve's YAML."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    models: dict[str, ModelArgs]
    """Model name of a request -> what answers it."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas of each model."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one replica; also its torch threads."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica."""
    max_queued: Annotated[int, Field(ge=1)] = 32
    """Requests waiting for one model before 429."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Upper bound of max_tokens, and its default."""
    key_digests: list[str] = []
    """SHA-256 (hex) of each API key; none lets everyone in. Digests, as Serve keeps arguments readable in the cluster."""


class ApiError(Exception):
    """An error as OpenAI clients understand it: a status and an error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s else {}

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat; text parts are joined."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def turn(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What chat and text completions have in common. Fields with one allowed value exist for clients that send it."""

    model_config = ConfigDict(extra="forbid")
    prompt_field: ClassVar[str]
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: int | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    user: str | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    top_p: Annotated[float, Field(ge=1, le=1)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, Mapping) else data

    @property
    def prompt_text(self) -> Prompt:
        """What the engine continues."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """The most tokens asked for, if any."""
        return self.max_tokens


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompt_text(self) -> Prompt:
        """The chat's turns."""
        return [message.turn for message in self.messages]

    @property
    def limit(self) -> int | None:
        """The most tokens asked for, by the new name or the old."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt_field: ClassVar[str] = "prompt"
    prompt: Annotated[str, Field(min_length=1)]

    @property
    def prompt_text(self) -> Prompt:
        """The text to continue."""
        return self.prompt


class Reply:
    """One reply's objects: whole, or chunk by chunk. Subclasses say how a choice looks."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str):
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, completion: Completion) -> dict[str, Any]:
        """Return the object of an unstreamed reply."""
        choice = {"index": 0, **self._whole_choice(completion.text), "finish_reason": completion.finish_reason, "logprobs": None}
        return {**self._head, "object": self.whole, "choices": [choice], "usage": usage(completion)}

    def piece(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        """Return the chunk of one piece of text, or the empty last one with its finish reason."""
        choice = {"index": 0, **self._piece_choice(text, finish_reason), "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": self.chunk, "choices": [choice]}

    def usage(self, completion: Completion) -> dict[str, Any]:
        """Return the chunk that carries the usage alone."""
        return {**self._head, "object": self.chunk, "choices": [], "usage": usage(completion)}

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks before any text."""
        return []

    def _whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"text": text}


class TextReply(Reply):
    """Reply to /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"


class ChatReply(Reply):
    """Reply to /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunk that names the role."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        return [{**self._head, "object": self.chunk, "choices": [choice]}]

    def _whole_choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"delta": {} if finish_reason else {"content": text}}


def usage(completion: Completion) -> dict[str, int]:
    """Return OpenAI's usage object."""
    counts = (completion.prompt_tokens, completion.completion_tokens)
    return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
