"""Every reply that was paid for, raw, one small file each: a killed run pays nothing twice but what was in flight.

One file a reply is atomic on every storage, needs no lock between workers, and is found by its key alone.
"""

from collections.abc import Iterable

from ray_jobs.core.storage import Storage
from ray_jobs.judging.endpoint import Reply


class Replies:
    """The replies in one folder.

    Args:
        folder: any storage; picklable, so that workers write where the driver reads.
    """

    def __init__(self, folder: Storage):
        self._folder = folder

    def read(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Return those of the replies that are kept."""
        kept = {name.removesuffix(".json") for name in self._folder.names()}
        found = ((key, self.get(key)) for key in keys if key in kept)
        return {key: reply for key, reply in found if reply}

    def get(self, key: str) -> Reply | None:
        """Return the reply of a key; None where there is none."""
        name = f"{key}.json"
        return Reply(**self._folder.read_json(name)) if self._folder.exists(name) else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        self._folder.write_json(f"{key}.json", {"body": reply.body, "seconds": reply.seconds})
