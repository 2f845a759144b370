"""A judge's key: from the environment alone, and never written."""

import os

from pydantic import SecretStr

from ray_jobs.core.errors import ConfigError


def read_api_key(judge: str, *, variable: str) -> SecretStr:
    """Return the key of a judge.

    Args:
        judge: its name, for the message.
        variable: of the environment, that holds it.

    Raises:
        ConfigError: it is not set, or empty.
    """
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"judge {judge!r} reads its key from the environment variable {variable}, which is not set: set it, "
            "or use judges = ['coverage']"
        )
    return SecretStr(key)
