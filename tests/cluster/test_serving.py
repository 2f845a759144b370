"""`raystill serve` as a user meets it: another process, real HTTP, the official client, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from made_run import make_run

from ray_jobs import serve
from ray_jobs.core.config_file import to_toml
from ray_jobs.core.errors import EndpointError
from serve.deployment import MAX_ONGOING

pytestmark = pytest.mark.cluster
CHAT = [{"role": "user", "content": "What is a page table?"}]
KEY = "the-key"
START_S = 180


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture
def process(ray_cluster, tiny_config, paths):
    """The running job: (process, URL)."""
    config = tiny_config(serve__port=serve.check_bind("127.0.0.1", 0, []), serve__cpus=0.5, serve__max_queued=1, serve__max_new_tokens=200)
    make_run(config)
    toml = paths / "serve.toml"
    toml.write_text(to_toml(config))
    with (paths / "log").open("w") as log:
        job = subprocess.Popen([sys.executable, "-m", "ray_jobs", "serve", str(toml)], stderr=log, env=os.environ | {serve.KEYS: KEY})
    deadline = time.monotonic() + START_S
    while "Ctrl-C stops" not in (paths / "log").read_text():
        assert job.poll() is None, (paths / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield job, f"http://127.0.0.1:{config.serve.port}"
    if job.poll() is None:
        job.send_signal(signal.SIGINT)
        job.wait(timeout=60)


def test_serve(process):
    job, url = process
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["teacher", "student"]
        answers = {model: client.chat.completions.create(model=model, messages=CHAT, max_tokens=12) for model in serve.MODELS}
        texts = {model: reply.choices[0].message.content for model, reply in answers.items()}
        assert len(set(texts.values())) == 2
        assert answers["teacher"].usage.completion_tokens == 12
        with client.chat.completions.create(
            model="student", messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == texts["student"]
        assert sum(map(bool, pieces)) > 2
        assert chunks[-1].usage.completion_tokens == 12
        assert client.completions.create(model="teacher", prompt="A page", max_tokens=3).choices[0].finish_reason == "length"
        with pytest.raises(openai.APIStatusError) as too_long:
            client.chat.completions.create(model="teacher", messages=[{"role": "user", "content": "x " * 3000}])
        assert (too_long.value.status_code, too_long.value.param) == (413, "messages")
        assert_full_queue_is_429(client)
    assert_needs_key(url)
    assert "<title>raystill" in urllib.request.urlopen(f"{url}/").read().decode()
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) == 0
    from ray import serve as ray_serve

    assert not ray_serve.status().proxies


def assert_full_queue_is_429(client):
    def ask(_):
        try:
            return client.chat.completions.create(model="teacher", messages=CHAT, max_tokens=200)
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(3 * MAX_ONGOING) as threads:
        outcomes = list(threads.map(ask, range(3 * MAX_ONGOING)))
    refused = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
    assert 0 < len(refused) < len(outcomes)
    assert refused[0].response.headers["retry-after"] == "5"
    assert refused[0].type == "rate_limit_error"


def assert_needs_key(url):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/v1/models")
    assert refused.value.code == 401
    assert json.load(refused.value)["error"]["type"] == "authentication_error"


def test_a_model_that_cannot_be_loaded_is_one_clear_error(ray_cluster, tiny_config):
    config = tiny_config(serve__port=0, serve__cpus=0.5)
    folder = make_run(config)
    folder.folder("distill").sub("student").write_bytes("model.safetensors", b"torn")
    with pytest.raises(EndpointError, match="student"):
        serve.run(config, force=False)
