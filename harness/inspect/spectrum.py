"""Diagnostics of one adapted layer, W' = diag(g) (W + s B A), from its factors.

QR of both factors and the SVD of a k x k core give the spectrum of s B A; products of W with k
vectors give the rest. The two functions of dense matrices at the end are for who asks for them.
All in float64, and all of it independent of signs and rotations of singular vectors: subspaces are
compared, never vectors.

Shapes: W (o, i), B (o, k), A (k, i), g (o,), U (o, r), V (i, r); r is the numerical rank of s B A.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from variants.spectrum import energy_rank
from variants.spectrum import spectrum as product_spectrum

EPS = torch.finfo(torch.float32).eps  # factors and weights are kept in float32
ROWS = 1024  # of W in float64 at a time


# ---- the spectrum of the low-rank part -----------------------------------------------------------


class LowRank(NamedTuple):
    """s B A = U diag(S[:r]) V^T."""

    U: Tensor  # o r
    S: Tensor  # min(o, i, k), descending; 0 from r on
    V: Tensor  # i r

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def norm(self) -> float:
        """||s B A||_F"""
        return float(self.S.norm())


@torch.no_grad()
def low_rank(B: Tensor, A: Tensor, scale: float) -> LowRank:
    """The thin SVD of s B A without forming it.

    Singular vectors are given for the values above eps ||sB||_F ||A||_F alone: rounding the factors
    to float32 moves no value by more (Weyl), so the vectors of smaller ones are arbitrary, and
    these values count as 0. At step 0 B is zero, and there is none.
    """
    B, A = scale * B.detach().double().cpu(), A.detach().double().cpu()
    if not B.shape[1]:
        return LowRank(B, B.new_zeros(0), A.T)
    U, S, V = product_spectrum(B, A)
    S = _without_rounding(S, B.norm() * A.norm())
    r = int((S > 0).sum())
    return LowRank(U[:, :r], S, V[:, :r])


def _without_rounding(S: Tensor, size: Tensor) -> Tensor:
    """S with 0 where it may be what rounding numbers of this size to float32 left."""
    return S.where(S.gt(EPS * size), 0.0)


def effective_rank(S: Tensor) -> float | None:
    """exp(entropy of S / sum(S)), in [1, k] (Roy and Vetterli 2007); None if S is zero."""
    p = S[S > 0] / S.sum()
    return math.exp(-float((p * p.log()).sum())) if len(p) else None


def stable_rank(S: Tensor) -> float | None:
    """||.||_F^2 / ||.||_2^2, in [1, k]; None if S is zero."""
    return float((S / S[0]).square().sum()) if len(S) and S[0] > 0 else None


def rank_for(S: Tensor, energy: float) -> int:
    """The fewest directions with this part of sum(S^2), as Biderman et al. count them
    (2024, arXiv:2405.09673, for energy 0.9); 0 if S is zero."""
    return energy_rank(S, 1 - energy, 0, len(S)) if len(S) and S[0] > 0 else 0


# ---- against W -----------------------------------------------------------------------------------


def product(W: Tensor, X: Tensor) -> Tensor:
    """W X in float64, some rows of W at a time."""
    return torch.cat([rows.double() @ X for rows in W.split(ROWS)])


def squared_row_norms(W: Tensor) -> Tensor:
    """||w||^2 of each row, in float64."""
    return torch.cat([rows.double().square().sum(1) for rows in W.split(ROWS)])


def projected_norm(W: Tensor, update: LowRank) -> float:
    """||U^T W V||_F: how much of W lies in the directions of s B A. The amplification factor is
    ||s B A||_F over it (Hu et al. 2021, arXiv:2106.09685, section 7.3)."""
    return float((update.U.T @ product(W, update.V)).norm())


def random_projected_norm(norm_W: float, shape: tuple[int, int], r: int) -> float:
    """The same for random U and V: the root of E ||U^T W V||_F^2 = r^2 ||W||_F^2 / (o i), over
    orthonormal bases uniformly distributed. Exact, so that no draw is needed."""
    o, i = shape
    return r * norm_W / math.sqrt(o * i)


class Rows(NamedTuple):
    """The movement of the rows of W, one row for each output."""

    norm_W: float  # ||W||_F
    norm_delta: float  # ||W' - W||_F
    delta_magnitude: float  # mean | ||w'|| - ||w|| |
    delta_direction: float | None  # mean 1 - cos(w', w), in [0, 2]; None without a direction


@torch.no_grad()
def rows(W: Tensor, B: Tensor, A: Tensor, scale: float, gain: Tensor | None) -> Rows:
    """||W' - W||_F, and the change of magnitude and direction (Liu et al. 2024, arXiv:2402.09353,
    section 3.2, whose columns are the rows of W as torch stores it).

    With w and d rows of W and s B A: ||w + d||^2 = ||w||^2 + 2 w.d + ||d||^2, where w.d needs W A^T
    alone; w' - w = (g - 1) w + g d. A row of W or W' that is zero has no direction: it is left out
    of that mean.
    """
    B, A = scale * B.detach().double().cpu(), A.detach().double().cpu()
    wd = (product(W, A.T) * B).sum(1)
    dd = ((B @ (A @ A.T)) * B).sum(1).clamp_min(0)
    return _rows(squared_row_norms(W), wd, dd, None if gain is None else gain.double().cpu())


@torch.no_grad()
def rows_of_dense(W: Tensor, adapted: Tensor) -> Rows:
    """The same from W and W' (o, i)."""
    W, adapted = W.double(), adapted.double()
    D = adapted - W
    return _rows(squared_row_norms(W), (W * D).sum(1), squared_row_norms(D), None)


def _rows(ww: Tensor, wd: Tensor, dd: Tensor, gain: Tensor | None) -> Rows:
    """The movement from ||w||^2, w.d and ||d||^2 (o,), where w' = g (w + d)."""
    g = torch.ones_like(ww) if gain is None else gain
    vv = (ww + 2 * wd + dd).clamp_min(0)
    delta = ((g - 1).square() * ww + 2 * g * (g - 1) * wd + g.square() * dd).clamp_min(0)
    # Differences of nearly equal numbers, with the cancellation done on paper.
    total = ww.sqrt() + vv.sqrt()
    magnitude = (g.abs() - 1) * vv.sqrt() + torch.where(total > 0, (2 * wd + dd) / total, 0.0)
    known = (ww > 0) & (vv > EPS**2 * ww) & (g != 0)
    product_of_norms = (ww * vv).sqrt()[known]
    cosine = (g.sign() * (ww + wd))[known] / product_of_norms
    sine_squared = (ww * dd - wd.square())[known].clamp_min(0) / product_of_norms.square()
    direction = torch.where(cosine > 0, sine_squared / (1 + cosine), 1 - cosine)
    return Rows(
        norm_W=float(ww.sum().sqrt()),
        norm_delta=float(delta.sum().sqrt()),
        delta_magnitude=float(magnitude.abs().mean()),
        delta_direction=float(direction.mean()) if len(direction) else None,
    )


# ---- two subspaces -------------------------------------------------------------------------------


def similarity(P: Tensor, Q: Tensor) -> Tensor:
    """phi(i, j) = ||P[:, :i]^T Q[:, :j]||_F^2 / min(i, j), in [0, 1], for all i and j at once.

    Hu et al. 2021, section 7.2. P (n, p) and Q (n, q) are orthonormal; entry (i - 1, j - 1) of the
    result (p, q) compares the first i directions of one with the first j of the other. The paper
    takes the singular vectors of A alone, which depend on how a product is shared between its
    factors; here they are those of s B A, in the order of its singular values.
    """
    return (P.T @ Q).square().cumsum(0).cumsum(1) / _smaller(P.shape[1], Q.shape[1])


class Chance(NamedTuple):
    """phi(i, j) of two random subspaces: mean and standard deviation, each (p, q)."""

    mean: Tensor
    std: Tensor


def similarity_by_chance(n: int, p: int, q: int) -> Chance:
    """The control: phi of subspaces of the same sizes, uniformly random in n dimensions.

    tr(P P^T Q Q^T) of an i- and a j-dimensional subspace has mean i j / n and variance
    2 i (n - i) j (n - j) / (n^2 (n - 1) (n + 2)).
    """
    i = torch.arange(1, p + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, q + 1, dtype=torch.float64)[None]
    variance = 2 * i * (n - i) * j * (n - j) / (n**2 * max(n - 1, 1) * (n + 2))
    return Chance(i * j / n / _smaller(p, q), variance.sqrt() / _smaller(p, q))


def _smaller(p: int, q: int) -> Tensor:
    i, j = torch.arange(1, p + 1)[:, None], torch.arange(1, q + 1)[None]
    return torch.minimum(i, j).double()


# ---- dense, only when asked for ------------------------------------------------------------------


class Dense(NamedTuple):
    """The measures that take SVDs of (o, i) matrices."""

    S: Tensor  # min(o, i): singular values of W' - W
    own_top: Tensor  # min(o, i): ||U^T W V||_F for W's own first 1, 2, ... directions
    cosines: Tensor  # of each leading left singular vector of W' to the nearest one of W


@torch.no_grad()
def dense(W: Tensor, adapted: Tensor, top: int) -> Dense:
    """Spectra of W and W' (o, i), and how well W' still has the directions of W.

    A leading direction whose cosine to every left singular vector of W is below a bound is an
    intruder dimension (Shuttleworth et al. 2024, arXiv:2410.21228, section 4). Vectors of singular
    values that rounding explains are left out on both sides.

    Args:
        top: how many leading left singular vectors of W' are looked at.
    """
    W, adapted = W.double(), adapted.double()
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    U_adapted, S_adapted, _ = torch.linalg.svd(adapted, full_matrices=False)
    U = U[:, _without_rounding(S, W.norm()) > 0]
    U_adapted = U_adapted[:, _without_rounding(S_adapted, adapted.norm()) > 0][:, :top]
    overlap = (U.T @ U_adapted).abs().clamp_max(1)
    return Dense(
        S=_without_rounding(torch.linalg.svdvals(adapted - W), adapted.norm()),
        own_top=S.square().cumsum(0).sqrt(),
        cosines=overlap.amax(0) if U.shape[1] else overlap.new_zeros(U_adapted.shape[1]),
    )
