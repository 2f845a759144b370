"""What a token costs: from the config, else the dated list of a provider's own endpoint, else unknown."""

from ray_jobs.core.errors import ConfigError
from ray_jobs.judging.calls import Prices

AS_OF = "2026-06"
SOURCE = "https://platform.openai.com/docs/pricing"
LISTED = {
    "gpt-4o": Prices(2.50, 10.00),
    "gpt-4o-mini": Prices(0.15, 0.60),
    "gpt-4.1": Prices(2.00, 8.00),
    "gpt-4.1-mini": Prices(0.40, 1.60),
    "gpt-4.1-nano": Prices(0.10, 0.40),
}
"""Standard prices of text tokens on the provider's own endpoint at AS_OF, as copies of the page SOURCE gave them: the page itself
was not read, but three other lists agree. A dated snapshot of a model costs what the model costs. Models that refuse `max_tokens`
cannot judge here and are not listed."""
FREE = Prices(0.0, 0.0)


def prices_of(model: str, *, prompt: float | None, completion: float | None, base_url: str | None) -> Prices:
    """Return the given prices, and where one is not given, the listed one if the model is asked at its provider's own endpoint.

    Args:
        base_url: another endpoint than the provider's: the same name may cost anything there.
    """
    listed = LISTED.get(_without_date(model), Prices()) if base_url is None else Prices()
    return Prices(listed.prompt if prompt is None else prompt, listed.completion if completion is None else completion)


def _without_date(model: str) -> str:
    """gpt-4o-2024-08-06 -> gpt-4o."""
    name, *date = model.rsplit("-", 3)
    return name if len(date) == 3 and [len(part) for part in date] == [4, 2, 2] and "".join(date).isdigit() else model


def are_known(prices: Prices) -> bool:
    """Return whether a call can be priced."""
    return prices.cost(1, 1) is not None


def check_priced(prices: Prices, *, judge: str, budget_usd: float | None) -> None:
    """Refuse a budget in dollars that cannot be kept.

    Args:
        judge: what is asked and where, for the message.

    Raises:
        ConfigError: there is a budget and a price is unknown.
    """
    if budget_usd is not None and not are_known(prices):
        raise ConfigError(
            f"budget_usd = {budget_usd:g} cannot be kept: the price of judge {judge} is unknown; set its usd_per_million_prompt_tokens "
            "and usd_per_million_completion_tokens, or use max_calls"
        )
