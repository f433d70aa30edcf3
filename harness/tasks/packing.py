"""Several rows in one sequence, none of which sees another.

Each row starts at position 0, which is how transformers is told to keep them apart; there is no
attention mask then. The last token of a row does not predict the first of the next.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def pack(order: Iterable[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows in `order`, put into sequences of up to `limit` tokens as they come."""
    sequences: list[list[int]] = []
    room = 0
    for i in order:
        if lengths[i] > room:
            sequences.append([])
            room = limit
        sequences[-1].append(i)
        room -= lengths[i]
    return sequences


def position_ids(lengths: Sequence[Sequence[int]]) -> Tensor:
    """(b, t): 0, 1, ... for each row of a sequence, and for the padding at its end.

    Args:
        lengths: per sequence those of its rows.
    """
    longest = max(map(sum, lengths))
    return torch.tensor(
        [[x for n in (*rows, longest - sum(rows)) for x in range(n)] for rows in lengths]
    )
