"""Energy-rank AdaLoRA: periodic SVD of B A, pruning by an energy threshold, growth on stagnation.

    W' = W + s B A,    s = alpha / rank for the whole run,    k of max_rank directions active

This is not the method of Zhang et al. (2023, arXiv:2303.10512), which shares a global budget of
triplets by sensitivity: that is `variants.adalora_budget`. It has only the adaptive rank in common
with it, and is this project's own; every layer decides by the energy in its own spectrum.

Cut. B A = U S V^T from QR of both factors and the SVD of the k x k core, never forming (o, i). The
new k is the smallest whose discarded energy sum_{j>k} S_j^2 / sum_j S_j^2 is at most epsilon, and
the factors are rebuilt balanced, B' = U S^1/2 and A' = S^1/2 V^T. By Eckart and Young (1936),
||change of s B A||_F <= s sqrt(epsilon) ||B A||_F. A direction that min_rank keeps although its S_j
is next to nothing is drawn anew, for it would be zero on both sides and never learn.

The optimiser's moments follow the change of basis: `variants.moments`. The rule is carried out by
`variants.adalora_energy`.

Growth. When the loss on a withheld slice of train has not improved for `patience` evaluations, the
layers whose last cut took least and whose weakest direction carries most get new ones: B's column
zero, so that the function does not change; A's row random, orthogonal to the active rows.

Shapes as in `variants.layer`; r is max_rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from variants import inits
from variants.layer import LowRankLinear
from variants.lora import effective_scale, narrowed
from variants.settings import check_types
from variants.store import WeightStore
from variants.streams import draw_rows

ROW_NORM = 3**-0.5  # root mean square norm of an initial row of A, i entries of std 1/sqrt(3 i)


class AdaLoraLinear(LowRankLinear):
    """s B A added to a frozen W, with k of max_rank directions in use.

    The parameters A (max_rank, i) and B (o, max_rank) keep their shape for the whole run; rows of A
    and columns of B from k on are zero, have no gradient, and take no part in any product.

    Args:
        rank: the initial k, and the r in s.
        alpha: s = alpha / rank.
        max_rank: the rank allocated; None for `rank`, so that no more is ever held than LoRA holds.
        min_rank: no cut goes below it.

    The remaining arguments are those of `LowRankLinear`. Raises ValueError unless
    1 <= min_rank <= rank <= max_rank <= min(o, i).
    """

    k: Tensor  # () active rank, for the state; `_k` mirrors it, so that no step waits for a device
    cuts: Tensor  # () SVDs that rebuilt this layer
    removed: Tensor  # () directions that the last of them removed
    svds_to_skip: Tensor  # () coming SVDs that leave this layer alone
    drawn: Tensor  # () directions drawn since the start: the next one's random stream

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        rank: int,
        alpha: float | None,
        max_rank: int | None = None,
        min_rank: int = 1,
        **given,
    ):
        max_rank = rank if max_rank is None else max_rank
        o, i = store.shape
        check_types(int, rank=rank, min_rank=min_rank, max_rank=max_rank)
        if not 1 <= min_rank <= rank <= max_rank <= min(o, i):
            raise ValueError(
                f"{path} is {o} x {i}, so ranks must satisfy 1 <= min_rank <= rank <= max_rank <= "
                f"{min(o, i)}; found min_rank {min_rank}, rank {rank}, max_rank {max_rank}."
            )
        scale = effective_scale("lora", alpha, rank)
        super().__init__(store, bias, path=path, seed=seed, scale=scale, **given)
        self.min_rank, self.max_rank = min_rank, max_rank
        A = torch.zeros(max_rank, i)
        A[:rank] = inits.kaiming(rank, i, seed, path, "A", fan_in=i)  # LoRA's own
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(o, max_rank))
        self.register_buffer("k", torch.tensor(rank))
        for statistic in ("cuts", "removed", "svds_to_skip", "drawn"):
            self.register_buffer(statistic, torch.tensor(0))
        self._read_rank()
        self.register_load_state_dict_post_hook(AdaLoraLinear._read_rank)

    def _read_rank(self, *_: object) -> None:
        self._k = int(self.k)

    @classmethod
    def narrowed(cls, options: Mapping[str, Any], least: int) -> dict[str, Any]:
        limits = {key: options.get(key) for key in ("max_rank", "min_rank")}
        above = {k: least for k, v in limits.items() if type(v) is int and v > least}
        return {**narrowed(options, least), **above}

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B[:, : self._k], self.A[: self._k]

    def active_rank(self) -> int:
        return self._k

    def active_parameters(self) -> int:
        unused = self.max_rank - self._k
        return super().active_parameters() - unused * (self.out_features + self.in_features)

    def activate(self, k: int) -> None:
        """Use the first k directions from now on."""
        self.k.fill_(k)
        self._read_rank()
        self.unmerge()

    @torch.no_grad()
    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        taken = self._fitted(factors, self.max_rank)
        k = len(taken["E"])
        self.A[:k] = taken["A"]
        self.B.zero_()
        self.B[:, :k] = scale / self.scale * taken["B"] * taken["E"]
        used = max(k, self.min_rank)  # not above the initial rank, whose rows are there
        self.A[used:] = 0.0
        self.activate(used)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self._k} of {self.max_rank}"


def new_row(active: Tensor, *key: object) -> Tensor:
    """A random row (i,) of norm ROW_NORM from the stream `key`, orthogonal to `active` (k, i)."""
    row = draw_rows(1, active.shape[1], *key, std=1.0)[0].double()
    basis = torch.linalg.qr(active.T).Q  # i k
    for _ in range(2):  # once leaves the rounding of what it removed; twice is enough
        row = row - basis @ (basis.T @ row)
    return ROW_NORM * row / row.norm()
