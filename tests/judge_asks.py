"""Calls to the judge on loopback, asked without Ray, and what they should come to."""

import json

import pytest
from pydantic import SecretStr

from ray_jobs.judging.calls import Counters, EndpointOptions, Limits, Prices, make_call
from ray_jobs.judging.endpoint import most_completion_tokens, most_prompt_tokens
from ray_jobs.judging.here import ask_here
from ray_jobs.judging.ledger import Spent

SECRET = "sk-test-7f3a"
PRICES = Prices(1.0, 2.0)
USD = 200e-6
"""Of one reply."""
NUM = 12
OK = Counters(sent=NUM, ok=NUM, prompt_tokens=100 * NUM, completion_tokens=50 * NUM, usd=pytest.approx(NUM * USD))
SOON = {"retry-after-ms": "20"}


def calls_to(url, number=NUM):
    def request(i):
        text = f"<answer_a_1>\n{'x' * i}\n</answer_a_1><answer_b_1>\nxxxx\n</answer_b_1>"
        return {"model": "stub-1", "messages": [{"role": "user", "content": text}], "max_tokens": 100}

    return [make_call(request(i), base_url=url) for i in range(number)]


def faultless(number=NUM):
    """The winners, in the order of the calls."""
    return ["B"] * 4 + ["tie"] + ["A"] * (number - 5)


def winners(replies):
    return [json.loads(json.loads(reply.body)["choices"][0]["message"]["content"])["winner"] for reply in replies]


def worst(request):
    """What a request costs at most, in dollars."""
    return PRICES.cost(most_prompt_tokens(request), most_completion_tokens(request))


def spent_on(number):
    """What a ledger says of as many calls that were sent once and answered."""
    return Spent(number, 100 * number, 50 * number, pytest.approx(number * USD))


def ask(url, ledger, *, calls=None, max_retries=4, timeout_s=30.0, limits=None, limiter=None, **options):
    """Return replies in the order of the calls, and the limiter."""
    calls = calls_to(url) if calls is None else calls
    endpoint = EndpointOptions(SecretStr(SECRET), url, timeout_s, max_retries, **options)
    found = {}
    asked = ask_here(
        calls,
        endpoint=endpoint,
        ledger=ledger,
        limits=limits or Limits(requests_per_minute=12000),
        prices=PRICES,
        limiter=limiter,
        on_reply=lambda call, reply: found.__setitem__(call.key, reply),
    )
    return [found.get(call.key) for call in calls], asked
