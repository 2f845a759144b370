"""A plan that leaves nothing to train on is refused."""

import pytest

from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError, DataError
from ray_jobs.corpus.selection import Shard
from ray_jobs.prepare import require_train


def test_a_plan_that_holds_out_everything_is_refused():
    held_out = Shard("eval", 0, [("part0", [0, 1])])
    require_train([Shard("train", 0, [("part0", [2])]), held_out], 0.9)
    with pytest.raises(DataError, match=r"all 2 examples are held out.*eval_share \(now 0\.9\)"):
        require_train([Shard("train", 0, []), held_out], 0.9)


def test_all_of_the_examples_cannot_be_asked_to_be_held_out():
    assert validate({"run": {"name": "a"}, "data": {"eval_share": 0.99}}).data.eval_share == 0.99
    with pytest.raises(ConfigError, match="eval_share"):
        validate({"run": {"name": "a"}, "data": {"eval_share": 1}})
