"""AdaLoRA: Adaptive Budget Allocation (Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3).

    W' = W + s B diag(E) A,    s = alpha / r,    A, B ~ N(0, 0.02^2),    E = 0

B, E and A stand for the paper's P, Lambda and Q: a penalty pulls the columns of B and the rows of A
towards orthonormal ones, so that E holds singular values. The r triplets (B_k, E_k, A_k) of all
layers compete for one budget b(t) that falls from all of them to a fraction of them. Every entry w
has a smoothed sensitivity and its uncertainty, a triplet scores the sum of its means, and a mask
zeroes the E_k of all but the b(t) best:

    I = |w dL/dw|        Ibar <- beta1 Ibar + (1 - beta1) I
                         Ubar <- beta2 Ubar + (1 - beta2) |I - Ibar|       s(w) = Ibar Ubar
    S_k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk)

A mask writes E alone. A_k, B_k and Adam's moments stay, so E_k regrows until the next mask and a
triplet can return, until the pattern is fixed for the final phase.

The authors' code (github.com/QingruZhang/AdaLoRA, loralib/adalora.py) is followed where it and the
paper differ:
- Schedule: the printed cubic runs on 1 - (t - t_i - t_f) / (T - t_i - t_f). With T = 1000,
  t_i = 100, t_f = 300, b_0 = 864 and b_T = 576 it gives 1548 at t_i and 612 at T - t_f. The code's
  goes from b_0 to b_T: `BudgetAllocator.budget`.
- Penalty: the norm is not squared, and averaged over all A and B; the paper sums squares. gamma
  means something else in each: see `regularizer`.
- w is the entry after the optimiser step, dL/dw the (clipped) gradient before it, with the
  penalty's part in it; Ubar uses the Ibar that was just updated.
- r in s is the allocated rank for the whole run, never the rank that is left.

Two things of the code are not followed. It divides by r + 1e-5; s is exact here. It masks every
score up to the (b_0 - b)-th smallest, which prunes ties below the budget and fails at b = b_0; here
exactly b(t) triplets are kept and, of equal scores, the first in order of layers, then of index.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from variants import inits
from variants.layer import AdapterLinear, LowRankLinear
from variants.lora import check_rank, effective_scale, narrowed
from variants.method import layers_of
from variants.settings import check_type
from variants.store import WeightStore


class AdaLoraBudgetLinear(LowRankLinear):
    """s B diag(E) A added to a frozen W, with B (o, r), E (r,) and A (r, i), and their importances.

    All r triplets take part in every product, since a masked one must be able to return.

    Args:
        rank, alpha: s = alpha / rank, with the allocated rank.
        beta1, beta2: memory of the sensitivity and of its uncertainty, each in (0, 1).
        regularizer: `code` is (||B^T B - I||_F + ||A A^T - I||_F) / 2, to be averaged over layers
            (penalty_reduction: mean); `paper` is ||B^T B - I||_F^2 + ||A A^T - I||_F^2, to be
            summed over layers (section 3.1; penalty_reduction: sum).

    The remaining arguments are those of `LowRankLinear`.
    """

    kept: Tensor  # (r,) bool: what the last mask kept
    importance_frozen: Tensor  # () bool

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        rank: int,
        alpha: float | None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        regularizer: Literal["code", "paper"] = "code",
        **given,
    ):
        check_rank(rank, store.shape, path)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_type(name, beta, float)
            if not 0.0 < beta < 1.0:
                raise ValueError(f"{name} is {beta}; it must lie in (0, 1).")
        if regularizer not in ("code", "paper"):
            raise ValueError(f"regularizer is {regularizer!r}; it must be 'code' or 'paper'.")
        scale = effective_scale("lora", alpha, rank)
        super().__init__(store, bias, path=path, seed=seed, scale=scale, **given)
        self.beta1, self.beta2, self.regularizer = beta1, beta2, regularizer

        def normal(role: str, length: int) -> Tensor:  # r length
            return inits.gaussian(rank, length, seed, path, role, std=0.02)

        self.A = nn.Parameter(normal("A", self.in_features))
        self.B = nn.Parameter(normal("B", self.out_features).T.contiguous())
        self.E = nn.Parameter(torch.zeros(rank))
        for role in ("A", "B", "E"):
            zeros = torch.zeros_like(getattr(self, role).detach())
            self.register_buffer(f"sensitivity_{role}", zeros)  # Ibar
            self.register_buffer(f"uncertainty_{role}", zeros.clone())  # Ubar
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        self.register_buffer("importance_frozen", torch.tensor(False))
        self._read_flags()
        self.register_load_state_dict_post_hook(AdaLoraBudgetLinear._read_flags)

    def _read_flags(self, *_: object) -> None:
        """Mirror two buffers in Python, so that no training step waits for the device."""
        self._active_rank, self._frozen = int(self.kept.sum()), bool(self.importance_frozen)

    @classmethod
    def narrowed(cls, options: Mapping[str, Any], least: int) -> dict[str, Any]:
        return narrowed(options, least)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.out_features < self.in_features:  # the smaller product: it is kept for backward
            return self.B * self.E, self.A
        return self.B, self.E[:, None] * self.A

    def used_factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.factors()
        used = self.E != 0.0
        return B[:, used], A[used]

    @torch.no_grad()
    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        """Triplets beyond the adapter's are masked, with E = 0."""
        taken = self._fitted(factors, len(self.E))
        k = len(taken["E"])
        self.A[:k], self.B[:, :k] = taken["A"], taken["B"]
        self.E.zero_()
        self.E[:k] = scale / self.scale * taken["E"]
        self.kept.copy_(torch.arange(len(self.E), device=self.E.device) < k)
        self._read_flags()
        self.unmerge()

    def active_rank(self) -> int:
        """The number of triplets that the last mask kept; between masks the others' E regrows."""
        return self._active_rank

    def active_parameters(self) -> int:
        held, kept = super().active_parameters(), self.active_rank()
        return held - (self.E.numel() - kept) * (self.out_features + self.in_features + 1)

    def penalty(self) -> Tensor:
        """The distance of B's columns and A's rows from orthonormal ones; see `regularizer`."""
        identity = torch.eye(len(self.E), dtype=self.E.dtype, device=self.E.device)
        errors = torch.stack([self.B.T @ self.B, self.A @ self.A.T]) - identity  # 2 r r
        if self.regularizer == "paper":
            return errors.square().sum()
        return torch.linalg.vector_norm(errors, dim=(1, 2)).mean()  # its gradient at 0 is 0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the importances from the new parameters and the step's gradients; those of an
        expert that no token has reached are 0."""
        if self._frozen:
            return
        for role in ("A", "B", "E"):
            parameter = getattr(self, role)
            gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
            sensitivity = getattr(self, f"sensitivity_{role}")
            uncertainty = getattr(self, f"uncertainty_{role}")
            importance = (parameter * gradient).abs_()
            sensitivity.lerp_(importance, 1 - self.beta1)
            uncertainty.lerp_((importance - sensitivity).abs_(), 1 - self.beta2)

    def score(self) -> Tensor:
        """S (r,): the importance of each triplet."""
        A, B, E = (
            getattr(self, f"sensitivity_{role}") * getattr(self, f"uncertainty_{role}")
            for role in ("A", "B", "E")
        )
        return E + A.mean(1) + B.mean(0)

    def keep(self, kept: Tensor) -> None:
        """Mask: zero E where `kept` (r,), on the CPU, is False, and remember the pattern."""
        self.kept.copy_(kept)
        self._active_rank = int(kept.sum())
        self.apply_mask()

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Zero E again by the remembered pattern."""
        self.E.masked_fill_(~self.kept, 0.0)

    def freeze_importance(self) -> None:
        """No importance is updated after this."""
        self.importance_frozen.fill_(True)
        self._frozen = True


