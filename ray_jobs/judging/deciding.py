"""Which fields of [judge] decide a verdict: a finished stage is not made with others unless it is forced."""

from collections.abc import Iterable

HOW_TO_CALL = {"max_concurrency", "max_retries", "timeout_s", "api_key_env", "requests_per_minute", "tokens_per_minute", "backend"}
"""Fields of a language-model judge that change no verdict."""
NOT_DECIDING = {"openai", "jury", "num_callers", "budget_usd", "max_calls", "rubric", "imports"}
"""Fields of [judge] that change no verdict, or that decide by the content of a file or by the fields of their tables."""


def deciding_fields(fields: Iterable[str], *, judges: Iterable[str], judge_fields: Iterable[str]) -> list[str]:
    """Return the deciding fields of a config, dotted; of the tables of judges that are not asked none is.

    Args:
        fields: those of [judge].
        judges: names of the language models that are asked.
        judge_fields: those of a language-model judge's table.
    """
    tables = ["judge.openai" if name == "openai" else f"judge.jury.{name}" for name in judges]
    of_a_judge = [field for field in judge_fields if field not in HOW_TO_CALL]
    return [
        *(f"judge.{field}" for field in fields if field not in NOT_DECIDING),
        *(f"{table}.{field}" for table in tables for field in of_a_judge),
    ]
