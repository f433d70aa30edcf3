"""Dropout masks that are a function of their place in a run, and cheap enough to be drawn twice.

To draw a number takes a CPU longer than a low-rank product spends on it. So a pass over a batch
draws one table, and the mask of each layer is a window of it, at an offset of the layer's own. The
entries of a mask are independent of each other. Two layers of a pass see the same draws, shifted
against each other by a random distance; another pass sees others.

Nothing is taken from the global generator, so two variants of one seed see the same base dropout.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from variants.streams import stream_seed

Mask = Callable[[torch.Size, torch.device, torch.dtype], Tensor]

_SMALLEST_TABLE = 2**16
_DRAWS_PER_WORD = 4  # 16-bit draws in one 64-bit word


class DropoutMasks:
    """Those of one pass over a batch.

    Args:
        step, microstep: where in training.
    """

    def __init__(self, step: int, microstep: int = 0):
        self.position = (step, microstep)
        self._tables: dict[tuple, Tensor] = {}

    def keep(
        self,
        p: float,
        seed: int,
        path: str,
        part: tuple[int, int],
        shape: torch.Size,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A layer's mask: ones, and zeros with probability p (to 2^-16). The caller must not write
        it.

        Args:
            seed: of the run; with `path`, the layer's, and the position all it depends on.
            part: (index, parts), if the mask is the index-th of so many equal parts of a larger
                one, whose rows the processes of a run share.
        """
        total = part[1] * shape.numel()
        count = max(_SMALLEST_TABLE, 1 << (5 * total // 4).bit_length())
        offset = stream_seed(seed, path, "dropout", *self.position) % (count - total + 1)
        start = offset + part[0] * shape.numel()
        table = self._table(p, seed, count, device, dtype)
        return table[start : start + shape.numel()].view(shape)

    def _table(
        self, p: float, seed: int, count: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        key = (p, seed, count, device, dtype)
        if key not in self._tables:
            stream = stream_seed(seed, "dropout", *self.position)
            words = _random_words(stream, count // _DRAWS_PER_WORD, device)
            # Not a boolean: to multiply by one takes longer than to draw it.
            kept = words.view(torch.int16).float().ge_(round(p * 2**16) - 2**15)
            self._tables[key] = kept.to(dtype)
        return self._tables[key]


def _random_words(seed: int, count: int, device: torch.device) -> Tensor:
    """Random int64 (count,), over their whole range."""
    if device.type == "cpu":  # a third of the time of torch's own generator
        return torch.from_numpy(np.random.SFC64(seed).random_raw(count).view(np.int64))
    words = torch.empty(count, dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
