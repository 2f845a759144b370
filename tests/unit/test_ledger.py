"""What was paid for stays: replies and intents on a real folder, torn and older files, what it all cost."""

import pytest

from ray_jobs.core.errors import StorageError
from ray_jobs.core.storage import Storage
from ray_jobs.judging.calls import Prices, Reply, make_call
from ray_jobs.judging.ledger import Intent, Ledger, Spent

REPLY = Reply("größe {", 1.5, "", 100, 50, False, "stub-1", 0.25)


@pytest.fixture
def folder(tmp_path):
    return Storage(str(tmp_path)).sub("replies")


def test_replies_come_back_and_nothing_else(folder):
    ledger = Ledger(folder)
    assert ledger.replies(["k"]) == {} and ledger.reply("k") is None
    ledger.keep("k", REPLY)
    assert ledger.replies(["k", "other"]) == {"k": REPLY}
    assert ledger.reply("k") == REPLY


def test_an_intent_says_how_often_a_call_may_have_been_billed(folder):
    ledger = Ledger(folder)
    assert ledger.intent("k") == Intent()
    ledger.intend("k", Intent(2, 80, 20, 0.5))
    assert ledger.intent("k").sends == 2
    assert ledger.replies(["k"]) == {}
    assert ledger.spent() == Spent(calls=2, prompt_tokens=160, completion_tokens=40, usd=1.0, unanswered=1)


def test_a_reply_costs_what_it_says_and_an_unknown_price_makes_the_sum_unknown(folder):
    ledger = Ledger(folder)
    for key in "ab":
        ledger.intend(key, Intent(1, 500, 500, 9.0))
        ledger.keep(key, REPLY)
    assert ledger.spent() == Spent(calls=2, prompt_tokens=200, completion_tokens=100, usd=0.5)
    ledger.keep("c", REPLY._replace(usd=None))
    assert ledger.spent().usd is None
    assert Ledger(folder.sub("empty")).spent() == Spent()


def test_sends_without_an_answer_stay_paid_for_when_a_later_one_is_answered(folder):
    ledger = Ledger(folder)
    ledger.intend("k", Intent(3, 80, 20, 0.5))
    ledger.keep("k", REPLY._replace(doubtful=2))
    assert ledger.spent() == Spent(calls=3, prompt_tokens=2 * 80 + 100, completion_tokens=2 * 20 + 50, usd=2 * 0.5 + 0.25)
    ledger.intend("l", Intent(2, 80, 20))
    ledger.keep("l", REPLY._replace(doubtful=1))
    assert ledger.spent().usd is None and ledger.spent(Prices(1e6, 2e6)).usd == 1.25 + 80 + 2 * 20 + 0.25


def test_a_reply_that_says_nothing_of_earlier_sends_is_still_one(folder):
    fields = REPLY._asdict()
    del fields["doubtful"]
    folder.write_json("k.json", {"schema": 2, **fields})
    assert Ledger(folder).reply("k") == REPLY and Ledger(folder).spent().ignored_files == 0


def test_two_replies_to_one_call_are_one_reply_at_the_cost_of_both(folder):
    ledger = Ledger(folder)
    ledger.intend("k", Intent(1, 80, 20, 0.5))
    assert ledger.settle("k", REPLY) == REPLY
    assert ledger.settle("k", REPLY) == REPLY, "the same one again is a write repeated"
    assert ledger.settle("k", REPLY._replace(body="later")).body == REPLY.body
    assert ledger.spent() == Spent(calls=2, prompt_tokens=200, completion_tokens=100, usd=0.5)
    assert ledger.settle("k", REPLY._replace(usd=None)).usd is None


OLDER = ['{"body": "b", "seconds": 1.0}', '{"schema": 1}', '{"schema": 2}']


def test_what_was_bought_before_its_price_was_known_counts_at_todays(folder):
    ledger = Ledger(folder)
    ledger.keep("k", REPLY._replace(usd=None))
    ledger.keep("l", REPLY)
    assert ledger.spent().usd is None
    assert ledger.spent(Prices(1e6, 2e6)).usd == 100 + 2 * 50 + 0.25


@pytest.mark.parametrize("text", ["", '{"schema": 2, "body": "cut', "[]", *OLDER])
def test_a_torn_or_older_file_is_ignored_and_counted(folder, text):
    ledger = Ledger(folder)
    ledger.keep("good", REPLY)
    folder.write_bytes("bad.json", text.encode())
    folder.write_bytes("intents/bad.json", text.encode())
    assert ledger.replies(["good", "bad"]) == {"good": REPLY}
    assert ledger.intent("bad") == Intent()
    assert ledger.spent().ignored_files == 2


def test_a_ledger_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "replies").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        Ledger(Storage(str(tmp_path / "replies"))).intend("k", Intent(1))


def test_what_could_change_a_reply_is_in_the_key():
    request = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0.0}
    calls = [
        make_call(request, base_url=None),
        make_call(request, base_url="http://here/v1"),
        make_call(request, base_url=None, swapped=True),
        make_call(request, base_url=None, repeat=1),
        make_call({**request, "temperature": 1.0}, base_url=None),
        make_call({**request, "model": "n"}, base_url=None),
    ]
    assert len({call.key for call in calls}) == len(calls)
    assert make_call(dict(reversed(request.items())), base_url=None) == calls[0]
