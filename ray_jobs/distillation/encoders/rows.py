"""Packed rows in which some tokens are masked anew each epoch, as a function of (seed, epoch, row)."""

from pathlib import Path

import numpy as np

from ray_jobs.core.errors import DataError
from ray_jobs.training.batches import IGNORE, PackedRows, Row

MASKED_SHARE = 0.15
"""Of the tokens that have a label (Devlin et al. 2018, arXiv:1810.04805, section 3.1)."""
_MASK, _RANDOM = 0.8, 0.1


class MaskedRows(PackedRows):
    """Rows whose labels are tokens to predict; `drawn` hides a share of them and keeps the labels of those alone.

    Of the chosen tokens 80% become the mask token, 10% a random one and 10% stay.

    Args:
        folder: as `PackedRows`.
        mask_id: id of the mask token.
        vocab_size: random tokens are below it.
        seed: of the run.

    Raises:
        DataError: as `PackedRows`.
    """

    def __init__(self, folder: str | Path, *, mask_id: int, vocab_size: int, seed: int):
        super().__init__(folder)
        self._mask_id, self._vocab_size, self._seed = mask_id, vocab_size, seed

    def __getitem__(self, index: int) -> Row:
        return self.drawn(index, epoch=0)

    def drawn(self, index: int, *, epoch: int) -> Row:
        """Return a row as an epoch masks it: the same whatever the number of workers and the steps before."""
        row = super().__getitem__(index)
        places = np.flatnonzero(row.labels != IGNORE)
        if not len(places):
            raise DataError(f"packed row {index} of {self.folder} has no token to mask: run `raystill prepare` again")
        random = np.random.default_rng([self._seed, epoch, index])
        chosen = random.permutation(places)[: max(1, round(MASKED_SHARE * len(places)))]
        fate = random.random(len(chosen))
        ids, labels = row.input_ids.copy(), np.full_like(row.labels, IGNORE)
        labels[chosen] = row.labels[chosen]
        ids[chosen[fate < _MASK]] = self._mask_id
        wrong = chosen[(fate >= _MASK) & (fate < _MASK + _RANDOM)]
        ids[wrong] = random.integers(self._vocab_size, size=len(wrong))
        return row._replace(input_ids=ids, labels=labels)
