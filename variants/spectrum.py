"""The singular values of a low-rank product from its factors alone, never forming (o, i).

QR of B and of A^T, then the SVD of the k x k core, in float64 on the CPU: it is small, equal on
every device, and equal in every process of a parallel run.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """B A = U diag(S) V^T in float64."""

    U: Tensor  # o k
    S: Tensor  # k, descending
    V: Tensor  # i k


@torch.no_grad()
def spectrum(B: Tensor, A: Tensor) -> Spectrum:
    """The thin SVD of B A, for B (o, k) and A (k, i), in O((o + i) k^2)."""
    B, A = B.to("cpu", torch.float64), A.to("cpu", torch.float64)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)  # k k
    return Spectrum(Q_B @ U, S, Q_A @ Vh.T)


def energy_rank(S: Tensor, epsilon: float, min_rank: int, max_rank: int) -> int:
    """The smallest k that discards at most `epsilon` of the energy, in [min_rank, max_rank]."""
    discarded = S.square().flip(0).cumsum(0).flip(0)  # k: entry j is lost if j directions stay
    k = int((discarded > epsilon * discarded[0]).sum())
    return min(max(k, min_rank), max_rank)
