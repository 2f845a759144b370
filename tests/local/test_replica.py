"""A model replica behind Serve's handle, in this process: what the ingress calls, without a cluster."""

import asyncio

import pytest
from ray import serve as ray_serve

from serve.deployment import HandleBackend, ModelReplica, Sampling
from serve.engines import Completion, PromptTooLong, TransformersEngine
from serve.schema import ModelArgs

CHAT = [{"role": "user", "content": "What is a page table?"}]


@pytest.fixture(scope="module")
def backend(tiny_model):
    application = ray_serve.deployment(ModelReplica).bind(ModelArgs(model=str(tiny_model)), device="cpu", num_threads=1)
    return HandleBackend(ray_serve.run(application, name="replica", _local_testing_mode=True))


def test_a_replica_streams_what_its_engine_streams(backend, tiny_model):
    async def ask():
        assert await backend.ready()
        return [piece async for piece in backend.stream(CHAT, Sampling(6, 0.0, 0))]

    *pieces, last = asyncio.run(ask())
    assert last == TransformersEngine(str(tiny_model)).generate([CHAT], max_new_tokens=6)[0]
    assert isinstance(last, Completion)
    assert "".join(pieces) == last.text


def test_a_prompt_that_is_too_long_keeps_its_name(backend):
    async def ask():
        return [piece async for piece in backend.stream("x " * 5000, Sampling(1, 0.0, 0))]

    with pytest.raises(PromptTooLong, match="shorten it"):
        asyncio.run(ask())
