"""A server on loopback for as long as a block lasts."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer


@contextlib.contextmanager
def served(http: ThreadingHTTPServer) -> Iterator[None]:
    """Answer requests in a thread of its own."""
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
