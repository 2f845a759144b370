"""An OpenAI-compatible judge on loopback for tests: the longer answer wins; faults are scripted; every call is counted."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from loopback import served


class Fault(NamedTuple):
    """What the server says instead of a verdict: `share` of the body, after `delay_s`; a share below 1 drops the connection then."""

    status: int = 200
    body: str = "{}"
    headers: dict[str, str] = {}  # noqa: RUF012
    delay_s: float = 0.0
    share: float = 1.0


class Window(NamedTuple):
    """A limit of requests that holds in every stretch of `seconds`; refused requests count too."""

    requests: int
    seconds: float = 1.0
    tells: bool = True


class JudgeServer:
    """Holds the server's address, its calls, and the faults to come.

    `fault(number, request)` returns a Fault for a call (counted from 1) or None for a verdict.
    """

    def __init__(
        self,
        fault: Callable[[int, dict], Fault | None] = lambda number, request: None,
        *,
        latency_s: float = 0.0,
        window: Window | None = None,
        port: int = 0,
    ):
        self.window = window
        self.times: list[float] = []
        self.num_refused = 0
        self.fault = fault
        self.latency_s = latency_s
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def answer(self, request: dict, key: str) -> Fault:
        with self._lock:
            self.requests.append(request)
            self.keys.append(key)
            number = len(self.requests)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            refusal = self._over_limit()
        found = refusal or self.fault(number, request) or Fault(body=completion(verdict(request)))
        time.sleep(0.0 if refusal else self.latency_s + found.delay_s)
        if self.window and self.window.tells:
            told = {"x-ratelimit-limit-requests": f"{self.window.requests * 60 / self.window.seconds:.0f}"}
            found = found._replace(headers={**told, **found.headers})
        with self._lock:
            self._in_flight -= 1
        return found

    def _over_limit(self) -> Fault | None:
        now = time.monotonic()
        self.times.append(now)
        if self.window is None:
            return None
        recent = [moment for moment in self.times if moment > now - self.window.seconds]
        if len(recent) <= self.window.requests:
            return None
        self.num_refused += 1
        wait_ms = 1000 * (recent[-self.window.requests] + self.window.seconds - now)
        return Fault(429, error("slow down", "rate_limit_exceeded"), {"retry-after-ms": f"{wait_ms:.0f}"})

    @contextlib.contextmanager
    def running(self) -> Iterator["JudgeServer"]:
        with served(self._http):
            yield self


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = server.answer(request, self.headers.get("Authorization", ""))
            body = found.body.encode()
            if not found.share:
                self.close_connection = True
                return
            self.send_response(found.status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **found.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body[: int(found.share * len(body))])

        def log_message(self, *_):
            pass

    return Handler


def verdict(request: dict) -> str:
    """The longer answer wins, whatever its place."""
    prompt = request["messages"][-1]["content"]
    first, second = (re.search(rf"<{tag}_(\w+)>\n(.*?)\n</{tag}_\1>", prompt, re.DOTALL)[2] for tag in ("answer_a", "answer_b"))
    winner = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return opinion(winner, reasoning=f"Between answer A and answer B, {winner} is longer.")


def opinion(winner: str, *, reasoning: str = "Answer A is precise, answer B is vague.") -> str:
    lists = {"missing_a": [], "wrong_a": [], "missing_b": ["the timer"], "wrong_b": []}
    return json.dumps({"reasoning": reasoning, "winner": winner, **lists})


def completion(text: str, *, finish_reason: str = "stop", model: str = "stub-1") -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage})


def error(message: str, code: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": code}})
