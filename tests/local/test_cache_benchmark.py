"""The benchmark of kept targets on a tiny model: what is read back is what a job's cache gives, and exact kinds are exact."""

from argparse import Namespace

import pytest

from benchmarks import distillation_cache as cache

SIZES = {"layers": 2, "length": 32, "eval_rows": 2, "turns": 1, "learning_rate": 1e-3, "global_batch_size": 2, "micro_batch_size": 2}
PLACE = {"dtype": "float32", "device": "cpu", "seed": 0, "threads": 1}


@pytest.fixture
def wikitext(tmp_path):
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text(" ".join(f"{name} {number}" for number in range(60)))
    return tmp_path


def test_exact_states_lead_to_the_exact_divergence_and_top_k_never_above_it(tiny_model, wikitext, tmp_path):
    options = Namespace(**SIZES, **PLACE, model=str(tiny_model), wikitext=wikitext, work=tmp_path / "students")
    found = cache.measure(options, divergence="jsd", steps=1, text="course")
    assert found["num_tokens"] == 62 and found["bytes_per_token"].keys() == set(cache.KINDS)
    assert 64 * 4 < found["bytes_per_token"]["hidden-float32"] < 64 * 4 + 20  # the shard's header beside the states
    assert 2 < found["bytes_per_token"]["top-256"] / found["bytes_per_token"]["top-64"] < 4
    rows = {(row["temperature"], row["kind"]): row for row in found["errors"]}
    assert len(rows) == len(found["errors"]) == 2 * len(cache.KINDS)
    for (_, kind), row in rows.items():
        exact = kind == "hidden-float32"
        assert row["relative"] < 1e-3 if exact else row["relative"] < 1 + 1e-6
        assert row["norm_ratio"] == pytest.approx(1, abs=1e-4) or kind.startswith("top")
        if kind.startswith("top"):
            assert row["bias_nats"] <= 0 and row["cosine_gap"] > rows[row["temperature"], "hidden-bfloat16"]["cosine_gap"]
    run = {**found, "divergence": "jsd", "text": "course", "steps": 1}
    assert cache.cost_table([run]).count("| top-") == 3 and cache.error_table(run).count("\n| ") == 2 * len(cache.KINDS) + 1
