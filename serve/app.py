"""The OpenAI-compatible endpoint: a FastAPI app around any backends, and the Serve application around replicas."""

import hashlib
import hmac
import json
import logging
import random
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serve.deployment import MAX_ONGOING, RETRY_AFTER_S, Backend, HandleBackend, ModelReplica, Sampling
from serve.engines import ChatRefused, Completion, PromptTooLong
from serve.schema import ApiError, ChatReply, ChatRequest, CompletionRequest, GenerationRequest, Reply, ServeArgs, TextReply

if TYPE_CHECKING:
    from ray.serve import Application

MAX_PROMPT_CHARS = 1_000_000
"""Longer prompts are refused before a tokenizer spends seconds on them."""
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
public = APIRouter()
logger = logging.getLogger(__name__)


def digest(key: str) -> str:
    """Return the SHA-256 of an API key, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_key(request: Request) -> None:
    """Refuse a request without one of the keys; compares in constant time.

    Raises:
        ApiError: 401.
    """
    allowed: list[str] = request.app.state.key_digests
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    seen = digest(key.strip()) if scheme.lower() == "bearer" else ""
    # a list: any() over a generator would stop at the first match, and its time would tell which
    if allowed and not any([hmac.compare_digest(seen, known) for known in allowed]):
        raise ApiError(401, "no valid API key: send the header Authorization: Bearer KEY", code="invalid_api_key")


keyed = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])


def create_app(backends: Mapping[str, Backend], *, max_new_tokens: int, key_digests: list[str] | None = None) -> FastAPI:
    """Return the app.

    Args:
        backends: model name -> what answers it; the first two meet on the page.
        max_new_tokens: upper bound of max_tokens, and its default.
        key_digests: SHA-256 of each API key; none lets everyone in.
    """
    app = FastAPI(title="raystill", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.backends = dict(backends)
    app.state.max_new_tokens = max_new_tokens
    app.state.key_digests = key_digests or []
    app.include_router(public)
    app.include_router(keyed)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)
    return app


@public.get("/", response_class=HTMLResponse)
def page() -> HTMLResponse:
    """Return the page that shows both models' answers to one question."""
    html = (files("serve") / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})


@public.get("/health")
async def health(request: Request) -> JSONResponse:
    """Return 200 once every model answers, 503 before."""
    ready = {name: await backend.ready() for name, backend in request.app.state.backends.items()}
    word, status = ("ok", 200) if all(ready.values()) else ("loading", 503)
    return JSONResponse({"status": word, "models": ready}, status_code=status)


@keyed.get("/models")
def list_models(request: Request) -> dict[str, Any]:
    """Return the models' names."""
    return {"object": "list", "data": [_model_object(name) for name in request.app.state.backends]}


@keyed.get("/models/{name}")
def get_model(request: Request, name: str) -> dict[str, Any]:
    """Return one model's entry."""
    _find(request, name)
    return _model_object(name)


@keyed.post("/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a chat."""
    return await _answer(request, body, ChatReply(body.model))


@keyed.post("/completions")
async def complete(request: Request, body: CompletionRequest) -> Response:
    """Continue a text."""
    return await _answer(request, body, TextReply(body.model))


async def _answer(request: Request, body: GenerationRequest, reply: Reply) -> Response:
    backend = _find(request, body.model)
    sampling = _sampling(body, request.app.state.max_new_tokens)
    if len(str(body.prompt_text)) > MAX_PROMPT_CHARS:
        message = f"the prompt is longer than {MAX_PROMPT_CHARS} characters: shorten it"
        raise ApiError(413, message, param=body.prompt_field, code="context_length_exceeded")
    if not await backend.ready():
        raise ApiError(503, f"model {body.model!r} is loading: try again later", code="not_ready", retry_after_s=RETRY_AFTER_S)
    pieces = backend.stream(body.prompt_text, sampling)
    first = await _first(pieces, body)
    if body.stream:
        events = _events(first, pieces, reply, include_usage=body.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    last = first
    async for piece in pieces:
        last = piece
    assert isinstance(last, Completion)
    return JSONResponse(reply.complete(last))


def _find(request: Request, name: str) -> Backend:
    backends: dict[str, Backend] = request.app.state.backends
    if name not in backends:
        message = f"model {name!r} does not exist: the models are {', '.join(backends)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return backends[name]


def _sampling(body: GenerationRequest, max_new_tokens: int) -> Sampling:
    limit = body.limit or max_new_tokens
    if limit > max_new_tokens:
        raise ApiError(400, f"max_tokens = {limit}: this endpoint generates {max_new_tokens} at most", param="max_tokens")
    seed = random.getrandbits(31) if body.seed is None else body.seed % 2**63
    return Sampling(limit, body.temperature, seed)


async def _first(pieces: AsyncIterator[str | Completion], body: GenerationRequest) -> str | Completion:
    """Wait for the first piece: what is wrong with a request shows before the reply's status is sent."""
    try:
        return await anext(pieces)
    except PromptTooLong as error:
        raise ApiError(413, str(error), param=body.prompt_field, code="context_length_exceeded") from None
    except ChatRefused as error:
        raise ApiError(400, str(error), param=body.prompt_field) from None


async def _events(
    first: str | Completion, pieces: AsyncIterator[str | Completion], reply: Reply, *, include_usage: bool
) -> AsyncIterator[str]:
    for chunk in reply.opening():
        yield _event(chunk)
    piece: str | Completion | None = first
    try:
        while piece is not None:
            for chunk in _chunks(piece, reply, include_usage=include_usage):
                yield _event(chunk)
            piece = await anext(pieces, None)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    except Exception as error:  # the status is sent: only an event can still tell the client
        logger.exception("an answer failed on its way")
        yield _event(_failure(error).body)
    finally:
        await pieces.aclose()


def _chunks(piece: str | Completion, reply: Reply, *, include_usage: bool) -> list[dict[str, Any]]:
    if isinstance(piece, str):
        return [reply.piece(piece)]
    return [reply.piece("", piece.finish_reason), *([reply.usage(piece)] if include_usage else [])]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "raystill"}


def _refuse(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return _refuse(request, ApiError(400, f"{field or 'body'}: {message}", param=field))


def _refuse_route(request: Request, error: HTTPException) -> JSONResponse:
    return _refuse(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


def _fail(request: Request, error: Exception) -> JSONResponse:
    return _refuse(request, _failure(error))


def _failure(error: Exception) -> ApiError:
    # what went wrong inside is for the log, not for clients
    return ApiError(500, f"the server failed ({type(error).__name__}): its log says why", code="internal_error")


class Ingress:
    """The class of the Serve deployment that holds the app."""

    def __init__(self, args: ServeArgs, handles: dict[str, Any]):
        backends = {name: HandleBackend(handle) for name, handle in handles.items()}
        self._app = create_app(backends, max_new_tokens=args.max_new_tokens, key_digests=args.key_digests)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app, which Serve asks for once the handles are there."""
        return self._app


def build_app(args: ServeArgs) -> "Application":
    """Return the Serve application: one deployment a model, and the ingress in front of them."""
    from ray import serve as ray_serve

    device, num_threads = ("cuda" if args.gpus else "cpu"), max(1, int(args.cpus))
    replica = ray_serve.deployment(
        ModelReplica,
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=args.max_queued,
        max_constructor_retry_count=2,
    )
    handles = {name: replica.options(name=name).bind(model, device=device, num_threads=num_threads) for name, model in args.models.items()}
    ingress = ray_serve.deployment(
        ray_serve.ingress()(Ingress), name="endpoint", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(args, handles)
