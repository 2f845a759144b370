"""The provider's batch endpoint as a second way to the same ledger: half price, one batch, found again whoever was killed when."""

import json

import judge_asks
import pytest
from batch_server import BatchServer
from judge_asks import PRICES, USD, winners
from judge_server import completion
from pydantic import SecretStr

from ray_jobs.core.errors import ConfigError, EndpointError
from ray_jobs.core.storage import Storage
from ray_jobs.judging.batch import ask_batch
from ray_jobs.judging.batch_records import BatchRecords
from ray_jobs.judging.calls import Budget, Counters, EndpointOptions
from ray_jobs.judging.endpoint import LONGEST_ERROR
from ray_jobs.judging.ledger import Intent, Ledger
from ray_jobs.judging.parse import read_completion
from ray_jobs.judging.ray_calls import _check_batches

NUM = 6
SECRET = "sk-batch-1c"
HALF = 0.5 * USD
OK = Counters(sent=NUM, ok=NUM, prompt_tokens=100 * NUM, completion_tokens=50 * NUM, usd=pytest.approx(NUM * HALF))


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Storage(str(tmp_path / "replies")))


def calls_to(number=NUM):
    return judge_asks.calls_to("here", number)


def ask(server, ledger, *, budget=None, number=NUM, on_progress=lambda done, total, note: None):
    endpoint = EndpointOptions(SecretStr(SECRET), server.url, 30.0, 1)
    calls = [call for call in calls_to(number) if ledger.reply(call.key) is None]
    return ask_batch(calls, endpoint=endpoint, ledger=ledger, budget=budget, prices=PRICES, on_progress=on_progress, poll_s=0.01)


def test_a_batch_answers_all_at_half_the_price_and_is_kept(ledger, tmp_path):
    with BatchServer().running() as server:
        asked = ask(server, ledger)
        assert asked.counters == OK and not asked.stopped
        assert winners([asked.replies[call.key] for call in calls_to()]) == ["B"] * 4 + ["tie", "A"]
        assert ask(server, ledger).counters == Counters(usd=0)
    assert len(server.batches) == 1 and ledger.spent().usd == OK.usd and ledger.spent().calls == NUM
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("moment", ["uploaded", "made", "waiting"])
def test_a_killed_run_finds_its_batch_again_and_pays_no_second_one(ledger, moment):
    def kill(done, total, note):
        raise Killed

    with BatchServer(looks=3).running() as server:
        if moment == "waiting":
            with pytest.raises(Killed):
                ask(server, ledger, on_progress=kill)
        else:
            _leave_after(server, ledger, moment)
        assert ledger.spent().calls == NUM, "what is out may be billed"
        asked = ask(server, ledger)
        assert asked.counters.ok == NUM and not asked.stopped
    assert len(server.batches) == 1 and sorted(server.billed) == sorted(call.key for call in calls_to())
    assert ledger.spent().usd == OK.usd


def _leave_after(server, ledger, moment):
    """Leave the ledger as a run does that is killed before the batch's id is written: with the batch made, or not yet."""
    record = None

    def spoil(method, path):
        nonlocal record
        folder = ledger.folder.sub("batches")
        if (method, path) == ("POST", "/v1/batches"):
            [name] = folder.names()
            record = (folder, name, folder.read_json(name))
            if moment == "uploaded":
                raise ConnectionError("killed here")

    server.hook = spoil
    if moment == "uploaded":
        with pytest.raises(EndpointError, match="the same command goes on"):
            ask(server, ledger)
    else:
        with pytest.raises(Killed):
            ask(server, ledger, on_progress=_killed)
        folder, name, before = record
        folder.write_json(name, before)
    server.hook = lambda method, path: None


def _killed(done, total, note):
    raise Killed


def test_calls_in_a_batch_that_is_still_out_are_not_asked_one_by_one(ledger):
    keys = [call.key for call in calls_to()]
    with BatchServer().running() as server:
        with pytest.raises(Killed):
            ask(server, ledger, on_progress=_killed)
        [batch] = BatchRecords(ledger).open(keys).values()
        assert batch.batch_id and sorted(batch.keys) == sorted(keys) and not BatchRecords(ledger).open(["another"])
        with pytest.raises(ConfigError, match=f"batch {batch.batch_id} .* holds 6 of these calls, which would be paid twice"):
            _check_batches(ledger, set(keys), "judge")
        ask(server, ledger)
    assert not BatchRecords(ledger).open(keys)


@pytest.mark.parametrize("moment", ["uploaded", "made"])
def test_calls_in_a_batch_that_may_have_been_made_are_not_asked_one_by_one(ledger, moment):
    keys = {call.key for call in calls_to()}
    with BatchServer().running() as server:
        _leave_after(server, ledger, moment)
        with pytest.raises(ConfigError, match="a batch that may have been made of an earlier run holds 6 of these calls"):
            _check_batches(ledger, keys, "judge")
        ask(server, ledger)
    _check_batches(ledger, keys, "judge")


