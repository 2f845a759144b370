"""A provider's batch endpoint on loopback for tests: files in, batches that end after some looks, one output and one error file."""

import contextlib
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judge_server import completion, error, verdict
from loopback import served

MODERATED = json.loads(error("content filter", "content_filter"))


class BatchServer:
    """Answers each request of a batch with a verdict.

    Args:
        looks: how often a batch is looked at before it has ended.
        num_answered: calls that are answered before the batch expires; None answers all.
        answer: returns the text that answers a request, or the whole body.
        refuses: whether a request is answered by an error 400.
        refusal: the body of that error.
        hook: called with the method and path of each request, before it is answered; a status that it returns is the answer.
    """

    def __init__(
        self,
        *,
        looks: int = 1,
        num_answered: int | None = None,
        answer: Callable[[dict], str | dict] = verdict,
        refuses: Callable[[dict], bool] = lambda request: False,
        refusal: Any = MODERATED,
        hook: Callable[[str, str], int | None] = lambda method, path: None,
    ):
        self.looks, self.num_answered, self.refuses, self.hook = looks, num_answered, refuses, hook
        self.answer, self.refusal = answer, refusal
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict] = {}
        self.billed: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["BatchServer"]:
        with served(self._http):
            yield self

    def add_file(self, text: str) -> dict:
        name = f"file-{len(self.files)}"
        self.files[name] = text
        return {
            "id": name,
            "object": "file",
            "bytes": len(text),
            "created_at": 0,
            "filename": "x",
            "purpose": "batch",
            "status": "processed",
        }

    def add_batch(self, request: dict) -> dict:
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": request["endpoint"],
            "input_file_id": request["input_file_id"],
            "completion_window": "24h",
            "status": "in_progress",
            "created_at": 0,
            "metadata": request.get("metadata"),
            "looks": 0,
        }
        return self.batches[name]

    def look(self, name: str) -> dict:
        batch = self.batches[name]
        batch["looks"] += 1
        if batch["status"] == "in_progress" and batch["looks"] > self.looks:
            self._end(batch)
        return batch

    def _end(self, batch: dict) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        done, failed = [], []
        for number, line in enumerate(lines):
            if self.num_answered is not None and number >= self.num_answered:
                failed.append({"custom_id": line["custom_id"], "response": None, "error": {"code": "batch_expired", "message": "expired"}})
            elif self.refuses(line["body"]):
                response = {"status_code": 400, "body": self.refusal}
                failed.append({"custom_id": line["custom_id"], "response": response, "error": None})
            else:
                self.billed.append(line["custom_id"])
                answer = self.answer(line["body"])
                body = answer if isinstance(answer, dict) else json.loads(completion(answer))
                done.append({"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None})
        batch["status"] = "completed" if self.num_answered is None else "expired"
        batch["request_counts"] = {"total": len(lines), "completed": len(done), "failed": len(failed)}
        for field, rows in (("output_file_id", done), ("error_file_id", failed)):
            # in no order; line separators of Unicode stand as they are, as they may in JSON
            text = "".join(json.dumps(row).replace("\\u2028", "\u2028") + "\n" for row in reversed(rows))
            batch[field] = self.add_file(text)["id"] if rows else None


def _handler(server: BatchServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            status = server.hook("POST", self.path)
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if status:
                self._send(error("not here"), status)
            elif self.path == "/v1/files":
                lines = [line for line in body.splitlines() if line.startswith('{"custom_id"')]
                self._send(json.dumps(server.add_file("\n".join(lines))))
            else:
                self._send(json.dumps(server.add_batch(json.loads(body))))

        def do_GET(self):
            server.hook("GET", self.path)
            parts = self.path.split("?")[0].split("/")
            if parts[2] == "files":
                self._send(server.files[parts[3]])
            elif len(parts) == 4:
                self._send(json.dumps(server.look(parts[3])))
            else:
                self._send(json.dumps({"object": "list", "data": list(server.batches.values()), "has_more": False}))

        def _send(self, text: str, status: int = 200) -> None:
            body = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler
