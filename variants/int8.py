"""A weight in 8 bits, each row with a scale of its own (LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339, section 2.1, without the columns of outliers: those are the input's).

    codes = round(127 W / absmax)        W ~ codes absmax / 127        absmax (o,): max |W| of a row
"""

import torch
from torch import Tensor

from variants.store import WeightStore, check_kept, frozen

_STEP = 1 / 127


class Int8Store(WeightStore):
    """A weight as int8 codes and a float32 scale for each row: 8 + 32 / i bits an entry.

    Codes and values are those of bitsandbytes, which rounds a weight to float16 before: give a
    float16 base for its bits.

    Raises ValueError for a weight that is not 2-D or is empty, and one with a NaN or an infinity.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
            raise ValueError(
                f"weight is {weight.dtype} of shape {tuple(weight.shape)}; an Int8Store keeps a "
                "non-empty 2-D weight of floating point numbers."
            )
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        absmax = weight.detach().abs().amax(1).float()
        if not (absmax.is_meta or absmax.isfinite().all()):
            raise ValueError("the weight has a NaN or an infinity, which has no code.")
        codes = torch.round(weight.detach() * (127.0 / absmax)[:, None])
        codes = codes.where(absmax[:, None] > 0, 0.0)  # of a row of zeros
        self.codes, self.absmax = frozen(codes.to(torch.int8)), frozen(absmax)

    @classmethod
    def of(cls, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> "Int8Store":
        """The store of codes (o, i) in int8 and absmax (o,) in float32 that are there already, for
        a weight that counts as of `dtype`. Raises ValueError if they do not fit."""
        if codes.dtype != torch.int8 or codes.ndim != 2 or not codes.numel():
            raise ValueError(f"the codes are {codes.dtype} of shape {tuple(codes.shape)}.")
        check_kept(absmax, torch.float32, codes.shape[0], "absmax")
        store = cls.__new__(cls)
        WeightStore.__init__(store)
        store.shape, store.dtype = (codes.shape[0], codes.shape[1]), dtype
        store.codes, store.absmax = frozen(codes), frozen(absmax)
        return store

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.absmax.view(torch.float32)[:, None] * _STEP).to(dtype)

    def like(self, weight: Tensor) -> "Int8Store":
        store = Int8Store(weight)
        store.dtype = self.dtype
        return store

    def nbytes(self) -> int:
        return sum(kept.numel() * kept.element_size() for kept in self.parameters())
