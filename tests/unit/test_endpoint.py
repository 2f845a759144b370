"""The endpoint over a fake engine: what clients see, byte by byte and through the official client."""

import json
import threading
import time

import pytest
from fake_engine import FakeEngine, running
from fastapi.testclient import TestClient

from ray_jobs.core.errors import EndpointError
from serve.app import MAX_PROMPT_CHARS, create_app, digest
from serve.client import is_healthy, wait_until_healthy
from serve.deployment import EngineBackend
from serve.engines import ChatRefused
from serve.schema import ApiError


class Unwell:
    """A backend that is loading, or full."""

    def __init__(self, *, ready=True, error=None):
        self._ready, self._error = ready, error

    async def ready(self):
        return self._ready

    async def stream(self, prompt, sampling):
        yield "half"
        raise self._error


class Full(Unwell):
    async def stream(self, prompt, sampling):
        raise self._error
        yield


FULL = ApiError(429, "the model's queue is full: try again later", code="queue_full", retry_after_s=5)
BODY = {"model": "teacher", "messages": [{"role": "user", "content": "Why?"}]}


@pytest.fixture
def engine():
    return FakeEngine("teacher")


@pytest.fixture
def client(engine):
    backends = {
        "teacher": EngineBackend(engine),
        "student": EngineBackend(FakeEngine("student")),
        "full": Full(error=FULL),
        "torn": Unwell(error=ApiError(503, "lost")),
        "picky": Full(error=ChatRefused("the model's chat template refuses these messages: roles must alternate")),
        "faulty": Full(error=RuntimeError("secret path")),
        "faulty later": Unwell(error=RuntimeError("secret path")),
    }
    return TestClient(create_app(backends, max_new_tokens=8), raise_server_exceptions=False)


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    return [part.removeprefix("data: ") for part in parts]


def test_chat(client, engine):
    reply = client.post("/v1/chat/completions", json=BODY | {"seed": 7, "max_tokens": 3, "temperature": 0.5}).json()
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "teacher: Why?", "refusal": None}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert engine.asked == [{"chat": BODY["messages"], "max_new_tokens": 3, "temperature": 0.5, "seed": 7}]


def test_chat_streams_role_then_pieces_then_reason_then_usage(client):
    response = client.post("/v1/chat/completions", json=BODY | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, done = events(response)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:4]] == ["teacher:", " ", "Why?"]
    assert chunks[4]["choices"][0]["finish_reason"] == "stop"
    assert chunks[5]["choices"] == []
    assert chunks[5]["usage"]["total_tokens"] == 7


def test_text_completion_with_and_without_stream(client, engine):
    body = {"model": "teacher", "prompt": "A process is"}
    whole = client.post("/v1/completions", json=body).json()
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "teacher: A process is")
    *chunks, done = events(client.post("/v1/completions", json=body | {"stream": True}))
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "teacher: A process is"
    assert engine.asked[0]["chat"] == "A process is"


def test_defaults_are_greedy_and_the_endpoints_limit(client, engine):
    client.post("/v1/chat/completions", json=BODY)
    assert (engine.asked[0]["temperature"], engine.asked[0]["max_new_tokens"]) == (0.0, 8)


