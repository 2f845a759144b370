"""The judge benchmark's contestants that run on Ray: its own HTTP processor, and raystill's judging.

python -m benchmarks.judge_ray holds a cluster: prints its address and stays until stdin ends, so that what is killed is
the driver and not the cluster under it.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.judge_systems import KEY, calls_per_second, prompts, request

Settings = dict[str, Any]
CPUS = 4
OBJECT_STORE_BYTES = 100 * 2**20
BLOCK_ROWS = 8
TUNED_ACTORS = 4
SPARE_S = 0.5
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers are 15 nicer than the clients that they are compared with


def tuned(settings: Settings, actors: int) -> tuple[int, int]:
    """Return the calls in flight and the qps of an actor with which so many actors make the limit, at the latency told.

    A batch of one row waits 1 / qps before it is sent: half a second of that keeps the rate where the latency varies.
    """
    rate, latency_s = calls_per_second(settings), settings["latency_s"]
    at_once = math.ceil(rate * (latency_s + SPARE_S) / actors)
    return at_once, max(1, round(1 / (actors * at_once / rate - latency_s)))


def connect(settings: Settings) -> None:
    """Join the cluster of the settings, or start one in this process."""
    import ray

    ray.init(**({"address": settings["address"]} if "address" in settings else local()), log_to_driver=False, logging_level="ERROR")


def local() -> dict[str, Any]:
    return {"address": "local", "num_cpus": CPUS, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}


def http_processor(settings: Settings, *, is_tuned: bool, checkpoint: bool = False) -> int:
    """Run ray.data.llm's HTTP processor; return the rows that have a reply.

    Args:
        is_tuned: batches of one row, four actors with many calls each, retries. Where `callers` are set, each has what one
            alone would need.
        checkpoint: rows that were written are not asked again.
    """
    at_once, qps = tuned(settings, 1 if "callers" in settings else TUNED_ACTORS)
    if is_tuned:
        os.environ["RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY"] = str(at_once)
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    connect(settings)
    ray.data.DataContext.get_current().enable_progress_bars = False
    actors = settings.get("callers", TUNED_ACTORS if is_tuned else 1)
    options: Settings = {"qps": max(1, round(calls_per_second(settings))), "max_retries": 2, "concurrency": actors}
    if is_tuned:
        stage = {"batch_size": 1, "concurrency": (actors, actors)}
        options |= {"max_retries": 10, "qps": qps, "batch_size": 1, "http_request_stage": stage}
    processor = build_processor(
        HttpRequestProcessorConfig(url=f"{settings['url']}/chat/completions", headers={"Authorization": f"Bearer {KEY}"}, **options),
        preprocess=lambda row: {"payload": request(row["prompt"])},
        postprocess=lambda row: {"id": row["id"], "reply": json.dumps(row["http_response"])},
    )
    items = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts(settings["n"]))]
    if not checkpoint:
        # batches of one block alone are in flight together: as many blocks as actors, if one knows
        rows = processor(ray.data.from_items(items, override_num_blocks=actors if is_tuned else None)).take_all()
        return sum("choices" in json.loads(row["reply"]) for row in rows)
    return checkpointed(processor, items, Path(settings["folder"]))


def checkpointed(processor: Any, items: list[dict[str, Any]], folder: Path) -> int:
    """Write replies as Parquet with Ray Data's checkpoints; return how many different rows the files hold."""
    import pyarrow.parquet as pq
    import ray
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(folder / "marks"), delete_checkpoint_on_success=False)
    source = folder / "items.jsonl"
    source.write_text("\n".join(map(json.dumps, items)))
    dataset = ray.data.read_json(str(source)).repartition(-(-len(items) // BLOCK_ROWS))
    processor(dataset).write_parquet(str(folder / "rows"))
    files = (folder / "rows").glob("**/*.parquet")
    return len({row for file in files for row in pq.read_table(file, columns=["id"])["id"].to_pylist()})


def raystill(settings: Settings) -> int:
    """Ask as `raystill judge` does, with no limit told; return the calls that have a reply."""
    from ray_jobs.judging.calls import Prices
    from ray_jobs.judging.ray_calls import ask

    connect(settings)
    calls, options = raystill_calls(settings)
    asked = ask(calls, **options, prices=Prices(), num_callers=settings.get("callers", 1), title="judge")
    return sum(not reply.error for reply in asked.replies.values())


def raystill_here(settings: Settings) -> int:
    """The same limiter and ledger in this process, without Ray."""
    from ray_jobs.judging.here import ask_here

    calls, options = raystill_calls(settings)
    replies = []
    ask_here(calls, **options, on_reply=lambda _, reply: replies.append(reply))
    return sum(not reply.error for reply in replies)


def raystill_calls(settings: Settings) -> tuple[list[Any], dict[str, Any]]:
    """Return the calls, and where and how they are asked."""
    from pydantic import SecretStr

    from ray_jobs.core.storage import Storage
    from ray_jobs.judging.calls import EndpointOptions, Limits, make_call
    from ray_jobs.judging.ledger import Ledger

    calls = [make_call(request(prompt), base_url=settings["url"]) for prompt in prompts(settings["n"])]
    endpoint = EndpointOptions(api_key=SecretStr(KEY), base_url=settings["url"])
    return calls, {"endpoint": endpoint, "ledger": Ledger(Storage(settings["folder"])), "limits": Limits()}


def hold_cluster() -> None:
    import ray

    ray.init(**local(), log_to_driver=False)
    print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    hold_cluster()
