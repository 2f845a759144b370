"""Terms of a loss brought to the size of the divergence, whatever their units."""


class Balance:
    """The factor of each further term: divergence over term, as their means over all workers were in the step before.

    So it is the same for any number of workers and micro-batches of a step, and a checkpoint's copy lets a run go on
    exactly. In the first step, when no size is known, the divergence trains alone.

    Args:
        divergence: the name of the term that the others are brought to.
    """

    def __init__(self, divergence: str):
        self._divergence = divergence
        self._terms: dict[str, float] = {}

    def factor(self, term: str) -> float:
        """Return what a further term is multiplied by."""
        size = self._terms.get(term, 0.0)
        return self._terms[self._divergence] / size if size > 0 else 0.0

    def after_step(self, terms: dict[str, float]) -> None:
        """Take the means of a step over all workers."""
        self._terms = dict(terms)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return self._terms