def test_text_parts_developer_role_and_nulls_are_understood(client, engine):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    reply = client.post("/v1/chat/completions", json={"model": "teacher", "messages": messages, "seed": None, "top_p": 1, "n": 1})
    assert reply.status_code == 200
    assert engine.asked[0]["chat"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 9}, 400, "max_tokens"),
        ({"n": 2}, 400, "n"),
        ({"stop": ["x"]}, 400, "stop"),
        ({"tools": []}, 400, "tools"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": [{"role": "user", "content": "x" * 1001}]}, 413, "messages"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_PROMPT_CHARS + 1)}]}, 413, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_name_the_field(client, change, status, param, stream):
    response = client.post("/v1/chat/completions", json=BODY | {"stream": stream} | change)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["message"]


def test_body_that_is_no_json_and_unknown_routes_are_error_objects(client):
    broken = client.post("/v1/chat/completions", content="{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert client.post("/v1/embeddings", json={}).json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/models/gpt-4").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_429_with_retry_after(client, stream):
    response = client.post("/v1/chat/completions", json=BODY | {"model": "full", "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_stream_that_breaks_ends_with_an_error_object_and_without_done(client):
    parts = events(client.post("/v1/chat/completions", json=BODY | {"model": "torn", "stream": True}))
    assert json.loads(parts[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in parts


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_the_template_refuses_is_400(client, stream):
    response = client.post("/v1/chat/completions", json=BODY | {"model": "picky", "stream": stream})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert "roles must alternate" in response.json()["error"]["message"]


@pytest.mark.parametrize(("model", "stream"), [("faulty", False), ("faulty", True), ("faulty later", False)])
def test_any_other_failure_is_a_500_error_object_without_its_text(client, model, stream):
    response = client.post("/v1/chat/completions", json=BODY | {"model": model, "stream": stream})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text


def test_any_other_failure_inside_a_stream_is_an_error_event_and_the_end(client):
    parts = events(client.post("/v1/chat/completions", json=BODY | {"model": "faulty later", "stream": True}))
    assert json.loads(parts[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in parts and "secret" not in parts[-1]


def test_models_and_health(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]][:2] == ["teacher", "student"]
    assert client.get("/v1/models/student").json()["id"] == "student"
    assert client.get("/health").json()["status"] == "ok"


def test_not_ready_is_503():
    client = TestClient(create_app({"teacher": Unwell(ready=False)}, max_new_tokens=8))
    health, chat = client.get("/health"), client.post("/v1/chat/completions", json=BODY)
    assert (health.status_code, health.json()) == (503, {"status": "loading", "models": {"teacher": False}})
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "not_ready")


def test_keys():
    app = create_app({"teacher": EngineBackend(FakeEngine())}, max_new_tokens=8, key_digests=[digest("one"), digest("two")])
    client = TestClient(app)
    for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"Authorization": "Bearer "}):
        refused = client.get("/v1/models", headers=header)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert client.post("/v1/chat/completions", json=BODY, headers=header).status_code == 401
    for key in ("one", "two"):
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert client.get("/health").status_code == client.get("/").status_code == 200


def test_the_page_is_one_file_and_never_parses_model_text_as_html(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any(word in page.text for word in ("innerHTML", "insertAdjacentHTML", "document.write", "http://", "https://"))


@pytest.fixture
def live():
    """A real HTTP server around a slow engine: (base URL, engine)."""
    engine = FakeEngine("teacher", words=[f"{i} " for i in range(200)], wait_s=0.02)
    with running(create_app({"teacher": EngineBackend(engine)}, max_new_tokens=200)) as url:
        yield url, engine


@pytest.fixture
def openai_client(live):
    import openai

    with openai.OpenAI(base_url=f"{live[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_official_client_streams_and_leaving_stops_the_generation(openai_client, live):
    with openai_client.chat.completions.create(model="teacher", messages=BODY["messages"], stream=True) as stream:
        pieces = [chunk.choices[0].delta.content for chunk, _ in zip(stream, range(4), strict=False)]
    assert pieces == ["", "0 ", "1 ", "2 "]
    assert live[1].closed.wait(timeout=2), "the engine went on after the client had left"


def test_official_client_gets_its_own_error_types(openai_client):
    import openai

    assert [model.id for model in openai_client.models.list()] == ["teacher"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        openai_client.chat.completions.create(model="gpt-4", messages=BODY["messages"])
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.chat.completions.create(model="teacher", messages=BODY["messages"], max_tokens=201)
    assert refused.value.param == "max_tokens"


def test_the_event_loop_stays_free_while_an_engine_works(openai_client, live):
    thread = threading.Thread(target=openai_client.completions.create, kwargs={"model": "teacher", "prompt": "x", "max_tokens": 50})
    thread.start()
    began = time.monotonic()
    assert is_healthy(live[0])
    assert time.monotonic() - began < 0.5
    thread.join()


def test_waiting_for_an_endpoint_ends(live):
    wait_until_healthy(live[0], deadline=time.monotonic())
    with pytest.raises(EndpointError, match="/health"):
        wait_until_healthy("http://127.0.0.1:9", deadline=time.monotonic())
