"""What is written of batches of calls, so that a killed run finds its own again and nobody pays for their calls a second time.

A record is written before its batch is made, under a name that the provider is told too.

    FOLDER/batches/NAME.json    the calls of a batch, its id, and whether its replies are kept
"""

from collections.abc import Iterable
from typing import NamedTuple

from ray_jobs.judging.ledger import Ledger


class BatchRecord(NamedTuple):
    """What is written of a batch.

    Attributes:
        batch_id: empty while it is being made, and for good where its run was killed then: it may have been made.
        doubtful: of calls that were sent before and may have been billed without an answer, how often.
    """

    keys: list[str]
    batch_id: str = ""
    is_done: bool = False
    doubtful: dict[str, int] = {}  # noqa: RUF012


class BatchRecords:
    """The records of the batches whose replies go into one ledger."""

    def __init__(self, ledger: Ledger):
        self._folder = ledger.folder.sub("batches")

    def path(self, name: str) -> str:
        """Return where a batch's record is."""
        return f"{self._folder.uri}/{name}.json"

    def open(self, keys: Iterable[str]) -> dict[str, BatchRecord]:
        """Return by name the batches that hold any of these calls and were not fetched: asked again, the calls would be paid twice.

        What a killed write has left counts for nothing, and neither does a torn file, as in the ledger.
        """
        wanted = set(keys)
        names = [name.removesuffix(".json") for name in self._folder.names() if name.endswith(".json")]
        found = {name: self._read(name) for name in names}
        return {name: record for name, record in found.items() if record and not record.is_done and wanted.intersection(record.keys)}

    def write(self, name: str, record: BatchRecord) -> None:
        """Write what is known of a batch.

        Raises:
            StorageError: it cannot be written.
        """
        self._folder.write_json(f"{name}.json", record._asdict())

    def _read(self, name: str) -> BatchRecord | None:
        try:
            found = self._folder.read_json(f"{name}.json")
        except (FileNotFoundError, ValueError):
            return None
        return BatchRecord(**found) if isinstance(found, dict) and {"keys"} <= set(found) <= set(BatchRecord._fields) else None
