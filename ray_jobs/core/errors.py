"""The exception tree. Every message says what, the value seen, what is allowed, what to do.

    JobError
    ├── ConfigError (ValueError)        the config file or an override cannot be used
    │   └── ConfigChanged               a stage of this run was made with other settings
    ├── DataError (ValueError)          documents, pairs, questions or a table cannot be used
    ├── ModelError (ValueError)         a model name, folder or file cannot be used
    ├── StorageError (OSError)          the run's storage cannot be read or written
    ├── StageMissing (FileNotFoundError) an earlier stage of this run has not finished
    ├── StageHeld (BlockingIOError)     another process works on this stage of this run
    ├── ClusterError (RuntimeError)     no node can satisfy the request, or no cluster answers
    │   └── ClusterUnreachable          a job or its cluster does not answer from here
    ├── TrainingFailed (RuntimeError)   a training job ended without a result
    │   └── MemoryLimitExceeded (MemoryError) a worker passed the memory it was given
    └── EndpointError (ConnectionError) a model endpoint failed or refused
        └── EndpointRefused             no call can succeed as it is configured: key, model, address, credit

All take one message and no other argument, so they survive pickling between Ray processes.
`exit_code` is what the command line returns: 2 for input, 1 for a job that failed, 4 for a cluster out of reach.
"""


class JobError(Exception):
    """Base of every error raystill raises on purpose."""

    exit_code = 1


class ConfigError(JobError, ValueError):
    """The config file or an override cannot be used."""

    exit_code = 2


class ConfigChanged(ConfigError):
    """A stage of this run was made with other settings."""


class DataError(JobError, ValueError):
    """Documents, pairs, questions or a table cannot be used."""

    exit_code = 2


class ModelError(JobError, ValueError):
    """A model name, folder or file cannot be used."""

    exit_code = 2


class StorageError(JobError, OSError):
    """The run's storage cannot be read or written."""

    exit_code = 2


class StageMissing(JobError, FileNotFoundError):
    """An earlier stage of this run has not finished."""

    exit_code = 2


class StageHeld(JobError, BlockingIOError):
    """Another process works on this stage of this run."""

    exit_code = 2


class ClusterError(JobError, RuntimeError):
    """No node can satisfy the request, or no cluster answers."""

    exit_code = 2


class ClusterUnreachable(ClusterError):
    """A job or its cluster does not answer from here."""

    exit_code = 4


class TrainingFailed(JobError, RuntimeError):
    """A training job ended without a result."""


class MemoryLimitExceeded(TrainingFailed, MemoryError):
    """A worker passed the memory it was given."""


class EndpointError(JobError, ConnectionError):
    """A model endpoint failed or refused."""


class EndpointRefused(EndpointError):
    """No call to a model endpoint can succeed as it is configured: its key, model, address or credit."""

    exit_code = 2
