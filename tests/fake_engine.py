"""An engine without a model, and a real HTTP server around an app."""

import contextlib
import threading
import time

import uvicorn

from serve.engines import Completion, PromptTooLong


class FakeEngine:
    """Answers with its name and what it was asked, word by word; remembers whether a stream was left early."""

    def __init__(self, name="fake", *, context_chars=1000, words=(), wait_s=0.0):
        self.name, self.context_chars, self.words, self.wait_s = name, context_chars, words, wait_s
        self.asked = []
        self.closed = threading.Event()

    def generate(self, chats, **options):
        return [list(self.stream(chat, **options))[-1] for chat in chats]

    def stream(self, chat, *, max_new_tokens, sampling_temperature, seed):
        text = chat if isinstance(chat, str) else chat[-1]["content"]
        if len(text) > self.context_chars:
            raise PromptTooLong(f"the prompt has {len(text)} tokens and the model's context {self.context_chars}: shorten it")
        self.asked.append({"chat": chat, "max_new_tokens": max_new_tokens, "temperature": sampling_temperature, "seed": seed})
        words = (self.words or [f"{self.name}:", " ", text])[:max_new_tokens]
        try:
            for word in words:
                time.sleep(self.wait_s)
                yield word
        finally:
            self.closed.set()
        yield Completion("".join(words), "stop", len(text), len(words))


@contextlib.contextmanager
def running(app):
    """Serve an app on a free loopback port for as long as the block lasts; yields the URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
