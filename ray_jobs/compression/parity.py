"""Does an exported model still say what the torch model says? A bound per precision, checked before a folder is kept."""

import numpy as np

from ray_jobs.core.errors import ModelError

BOUNDS = {"float32": 1e-4, "int8": 0.5}
"""Largest relative error of the logits. float32 leaves room for another order of additions alone; int8 catches broken
graphs (their error is above 1) and leaves the finer judgement to the table's loss and KL columns."""


def relative_error(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return ||logits - reference|| / ||reference|| over all positions and tokens."""
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))


def check_parity(logits: np.ndarray, reference: np.ndarray, *, precision: str, what: str) -> float:
    """Return the relative error of an export's logits against torch's.

    Args:
        logits: of the exported model, [positions, vocabulary].
        reference: of the float32 torch model, same shape.
        precision: a key of BOUNDS.
        what: name of the export, for the message.

    Raises:
        ModelError: the error is above the bound of its precision, or not a number.
    """
    error = relative_error(logits, reference)
    if not error <= BOUNDS[precision]:
        raise ModelError(
            f"export {what} does not reproduce the torch model: relative error of the logits {error:.2g}, "
            f"allowed {BOUNDS[precision]:g}; take it out of compress.variants and report the model's architecture"
        )
    return error