class BudgetAllocator:
    """The global budget: b(t) triplets of all layers together (section 3.3, algorithm 1).

    A step t is the number of optimiser steps finished, 1 to T. Up to t_i nothing is masked; in the
    middle phase, t_i < t <= T - t_f, a mask is made whenever t is a multiple of `interval`; from
    T - t_f on the importances are frozen, and in the final phase, t > T - t_f, the b_T triplets
    that they rank first are the pattern, applied after every step.

    The defaults are fractions of the run. The paper's own settings (table 8, T from its epochs and
    the sizes of the GLUE sets at batch 32) are t_i = 9 to 18 % and t_f = 44 to 58 % of T, and
    an interval of 1 on the runs below 4000 steps, 10 or 100 on longer ones. b_T = b_0 / 1.5.

    Args:
        layers: all of the model's adapted layers; b_0 is the sum of their allocated ranks.
        total_steps: T.
        seed: not used; nothing is drawn.
        target_frac: b_T / b_0, in (0, 1]; 1 keeps every triplet (the penalty alone is studied).
        initial_frac: t_i / T.
        final_frac: t_f / T. At least one step, or the run would end with E regrown.
        interval: steps from mask to mask in the middle phase (the paper's Delta T).

    Raises ValueError if a layer is of another variant, if the budget rounds to nothing, or if the
    phases leave no mask to be made.
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLinear],
        *,
        total_steps: int,
        seed: int = 0,
        target_frac: float = 2 / 3,
        initial_frac: float = 0.15,
        final_frac: float = 0.45,
        interval: int = 1,
    ):
        check_type("target_frac", target_frac, float)
        check_type("interval", interval, int)
        self.initial_budget = sum(
            len(layer.kept) for layer in layers_of(AdaLoraBudgetLinear, layers, self).values()
        )
        self.target_budget = round(target_frac * self.initial_budget)
        if not 0.0 < target_frac <= 1.0 or self.target_budget < 1:
            raise ValueError(
                f"target_frac is {target_frac}; it must lie in (0, 1] and leave at least one of "
                f"the {self.initial_budget} allocated ranks."
            )
        for name, frac in (("initial_frac", initial_frac), ("final_frac", final_frac)):
            check_type(name, frac, float)
            if not 0.0 <= frac < 1.0:
                raise ValueError(f"{name} is {frac}; it must lie in [0, 1).")
        if interval < 1:
            raise ValueError(f"interval is {interval}; it must be at least 1 step.")
        self.start = round(initial_frac * total_steps)  # t_i
        self.end = total_steps - max(1, round(final_frac * total_steps))  # T - t_f
        self.interval = interval
        if self.start >= self.end:
            raise ValueError(
                f"initial_frac {initial_frac} and final_frac {final_frac} leave no step of "
                f"{total_steps} in which the budget could fall; reduce them or train longer."
            )
        if self.end // interval == self.start // interval:
            raise ValueError(
                f"interval is {interval}, and no multiple of it lies in steps {self.start + 1} to "
                f"{self.end}, in which the budget falls; reduce it."
            )
        self.pattern_fixed = False

    def budget(self, step: int) -> int:
        """b(t): b_0 up to t_i, then a falling cubic, b_T from T - t_f on."""
        progress = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        excess = (self.initial_budget - self.target_budget) * (1.0 - progress) ** 3
        return int(self.target_budget + excess)

    def is_due(self, step: int) -> bool:
        """True if triplets are masked after this step."""
        return step > self.end or (step > self.start and step % self.interval == 0)

    def after_step(
        self, layers: Mapping[str, AdapterLinear], optimizer: torch.optim.Optimizer, step: int
    ) -> dict[str, float]:
        """Mask if one is due; returns the budget and its mean over layers whenever it is decided.

        `optimizer` is left alone: the moments of masked triplets are kept.
        """
        budgeted = layers_of(AdaLoraBudgetLinear, layers, self)
        assert any(layer.E.grad is not None for layer in budgeted.values()), (
            "no layer has a gradient; call after_step before zero_grad()."
        )
        if self.pattern_fixed:
            for layer in budgeted.values():
                layer.apply_mask()
            return {}
        if step + 1 >= self.end:  # the layers' own hook comes first, so this holds from T - t_f on
            for layer in budgeted.values():
                layer.freeze_importance()
        if not self.is_due(step):
            return {}
        budget = self.budget(step)
        mask_to_budget(budgeted, budget)
        self.pattern_fixed = step > self.end
        return {"rank/budget": float(budget), "rank/mean": budget / len(budgeted)}

    def after_evaluation(
        self,
        layers: Mapping[str, AdapterLinear],
        optimizer: torch.optim.Optimizer,
        step: int,
        loss_nats: float,
    ) -> dict[str, float]:
        """Nothing: the budget is a function of the step alone."""
        return {}

    def unmet(self, layers: Mapping[str, AdapterLinear], steps: Collection[int]) -> str:
        kept = sum(layer.active_rank() for layer in layers.values())
        due = max(filter(self.is_due, steps), default=None)
        budget = kept if due is None else self.budget(due)
        return "" if kept == budget else f"{kept} triplets are left instead of the {budget} due."

    def state_dict(self) -> dict:
        """The state that the layers' own (importances, pattern) lacks."""
        return {"pattern_fixed": self.pattern_fixed}

    def load_state_dict(self, state: dict) -> None:
        check_type("the allocator's pattern_fixed", state.get("pattern_fixed"), bool)
        self.pattern_fixed = state["pattern_fixed"]


def mask_to_budget(layers: Mapping[str, AdaLoraBudgetLinear], budget: int) -> None:
    """Keep exactly the `budget` best triplets of all layers; of equal scores, the first."""
    scores = torch.cat([layer.score() for layer in layers.values()])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = True
    patterns = kept.cpu().split([len(layer.kept) for layer in layers.values()])
    for layer, pattern in zip(layers.values(), patterns, strict=True):
        layer.keep(pattern)
