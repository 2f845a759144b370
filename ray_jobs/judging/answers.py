"""Rows that judging reads from other stages' files, held to their schema before anything is paid for."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from ray_jobs.core.errors import DataError
from ray_jobs.core.records import Answer, check_version
from ray_jobs.core.storage import Storage

Row = dict[str, Any]


def read_answers(folder: Storage, models: Iterable[str]) -> dict[str, list[Row]]:
    """Return {model: Answer rows} of the answer stage's files.

    Raises:
        DataError: rows of another schema version, or that are no answers.
        StorageError: a file is no Parquet file.
    """
    return {model: _read(folder, f"{model}.parquet") for model in models}


def _read(folder: Storage, name: str) -> list[Row]:
    place, rows = f"{folder.uri}/{name}", folder.read_parquet(name)
    check_version(rows, place=place)
    try:
        return [Answer.model_validate(row).model_dump() for row in rows]
    except ValidationError as error:
        [first, *_] = error.errors()
        field = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{place} has a row that is no answer ({field}: {first['msg']}): answer anew with `raystill answer CONFIG --force`"
        ) from None
