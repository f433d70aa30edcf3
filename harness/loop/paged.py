"""AdamW whose state is paged: it moves to the host's memory when the device has none left.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) against peaks of memory; the kernels are
bitsandbytes' and the state is float32, as AdamW's.
"""

from collections.abc import Iterable
from typing import Any

import torch


def paged_adamw(
    params: Iterable[dict[str, Any]],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """bitsandbytes' PagedAdamW over optimiser groups on a CUDA device.

    Raises ValueError elsewhere, or if bitsandbytes is not installed.
    """
    groups = list(params)
    if any(not parameter.is_cuda for group in groups for parameter in group["params"]):
        raise ValueError(
            "optimizer=paged_adamw pages a CUDA device's memory, and this run is on the CPU; use "
            "optimizer=adamw."
        )
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError:
        raise ValueError(
            'optimizer=paged_adamw needs bitsandbytes: pip install -e ".[peers]", or use '
            "optimizer=adamw."
        ) from None
    optimizer: torch.optim.Optimizer = PagedAdamW32bit(groups, betas=tuple(betas), eps=eps)
    return optimizer


paged_adamw.state_bytes_per_number = 8.0  # type: ignore[attr-defined]
