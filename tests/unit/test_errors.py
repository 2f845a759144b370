"""The exception tree: each error survives pickling, inherits the fitting built-in, and carries its exit code."""

import inspect
import pickle

import pytest

from ray_jobs.core import errors
from ray_jobs.core.errors import JobError

ALL = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, JobError)]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_an_error_survives_pickling_between_processes(error):
    back = pickle.loads(pickle.dumps(error("what, seen, allowed")))
    assert type(back) is error
    assert str(back) == "what, seen, allowed"
    assert back.exit_code in {1, 2, 4}


@pytest.mark.parametrize("error", [error for error in ALL if error is not JobError], ids=lambda error: error.__name__)
def test_an_error_is_also_a_built_in_one(error):
    built_in = [base for base in error.__mro__ if base.__module__ == "builtins" and base not in {Exception, BaseException, object}]
    assert built_in


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_the_tree_at_the_top_of_the_file_shows_it(error):
    assert error.__name__ in errors.__doc__
    assert error.__doc__
