"""Size, speed and quality of several variants of one model, measured side by side.

One variant is in memory at a time. All are timed once, then all again, so that a machine that slows down or speeds up
meanwhile does so for all of them; medians count. Every round loads the variant anew and warms it up first.
"""

import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ray_jobs.compression.quality import Quality, Segment, log_probabilities, score
from ray_jobs.compression.runtimes import Runtime
from ray_jobs.core.progress import OnProgress

WARM_UP_TOKENS = 2


class Candidate(NamedTuple):
    """One row of the table to be."""

    name: str
    facts: dict[str, Any]
    """Columns known before measuring: engine, precision, device, size_bytes."""
    open: Callable[[], Runtime]
    """Loads the model."""
    is_variant: bool = True
    """Whether it is made from the reference, so that its distance to the reference says what the making cost."""


class Timing(NamedTuple):
    """One timed answer."""

    first_token_s: float
    total_s: float
    cpu_s: float
    """Processor seconds of all threads of this process."""


class Measured(NamedTuple):
    """What was seen of one candidate."""

    loads_s: list[float]
    timings: list[Timing]
    qualities: list[Quality]
    """One: quality does not scatter."""


def measure(
    candidates: list[Candidate],
    *,
    prompts: list[list[int]],
    segments: list[Segment],
    new_tokens: int,
    repetitions: int,
    reference: str,
    on_progress: OnProgress = lambda done, total, note: None,
) -> list[dict[str, Any]]:
    """Return one row per candidate, in their order.

    Args:
        candidates: the reference stands before its variants.
        prompts: token ids of the timed questions.
        segments: held-out text for the quality columns.
        new_tokens: tokens generated for each prompt.
        repetitions: rounds of timing.
        reference: name of the candidate that the others are compared with.
    """
    measured = {candidate.name: Measured([], [], []) for candidate in candidates}
    log_probs: Iterable[torch.Tensor]
    expected: list[torch.Tensor] | None = None
    for index in range(repetitions * len(candidates)):
        candidate = candidates[index % len(candidates)]
        on_progress(index, repetitions * len(candidates), candidate.name)
        seen = measured[candidate.name]
        start = time.perf_counter()
        runtime = candidate.open()
        seen.loads_s.append(time.perf_counter() - start)
        seen.timings.extend(time_answers(runtime, prompts, new_tokens))
        if not seen.qualities:
            log_probs = (log_probabilities(runtime, segment) for segment in segments)
            if candidate.name == reference:
                log_probs = expected = list(log_probs)
            seen.qualities.append(score(log_probs, segments, expected if candidate.is_variant else None))
        del runtime
        gc.collect()
    rows = [_row(candidate, measured[candidate.name], new_tokens) for candidate in candidates]
    return _compared(rows, next(row for row in rows if row["name"] == reference))


def time_answers(runtime: Runtime, prompts: list[list[int]], new_tokens: int) -> list[Timing]:
    """Warm a runtime up and time one answer to each prompt."""
    runtime.generate(prompts[0], WARM_UP_TOKENS)
    timings = []
    for prompt in prompts:
        cpu_start = time.process_time()
        generation = runtime.generate(prompt, new_tokens)
        timings.append(Timing(generation.first_token_s, generation.total_s, time.process_time() - cpu_start))
    return timings


def folder_bytes(*folders: Path) -> int:
    """Return the bytes of all files below the folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def _row(candidate: Candidate, seen: Measured, new_tokens: int) -> dict[str, Any]:
    totals = [timing.total_s for timing in seen.timings]
    quality = seen.qualities[0]
    return {
        "name": candidate.name,
        **candidate.facts,
        "threads": torch.get_num_threads(),
        "load_s": float(np.median(seen.loads_s)),
        "first_token_s": float(np.median([timing.first_token_s for timing in seen.timings])),
        "answer_p50_s": float(np.percentile(totals, 50)),
        "answer_p95_s": float(np.percentile(totals, 95)),
        "tokens_per_s": new_tokens / float(np.median(totals)),
        "tokens_per_cpu_s": new_tokens / float(np.median([timing.cpu_s for timing in seen.timings])),
        "num_answers": len(totals),
        "new_tokens": new_tokens,
        "loss_nats": quality.loss_nats,
        "perplexity": quality.perplexity,
        "kl_nats": quality.kl_nats,
        "agreement": quality.agreement,
        "eval_tokens": quality.num_tokens,
    }


def _compared(rows: list[dict[str, Any]], base: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "speedup": row["tokens_per_s"] / base["tokens_per_s"],
            "size_share": row["size_bytes"] / base["size_bytes"],
            "loss_change_nats": row["loss_nats"] - base["loss_nats"],
        }
        for row in rows
    ]
