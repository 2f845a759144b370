"""Examples into rows of at most `max_length` tokens: fewer rows, no padding, no example cut."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from ray_jobs.core.records import content_id
from ray_jobs.corpus.template import Encoded

IGNORE = -100
"""Label of a token that is not trained."""


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return groups of indices whose lengths sum to at most `capacity` each, by best-fit decreasing.

    In falling order best fit needs at most 11/9 times the fewest rows possible, and four more. Indices in a group ascend,
    groups are ordered by their first index: the result depends on the lengths alone.

    Raises:
        ValueError: a length is above the capacity.

    Source: Johnson, Demers, Ullman, Garey, Graham 1974, SIAM J. Comput. 3(4); Ding et al. 2024, arXiv:2404.10830 (for language models).
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, group), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"length {lengths[index]} at {index} is above the capacity {capacity}")
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            groups.append([])
            free, group = capacity, len(groups) - 1
        else:
            free, group = room.pop(place)
        groups[group].append(index)
        insort(room, (free - lengths[index], group))
    return sorted(sorted(group) for group in groups)


def packed_row(ids: list[str], examples: list[Encoded], *, sources: Sequence[str] = ()) -> dict[str, Any]:
    """Return one row of the training files; position ids and attention restart at each of `segment_lengths`.

    Args:
        ids: of the examples.
        examples: token ids, and how many at the start are not trained; at least the first never is, as no
            token of the same example comes before it.
        sources: name of the source of each example; none leaves the column out.
    """
    lengths = [example.segment_lengths or [len(example.input_ids)] for example in examples]
    named = [source for source, each in zip(sources, lengths, strict=True) for _ in each] if sources else None
    return {
        "row_id": content_id(*ids),
        "input_ids": [token for example in examples for token in example.input_ids],
        "labels": [label for example in examples for label in labels(example)],
        "segment_lengths": [length for each in lengths for length in each],
        **({"segment_sources": named} if named else {}),
    }


def labels(example: Encoded) -> list[int]:
    """Return the labels of one example: its own, or its tokens, IGNORE where they are not trained."""
    if example.labels is not None:
        return example.labels
    untrained = max(1, example.num_untrained)
    return [IGNORE] * untrained + example.input_ids[untrained:]