def test_a_record_whose_write_was_killed_is_passed_over(ledger):
    folder, keys = ledger.folder.sub("batches"), [call.key for call in calls_to()]
    folder.write_json("whole.json.tmp-7", {"keys": keys})
    for name in ("torn.json.tmp-7", "torn.json"):
        folder.write_bytes(name, b'{"keys": ["')
    assert not BatchRecords(ledger).open(keys)
    with BatchServer().running() as server:
        assert ask(server, ledger).counters == OK


def test_an_expired_batch_bills_what_it_finished_and_the_rest_is_asked_next(ledger):
    with BatchServer(num_answered=4).running() as server:
        asked = ask(server, ledger)
        assert asked.counters.ok == 4 and "2 calls were not answered before their batch expired" in asked.stopped
        assert ledger.spent().calls == 4 and ledger.spent().usd == pytest.approx(4 * HALF)
        server.num_answered = None
        assert ask(server, ledger).counters.ok == 2
    assert sorted(server.billed) == sorted(call.key for call in calls_to())


def test_what_calls_may_have_cost_before_a_batch_still_counts(ledger):
    first, last = calls_to()[0], calls_to()[-1]
    for call in (first, last):
        ledger.intend(call.key, Intent(2, usd=0.5))
    with BatchServer(num_answered=4).running() as server:
        ask(server, ledger)
    assert ledger.spent().calls == 4 + 2 + 2 and ledger.spent().usd == pytest.approx(4 * HALF + 4 * 0.5)
    assert ledger.intent(last.key).sends == 2 and ledger.reply(first.key).doubtful == 2


@pytest.mark.parametrize(("path", "status"), [("/v1/files", 404), ("/v1/files", 401), ("/v1/batches", 404)])
def test_a_batch_that_is_refused_leaves_the_ledger_as_it_was(ledger, path, status):
    first = calls_to()[0]
    ledger.intend(first.key, Intent(2, usd=0.5))
    before = ledger.spent()
    with BatchServer(hook=lambda method, at: status if at == path else None).running() as server:
        with pytest.raises(EndpointError, match=f"cannot be asked for a batch: Error code: {status}"):
            ask(server, ledger)
        assert ledger.spent() == before and not BatchRecords(ledger).open([call.key for call in calls_to()])
        server.hook = lambda method, at: None
        assert ask(server, ledger, budget=Budget(calls=NUM + 2)).counters.ok == NUM


def test_a_text_that_is_refused_is_an_unscored_row(ledger):
    with BatchServer(refuses=lambda request: "\nxx\n<" in request["messages"][0]["content"]).running() as server:
        asked = ask(server, ledger)
    assert asked.counters.ok == NUM - 1 and asked.counters.unscored == 1 and not asked.stopped
    [failed] = [reply for reply in asked.replies.values() if reply.error]
    assert "400 - content filter" in failed.error and ledger.spent().calls == NUM - 1
    assert asked.counters.usd == ledger.spent().usd == pytest.approx((NUM - 1) * HALF)


def test_half_a_surrogate_and_any_line_separator_in_a_reply_can_be_kept(ledger):
    odd = "half a pair \udc80 and\u2028a line"
    with BatchServer(answer=lambda request: odd).running() as server:
        assert ask(server, ledger, number=1).counters.ok == 1
    assert read_completion(ledger.reply(calls_to()[0].key).body).text == odd


def test_a_row_that_was_billed_for_nothing_counts(ledger):
    with BatchServer(answer=lambda request: json.loads(completion("")) | {"choices": []}).running() as server:
        assert ask(server, ledger).counters.unscored == NUM
    assert ledger.spent().calls == NUM


@pytest.mark.parametrize("wrap", [lambda text: {"error": text}, lambda text: text, lambda text: {"error": {"message": text}}])
def test_a_refusal_of_any_shape_is_one_line_without_the_key(ledger, wrap):
    text = f"half a pair \udc80\nof {SECRET} " + 400 * "x"
    with BatchServer(refuses=lambda request: "\nxx\n<" in request["messages"][0]["content"], refusal=wrap(text)).running() as server:
        [failed] = [reply for reply in ask(server, ledger).replies.values() if reply.error]
    assert failed.error.startswith("400 - half a pair ? of *** xxx") and len(failed.error) == LONGEST_ERROR


def test_a_budget_is_kept_before_anything_is_handed_over(ledger):
    with BatchServer().running() as server:
        asked = ask(server, ledger, budget=Budget(calls=4))
        assert asked.counters.ok == 4 and "the budget leaves 4 of 6 calls" in asked.stopped
        asked = ask(server, ledger, budget=Budget(usd=4 * HALF))
        assert asked.counters.sent == 0 and "leaves 0 of 2" in asked.stopped
    assert len(server.batches) == 1
