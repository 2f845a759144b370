"""Every reply that was paid for, raw, one small file each: a killed run pays nothing twice but what was in flight.

One file a reply is atomic on every storage, needs no lock between workers, and is found by its key alone.
"""

from typing import NamedTuple

from ray_jobs.core.storage import Storage


class PaidReply(NamedTuple):
    """The raw body of one reply, under the hash of what was asked."""

    key: str
    body: str
    seconds: float


class Replies:
    """The replies in one folder.

    Args:
        folder: any storage; picklable, so that workers write where the driver reads.
    """

    def __init__(self, folder: Storage):
        self._folder = folder

    def keys(self) -> set[str]:
        """Return the keys of all replies."""
        return {name.removesuffix(".json") for name in self._folder.names() if name.endswith(".json")}

    def get(self, key: str) -> PaidReply | None:
        """Return the reply of a key; None where there is none."""
        name = f"{key}.json"
        return PaidReply(**self._folder.read_json(name)) if self._folder.exists(name) else None

    def put(self, reply: PaidReply) -> None:
        """Keep a reply."""
        self._folder.write_json(f"{reply.key}.json", reply._asdict())
