"""What was paid for: an intent before a call is sent, the raw reply before anybody reads it; nothing is bought twice.

One small file an intent and one a reply: that is atomic on every storage, object stores too, which cannot append; it needs no
lock between workers, and a file is found by its call's key alone. The same ledger serves any number of runs, judges and
reports. A send without a reply may have been billed: it counts with the most it can have cost, also once a later send of the
same call is answered.

    FOLDER/KEY.json            the reply
    FOLDER/intents/KEY.json    how often the call was sent, and what each time could cost
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from ray_jobs.core.errors import StorageError
from ray_jobs.core.storage import Storage
from ray_jobs.judging.calls import Prices, Reply

SCHEMA = 2
UNKNOWN = Prices()
THREADS = 16
"""Files read at once: an object store takes tens of milliseconds for each, whatever its size."""
_OLDEST_REPLY = set(Reply._fields) - {"doubtful", "may_pass"}
"""Fields that every reply of this schema has."""
T = TypeVar("T")


class Intent(NamedTuple):
    """A call that was about to be sent: how often, and what one more time costs at most."""

    sends: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = None


class Spent(NamedTuple):
    """What the calls of a ledger cost; sends without a reply count with what they could have cost.

    Args:
        calls: requests that were billed, or may have been.
        usd: None where a price was unknown.
        unanswered: calls without a reply.
        ignored_files: torn, or of another schema.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = 0.0
    unanswered: int = 0
    ignored_files: int = 0


class Ledger:
    """The calls and replies in one folder.

    Args:
        folder: any storage; picklable, so that workers write where the driver reads.
    """

    def __init__(self, folder: Storage):
        self.folder = folder
        self._intents = folder.sub("intents")

    def reply(self, key: str) -> Reply | None:
        """Return the reply to a call; None where there is none that can be read."""
        return _reply(_read(self.folder, key))

    def intent(self, key: str) -> Intent:
        """Return how a call was tried before; nothing for one that never was."""
        return _intent(_read(self._intents, key)) or Intent()

    def replies(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Return those replies that are there."""
        kept = _keys(self.folder)
        wanted = [key for key in keys if key in kept]
        found = zip(wanted, _in_threads(self.reply, wanted), strict=True)
        return {key: reply for key, reply in found if reply is not None}

    def intend(self, key: str, intent: Intent) -> None:
        """Write that a call is about to be sent.

        Raises:
            StorageError: it cannot be written, as on a full disk: do not send.
        """
        self._intents.write_json(f"{key}.json", {"schema": SCHEMA, **intent._asdict()})

    def keep(self, key: str, reply: Reply) -> None:
        """Write the reply to a call.

        Raises:
            StorageError: it cannot be written: send no further call.
        """
        self.folder.write_json(f"{key}.json", {"schema": SCHEMA, **reply._asdict()})

    def settle(self, key: str, reply: Reply) -> Reply:
        """Keep the reply to a call and return it; where another process has kept one since, that one stays, at the cost of both.

        Raises:
            StorageError: as `keep`.
        """
        earlier = self.reply(key)
        if earlier is None or earlier == reply:  # equal: written just now, by a try that seemed to fail
            self.keep(key, reply)
            return reply
        both = _both(earlier, reply)
        before = self.intent(key)
        self.keep(key, both)
        self.intend(key, before._replace(sends=max(before.sends, both.doubtful + 2)))
        return both

    def spent(self, prices: Prices = UNKNOWN) -> Spent:
        """Return what all calls in the folder cost, whoever asked them.

        Args:
            prices: of what was bought before any price was known.
        """
        answered, tried = sorted(_keys(self.folder)), sorted(_keys(self._intents))
        replies = dict(zip(answered, _in_threads(self.reply, answered), strict=True))
        intents = dict(zip(tried, _in_threads(lambda key: _intent(_read(self._intents, key)), tried), strict=True))
        total = Spent(ignored_files=sum(found is None for found in [*replies.values(), *intents.values()]))
        for key in {**replies, **intents}:
            total = _add(total, replies.get(key), intents.get(key) or Intent(), prices)
        return total


def _both(earlier: Reply, later: Reply) -> Reply:
    return earlier._replace(
        prompt_tokens=earlier.prompt_tokens + later.prompt_tokens,
        completion_tokens=earlier.completion_tokens + later.completion_tokens,
        usd=None if earlier.usd is None or later.usd is None else earlier.usd + later.usd,
    )


def _add(total: Spent, reply: Reply | None, intent: Intent, prices: Prices) -> Spent:
    """Add a call: what its reply was billed, and every send that may have been billed without one."""
    parts: list[tuple[Reply | Intent, int]] = [(intent, intent.sends if reply is None else reply.doubtful)]
    if reply is not None:
        parts.append((reply, 1))
    costs = [_usd(cost, prices, times) for cost, times in parts]
    return Spent(
        calls=total.calls + max(intent.sends, 0 if reply is None else reply.doubtful + 1),
        prompt_tokens=total.prompt_tokens + sum(times * cost.prompt_tokens for cost, times in parts),
        completion_tokens=total.completion_tokens + sum(times * cost.completion_tokens for cost, times in parts),
        usd=None if total.usd is None or None in costs else total.usd + sum(cost or 0.0 for cost in costs),
        unanswered=total.unanswered + (reply is None and intent.sends > 0),
        ignored_files=total.ignored_files,
    )


def _usd(cost: Reply | Intent, prices: Prices, times: int) -> float | None:
    if not times:
        return 0.0
    usd = prices.cost(cost.prompt_tokens, cost.completion_tokens) if cost.usd is None else cost.usd
    return None if usd is None else times * usd


def _keys(folder: Storage) -> set[str]:
    return {name.removesuffix(".json") for name in folder.names() if name.endswith(".json")}


def _read(folder: Storage, key: str) -> dict[str, Any] | None:
    """Return a file's fields; None where it is missing, torn, or of another schema."""
    try:
        found = folder.read_json(f"{key}.json")
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise StorageError(f"{folder.uri}/{key}.json cannot be read: {error}; what is paid for cannot be known without it") from error
    return found if isinstance(found, dict) and found.pop("schema", None) == SCHEMA else None


def _reply(fields: dict[str, Any] | None) -> Reply | None:
    return Reply(**fields) if fields and _OLDEST_REPLY <= set(fields) <= set(Reply._fields) else None


def _intent(fields: dict[str, Any] | None) -> Intent | None:
    return Intent(**fields) if fields and set(fields) == set(Intent._fields) else None


def _in_threads(read: Callable[[str], T], keys: list[str]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, keys))
