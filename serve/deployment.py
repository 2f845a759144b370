"""From an engine to a stream of text in an event loop: in this process, or in the replicas of a Serve deployment."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from serve.engines import ChatRefused, Completion, Engine, Prompt, PromptTooLong, open_engine
from serve.schema import ApiError, ModelArgs

MAX_ONGOING = 4
"""Requests one replica works on at once, each in its thread: a short question need not wait for a long answer."""
RETRY_AFTER_S = 5
READY_WAIT_S = 2.0


class Sampling(NamedTuple):
    """How one answer is generated."""

    max_new_tokens: int
    sampling_temperature: float
    seed: int


class Backend(Protocol):
    """A model that the app can ask."""

    async def ready(self) -> bool:
        """Return whether the model is loaded."""

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[str | Completion]:
        """Yield pieces of text, then the completion; closing the iterator stops the work."""


class EngineBackend:
    """An engine of this process; its blocking steps run in threads, so the event loop stays free."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._threads = ThreadPoolExecutor(MAX_ONGOING, thread_name_prefix="engine")

    async def ready(self) -> bool:
        """Return True: the engine was loaded before."""
        return True

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[str | Completion]:
        """Yield pieces of text, then the completion; closing the iterator stops the work after the step in flight.

        Raises:
            PromptTooLong, ChatRefused: as the engine.
        """
        pieces = self._engine.stream(prompt, **sampling._asdict())
        step = None
        try:
            while True:
                step = self._threads.submit(next, pieces, None)
                piece = await asyncio.wrap_future(step)
                if piece is None:
                    return
                yield piece
        finally:
            if step:
                step.add_done_callback(lambda _: pieces.close())


class ModelReplica:
    """The class of a Serve deployment: loads its model on the replica's node."""

    def __init__(self, args: ModelArgs, *, device: str, num_threads: int):
        engine = open_engine(args.model, adapter=args.adapter, device=device, num_threads=num_threads)
        self._backend = EngineBackend(engine)

    async def ready(self) -> bool:
        """Return True: a replica that answers has loaded its model."""
        return True

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[str | Completion]:
        """Yield as the backend of this process does."""
        pieces = self._backend.stream(prompt, sampling)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()


class HandleBackend:
    """A Serve deployment as a backend; what Ray raises becomes what clients understand."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._was_ready = False

    async def ready(self) -> bool:
        """Return whether a replica has answered; asks until one has."""
        if not self._was_ready:
            from ray.exceptions import RayActorError
            from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

            try:
                self._was_ready = await asyncio.wait_for(_ask(self._handle), READY_WAIT_S)
            except (TimeoutError, BackPressureError, RayActorError, DeploymentUnavailableError):
                return False
        return self._was_ready

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[str | Completion]:
        """Yield what a replica yields.

        Raises:
            PromptTooLong, ChatRefused: as the engine.
            ApiError: 429 where the queue is full, 503 where the replica is lost.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        pieces = self._handle.options(stream=True).stream.remote(prompt, sampling)
        try:
            async for piece in pieces:
                yield piece
        except (PromptTooLong, ChatRefused) as error:
            cause = getattr(error, "cause", error)
            raise (PromptTooLong if isinstance(error, PromptTooLong) else ChatRefused)(str(cause)) from None
        except BackPressureError:
            raise ApiError(429, "the model's queue is full: try again later", code="queue_full", retry_after_s=RETRY_AFTER_S) from None
        except (RayActorError, DeploymentUnavailableError):
            self._was_ready = False
            raise ApiError(503, "the model was lost and is being loaded again: try again later", code="not_ready") from None
        except (asyncio.CancelledError, GeneratorExit):
            pieces.cancel()
            raise


async def _ask(handle: Any) -> bool:
    return await handle.ready.remote()
