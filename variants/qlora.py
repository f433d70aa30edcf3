"""QLoRA: any adapter over a weight kept in 4 bits (Dettmers et al. 2023, arXiv:2305.14314, eq. 5).

    y = x dequant(codes, scales)^T + s x A^T B^T

Only the store differs from LoRA: the codes are frozen, and the dense weight exists for the length
of one matrix product, in the forward pass and again in the backward pass.
"""

import torch
from torch import Tensor

from variants import nf4
from variants.store import WeightStore, check_kept, frozen


class Nf4Store(WeightStore):
    """A weight as NF4 codes and scales, about 4.127 bits an entry with double quantisation.

    The float32 scales and tables are kept as the int32 words of the same bits: a cast of the whole
    model (`.half()`, `.to(torch.bfloat16)`, mixed precision that casts parameters) changes
    floating-point parameters alone, and a rounded scale would change the base under the adapter.

    Args:
        weight: (o, i) in float32, float16 or bfloat16.
        block: entries that share a scale, a power of two from 32 to 4096.
        double_quantization: keep the scales in 8 bits, with a float32 scale for each `nested_block`
            of them, instead of in float32.

    Raises ValueError for another dtype or block size, a weight that is not 2-D or is empty, and one
    with a NaN or an infinity.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        block: int = 64,
        double_quantization: bool = True,
        nested_block: int = 256,
    ):
        super().__init__()
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; an Nf4Store keeps a non-empty 2-D weight."
            )
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        self.block, self.nested_block = block, nested_block
        self.double_quantization = double_quantization
        codes, absmax = nf4.quantize(weight, block)
        self.codes = frozen(codes)
        self.table = frozen(nf4.TABLE.to(codes.device))
        if double_quantization:
            nested_codes, nested_absmax, offset = nf4.quantize_absmax(absmax, nested_block)
            self.absmax = frozen(nested_codes)
            self.nested_absmax = frozen(nested_absmax)
            self.offset = frozen(offset)
            self.nested_table = frozen(nf4.DYNAMIC_TABLE.to(codes.device))
        else:
            self.absmax = frozen(absmax)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        absmax: Tensor,
        table: Tensor,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        block: int,
        nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
    ) -> "Nf4Store":
        """The store of codes and scales that are there already, for a weight that counts as of
        `dtype`.

        Args:
            codes: (ceil(o i / 2),) in uint8, as `nf4.pack` makes them.
            absmax: (ceil(o i / block),) in float32, or with `nested` its codes in uint8.
            table: (16,) in float32.
            nested: absmax of the absmax's blocks, their mean (1,), the table (256,) in float32, and
                the entries of a block.

        Raises ValueError if they do not fit each other.
        """
        nf4.check_block(block)
        count = shape[0] * shape[1]
        blocks = -(-count // block)
        check_kept(codes, torch.uint8, -(-count // 2), "codes")
        check_kept(absmax, torch.float32 if nested is None else torch.uint8, blocks, "absmax")
        check_kept(table, torch.float32, 16, "the table")
        store = cls.__new__(cls)
        WeightStore.__init__(store)
        store.shape, store.dtype, store.block = shape, dtype, block
        store.double_quantization, store.nested_block = nested is not None, 256
        store.codes, store.absmax = frozen(codes.flatten()), frozen(absmax.flatten())
        store.table = frozen(table.flatten())
        if nested is not None:
            nested_absmax, offset, nested_table, store.nested_block = nested
            nf4.check_block(store.nested_block, "nested_block")
            check_kept(
                nested_absmax, torch.float32, -(-blocks // store.nested_block), "nested_absmax"
            )
            check_kept(offset, torch.float32, 1, "the offset")
            check_kept(nested_table, torch.float32, 256, "the nested table")
            store.nested_absmax, store.offset = frozen(nested_absmax.flatten()), frozen(offset)
            store.nested_table = frozen(nested_table.flatten())
        return store

    def scales(self) -> Tensor:
        """The scale of each block, (ceil(o i / block),) in float32, as `dequantize` uses it."""
        if not self.double_quantization:
            return self.absmax.view(torch.float32)
        return nf4.dequantize_absmax(
            self.absmax,
            self.nested_absmax.view(torch.float32),
            self.offset.view(torch.float32),
            block=self.nested_block,
            table=self.nested_table.view(torch.float32),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        table = self.table.view(torch.float32)
        return nf4.dequantize(
            self.codes, self.scales(), self.shape, block=self.block, dtype=dtype, table=table
        )

    def like(self, weight: Tensor) -> "Nf4Store":
        store = Nf4Store(
            weight,
            block=self.block,
            double_quantization=self.double_quantization,
            nested_block=self.nested_block,
        )
        store.dtype = self.dtype
        return store

    def nbytes(self) -> int:
        return sum(kept.numel() * kept.element_size() for kept in self.parameters())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes() / (self.shape[0] * self.shape[1])

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.bits_per_weight:.3f} bits per weight"
