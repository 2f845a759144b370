"""What the program itself asks of an endpoint; for chats, take the official `openai` client."""

import http.client
import json
import time
import urllib.error
import urllib.request

from ray_jobs.core.errors import EndpointError

POLL_S = 0.2


def is_healthy(url: str, *, timeout_s: float = 5.0) -> bool:
    """Return whether the endpoint answers that all its models are loaded."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout_s) as reply:
            return json.load(reply)["status"] == "ok"
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def wait_until_healthy(url: str, *, deadline: float) -> None:
    """Return once the endpoint is healthy.

    Args:
        deadline: on the clock of `time.monotonic`.

    Raises:
        EndpointError: it is not by then.
    """
    while not is_healthy(url):
        if time.monotonic() > deadline:
            raise EndpointError(f"{url}/health does not say ok in time: see the logs in /tmp/ray/session_latest/logs/serve")
        time.sleep(POLL_S)
