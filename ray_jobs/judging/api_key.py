"""The key of an endpoint: from the environment alone, and never written."""

import os

from pydantic import SecretStr

from ray_jobs.core.errors import ConfigError


def read_api_key(who: str, *, variable: str, otherwise: str) -> SecretStr:
    """Return the key that somebody calls an endpoint with.

    Args:
        who: calls, for the message.
        variable: of the environment, that holds it.
        otherwise: what to do without a key, for the message.

    Raises:
        ConfigError: it is not set, or empty.
    """
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"{who} reads its key from the environment variable {variable}, which is not set: set it{otherwise}")
    return SecretStr(key)
