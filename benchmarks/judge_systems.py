"""One contestant of the judge benchmarks: answers the prompts against the stub and prints what it got as a JSON line.

Runs in raystill's environment or in that of the peers, which need no part of raystill. Settings: `system`, `url` of the
endpoint, `n` prompts, `tokens_per_call` and `requests_per_minute`, `tokens_per_minute` for those that are told the limit,
`folder` for those that keep something.
"""

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

MODEL = "stub-judge"
KEY = "sk-stub"
MAX_TOKENS = 256
Settings = dict[str, Any]


def prompts(n: int) -> list[str]:
    """Return n different prompts of about 250 tokens, the same for everybody: a question, a sample answer, two answers."""
    sample = "A scheduler is preemptive if it may take the processor from a running thread; a timer interrupt makes that possible. "
    answer = "The scheduler decides which thread runs; it waits until the thread gives the processor up or its quantum is over. "
    return [
        f"Question {i}: what makes a scheduler preemptive?\nSample answer: {sample}\n"
        f"Answer A: {answer * 3}\nAnswer B: {answer * 2}\nWhich is better?"
        for i in range(n)
    ]


def request(prompt: str) -> dict[str, Any]:
    """Return the body that a prompt makes."""
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0, "max_tokens": MAX_TOKENS}


def calls_per_second(settings: Settings) -> float:
    """Return the rate that a user who knows both limits and what a call takes would choose."""
    by_requests = (settings.get("requests_per_minute") or float("inf")) / 60
    by_tokens = (settings.get("tokens_per_minute") or float("inf")) / 60 / settings["tokens_per_call"]
    return min(by_requests, by_tokens)


async def plain(settings: Settings, *, at_once: int | None = None, share: float | None = None, retries: int = 2, part: int = 0) -> int:
    """AsyncOpenAI in a loop: so many at once, or started at a share of the limit; a caller's part of the prompts."""
    from openai import AsyncOpenAI, OpenAIError

    client = AsyncOpenAI(base_url=settings["url"], api_key=KEY, max_retries=retries)
    slots = asyncio.Semaphore(at_once or settings["n"])
    start = time.monotonic()

    async def ask(number: int, prompt: str) -> bool:
        if share:
            await asyncio.sleep(start + number / (share * calls_per_second(settings)) - time.monotonic())
        async with slots:
            try:
                reply = await client.chat.completions.create(**request(prompt))
            except OpenAIError:
                return False
        return bool(reply.choices[0].message.content)

    mine = prompts(settings["n"])[part :: settings.get("callers", 1)]
    return sum(await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(mine))))


def paced(settings: Settings, share: float) -> int:
    """Paced loops, one a caller, each at the same share of the limit and in a process of its own."""
    parts = range(settings.get("callers", 1))
    if len(parts) == 1:
        return asyncio.run(plain(settings, share=share))
    with ProcessPoolExecutor(len(parts)) as pool:
        return sum(pool.map(_paced_part, parts, itertools.repeat(settings), itertools.repeat(share)))


def _paced_part(part: int, settings: Settings, share: float) -> int:
    return asyncio.run(plain(settings, share=share, part=part))


def inspect(settings: Settings, *, at_once: int | None = None, cache: bool = False) -> int:
    """inspect_ai's eval of a task that generates once a sample; its display and log viewer are off."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.solver import generate

    config = GenerateConfig(temperature=0.0, max_tokens=MAX_TOKENS)
    model = get_model(f"openai/{MODEL}", base_url=settings["url"], api_key=KEY, responses_api=False, config=config)
    task = Task(dataset=MemoryDataset([Sample(input=prompt) for prompt in prompts(settings["n"])]), solver=generate(cache=cache))
    options = {"max_connections": at_once} if at_once else {}
    [log] = eval(task, model=model, display="none", log_dir=settings["folder"], fail_on_error=False, **options)
    return sum(bool(sample.output.choices and sample.output.completion) for sample in log.samples or [])


def curator(settings: Settings, *, told: bool) -> int:
    """bespokelabs-curator with the limits of the headers, or told by hand."""
    from bespokelabs import curator

    class Ask(curator.LLM):
        def prompt(self, row):
            return row["prompt"]

        def parse(self, row, response):
            return {"prompt": row["prompt"], "response": str(response)}

    limits = {}
    if told:
        limits = {
            "max_requests_per_minute": round(settings.get("requests_per_minute") or 10**6),
            "max_tokens_per_minute": round(settings.get("tokens_per_minute") or 10**8),
        }
    parameters = {"base_url": settings["url"], "api_key": KEY, **limits}
    model = Ask(
        model_name=f"openai/{MODEL}",
        backend="litellm",
        backend_params=parameters,
        generation_params={"temperature": 0.0, "max_tokens": MAX_TOKENS},
    )
    found = model([{"prompt": prompt} for prompt in prompts(settings["n"])], working_dir=settings["folder"])
    rows = found.dataset if hasattr(found, "dataset") else found
    return sum(bool(row["response"]) for row in rows)


def on_ray(system: str, settings: Settings, **options: Any) -> int:
    from benchmarks import judge_ray

    return getattr(judge_ray, system)(settings, **options)


SYSTEMS: dict[str, Callable[[Settings], int]] = {
    "naive-16": lambda settings: asyncio.run(plain(settings, at_once=16)),
    "naive-64": lambda settings: asyncio.run(plain(settings, at_once=64)),
    "fixed-8": lambda settings: asyncio.run(plain(settings, at_once=8, retries=10)),
    "paced-1.00": lambda settings: paced(settings, 1.0),
    "paced-0.97": lambda settings: paced(settings, 0.97),
    "paced-split": lambda settings: paced(settings, 0.97 / settings.get("callers", 1)),
    "ray-http": lambda settings: on_ray("http_processor", settings, is_tuned=False),
    "ray-http-tuned": lambda settings: on_ray("http_processor", settings, is_tuned=True),
    "ray-http-checkpoint": lambda settings: on_ray("http_processor", settings, is_tuned=True, checkpoint=True),
    "raystill": lambda settings: on_ray("raystill", settings),
    "raystill-here": lambda settings: on_ray("raystill_here", settings),
    "inspect": inspect,
    "inspect-tuned": lambda settings: inspect(settings, at_once=20),
    "inspect-cache": lambda settings: inspect(settings, cache=True),
    "curator-headers": lambda settings: curator(settings, told=False),
    "curator-told": lambda settings: curator(settings, told=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    os.environ |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": settings["url"], "INSPECT_CACHE_DIR": settings["folder"]}
    os.environ |= {"CURATOR_DISABLE_RICH_DISPLAY": "1", "TELEMETRY_ENABLED": "false"}
    print(json.dumps({"answered": SYSTEMS[settings["system"]](settings)}), flush=True)


if __name__ == "__main__":
    main()
