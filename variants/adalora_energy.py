"""Decides the ranks of energy-rank AdaLoRA, by `EnergyAllocator`. The rule, its bound and its
source are in `variants.adalora`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from variants.adalora import AdaLoraLinear, new_row
from variants.layer import AdapterLinear
from variants.method import layers_of
from variants.moments import Moments, moments_of, write_leading
from variants.settings import check_type, check_types
from variants.spectrum import Spectrum, energy_rank, spectrum

NOTHING_LEARNT = 1e-6  # of ||A||_F: below it ||B A||_F is that of the start, and has no spectrum
DEAD = 1e-4  # of S_1: a kept direction below it is drawn anew
SVDS_WITHOUT_CUT = 2  # after growth, so that a new direction has time to earn its energy


class EnergyAllocator:
    """Decides every layer's rank by the energy of its own spectrum. See `variants.adalora`.

    Args:
        layers: all of the model's adapted layers.
        total_steps: optimiser steps in the run; steps count from 1.
        seed: with a layer's path and a count, what a new direction depends on.
        epsilon: the energy that a cut may discard, a fraction of a layer's, in [0, 1). At 0 with
            min_rank = max_rank a cut is a mere rebuild: the control arm.
        interval: steps from cut to cut; cuts fall on its multiples.
        window: fractions of the run, (first, last): no cut and no growth outside.
        patience: evaluations without a new lowest loss before growth. They count from the start of
            the run or the last growth, outside the window too.
        grow_by: new directions for a layer that grows; a layer whose last cut removed more than
            this does not grow, nor does one that was never cut. 0 switches growth off.
        grow_layers: how many layers may grow at once; None for a tenth of them, rounded up.
        moments: what becomes of the optimiser's moments at a cut: carried into the new basis, or
            `reset` with their step count (a stale count would triple the next update): the control.
        budget: None, or the most parameters, sum of k (o + i), that the layers may have after a
            cut. Each time, epsilon is raised by bisection, one value for all, until they fit.
            Layers that this SVD skips count, and growth stops at the budget.

    Raises ValueError if a layer is of another variant, a number is out of range, no cut falls in
    the window, or the budget cannot be met, or cannot bind.
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLinear],
        *,
        total_steps: int,
        seed: int,
        epsilon: float = 0.01,
        interval: int = 15,
        window: Sequence[float] = (0.2, 0.7),
        patience: int = 2,
        grow_by: int = 1,
        grow_layers: int | None = None,
        moments: Literal["transport", "reset"] = "transport",
        budget: int | None = None,
    ):
        adaptive = layers_of(AdaLoraLinear, layers, self)
        check_types(float, epsilon=epsilon)
        check_types(int, interval=interval, patience=patience, grow_by=grow_by)
        check_types(int | None, grow_layers=grow_layers, budget=budget)
        if not 0.0 <= epsilon < 1.0:
            raise ValueError(f"epsilon is {epsilon}; it must lie in [0, 1).")
        if interval < 1:
            raise ValueError(f"interval is {interval}; it must be at least 1 step.")
        numbers = isinstance(window, Sequence) and all(type(end) in (int, float) for end in window)
        if not numbers or len(window) != 2 or not 0.0 <= window[0] <= window[1] <= 1.0:
            raise ValueError(
                f"window is {window}; it must be two fractions of the run, first <= last, "
                "in [0, 1]."
            )
        if patience < 1:
            raise ValueError(f"patience is {patience}; it must be at least 1 evaluation.")
        if grow_by < 0:
            raise ValueError(f"grow_by is {grow_by}; it must be at least 0 (no growth).")
        if grow_layers is not None and grow_layers < 1:
            raise ValueError(f"grow_layers is {grow_layers}; it must be at least 1, or null.")
        if moments not in ("transport", "reset"):
            raise ValueError(f"moments is {moments!r}; it must be 'transport' or 'reset'.")
        # Rounded, since 0.29 * 100 is less than 29 in floating point.
        self.first_step = max(1, math.ceil(round(window[0] * total_steps, 6)))
        self.last_step = math.floor(round(window[1] * total_steps, 6))
        if self.last_step // interval == (self.first_step - 1) // interval:
            raise ValueError(
                f"interval is {interval}, and no multiple of it lies in the window, steps "
                f"{self.first_step} to {self.last_step} of {total_steps}: nothing would be cut."
            )
        if budget is not None:
            least = sum(layer.min_rank * _cost(layer) for layer in adaptive.values())
            most = sum(layer.max_rank * _cost(layer) for layer in adaptive.values())
            if not least <= budget < most:
                raise ValueError(
                    f"budget is {budget} parameters; it must be at least {least}, every layer at "
                    f"min_rank, and below {most}, every layer at max_rank, where it has no effect."
                )
        self.seed, self.epsilon, self.interval = seed, epsilon, interval
        self.patience, self.grow_by, self.moments, self.budget = patience, grow_by, moments, budget
        self.grow_layers = math.ceil(len(layers) / 10) if grow_layers is None else grow_layers
        self.lowest_loss_nats: float | None = None
        self.evaluations_without_improvement = 0
        self.svds = 0  # how often a cut was due and looked for

    def is_due(self, step: int) -> bool:
        """True if ranks are cut after this step."""
        return step % self.interval == 0 and self.first_step <= step <= self.last_step

    # ---- cut ------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(
        self, layers: Mapping[str, AdapterLinear], optimizer: torch.optim.Optimizer, step: int
    ) -> dict[str, float]:
        """Cut if one is due. Returns, if any layer was cut:

        rank/mean, rank/removed and rank/redrawn (directions), rank/discarded_energy_max,
        rank/discarded_energy/<path> where a budget or a redrawn direction took more than epsilon,
        and rank/epsilon under a budget. Energies are fractions of a layer's.
        """
        adaptive = layers_of(AdaLoraLinear, layers, self)
        if step == 1:  # an optimiser whose state cannot be carried should not wait for a cut
            for layer in adaptive.values():
                _factor_moments(layer, optimizer)
        if not self.is_due(step):
            return {}
        self.svds += 1
        spectra: dict[str, Spectrum] = {}
        for path, layer in adaptive.items():
            if layer.svds_to_skip > 0:
                layer.svds_to_skip -= 1
                continue
            found = spectrum(*layer.factors())
            if found.S.norm() > NOTHING_LEARNT * layer.A.norm().cpu():
                spectra[path] = found
        if not spectra:
            return {}
        epsilon = self._epsilon(adaptive, spectra)
        drawn = sum(int(adaptive[path].drawn) for path in spectra)
        discarded = {
            path: self._cut(adaptive[path], optimizer, found, epsilon)
            for path, found in spectra.items()
        }
        log = {
            "rank/mean": _mean_rank(adaptive),
            "rank/removed": float(sum(int(adaptive[path].removed) for path in spectra)),
            "rank/redrawn": float(sum(int(adaptive[path].drawn) for path in spectra) - drawn),
            "rank/discarded_energy_max": max(discarded.values()),
        }
        if self.budget is not None:
            log["rank/epsilon"] = epsilon
        for path, fraction in discarded.items():
            if fraction > self.epsilon:
                log[f"rank/discarded_energy/{path}"] = fraction
        return log

    def _epsilon(
        self, layers: Mapping[str, AdaLoraLinear], spectra: Mapping[str, Spectrum]
    ) -> float:
        """The threshold of this SVD: epsilon, or the least above it that meets the budget."""

        def parameters(epsilon: float) -> int:
            return sum(
                _cost(layer)
                * (
                    energy_rank(spectra[path].S, epsilon, layer.min_rank, layer.max_rank)
                    if path in spectra
                    else layer.active_rank()
                )
                for path, layer in layers.items()
            )

        if self.budget is None or parameters(self.epsilon) <= self.budget:
            return self.epsilon
        low, high = self.epsilon, 1.0  # at 1 every layer is at min_rank
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if parameters(middle) <= self.budget else (middle, high)
        return high

    def _cut(
        self,
        layer: AdaLoraLinear,
        optimizer: torch.optim.Optimizer,
        found: Spectrum,
        epsilon: float,
    ) -> float:
        """Rebuild a layer on its leading directions; returns the fraction of energy it lost."""
        U, S, V = found
        B, A = (factor.to("cpu", torch.float64) for factor in layer.factors())
        k = energy_rank(S, epsilon, layer.min_rank, layer.max_rank)
        alive = min(k, int((S / S[0] > DEAD).sum()))
        U, V, root = U[:, :alive], V[:, :alive], S[:alive].sqrt()
        T = A @ V / root  # k_old alive
        T_plus = (U / root).T @ B  # alive k_old
        A = self._extend(layer, root[:, None] * V.T, k)
        state = _factor_moments(layer, optimizer)
        for role, rows, basis in (("B", (U * root).T, T_plus), ("A", A, T.T)):
            parameter = layer.B.T if role == "B" else layer.A  # a view: max_rank first
            write_leading(parameter, rows)
            moments = state[role]
            if self.moments == "reset":
                moments.reset()
            else:
                moments.transport(basis, k)
        layer.activate(k)
        layer.cuts += 1
        layer.removed.fill_(len(S) - k)
        return float(S[alive:].square().sum() / S.square().sum())

    # ---- growth ---------------------------------------------------------------------------------

    @torch.no_grad()
    def after_evaluation(
        self,
        layers: Mapping[str, AdapterLinear],
        optimizer: torch.optim.Optimizer,
        step: int,
        loss_nats: float,
    ) -> dict[str, float]:
        """Grow if the loss has stagnated (NaN is no improvement). Returns, if any layer grew:

        rank/mean and rank/grown (directions).
        """
        adaptive = layers_of(AdaLoraLinear, layers, self)
        if loss_nats < (math.inf if self.lowest_loss_nats is None else self.lowest_loss_nats):
            self.lowest_loss_nats = float(loss_nats)
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1
        stagnant = self.evaluations_without_improvement >= self.patience
        if not stagnant or not self.first_step <= step <= self.last_step:
            return {}
        shares = {
            path: _weakest_share(layer)
            for path, layer in adaptive.items()
            if layer.cuts > 0 and layer.removed <= self.grow_by
        }
        parameters = sum(layer.active_rank() * _cost(layer) for layer in adaptive.values())
        growing: dict[str, int] = {}
        for path in sorted(shares, key=lambda path: -shares[path]):  # stable: ties by order
            layer = adaptive[path]
            count = min(self.grow_by, layer.max_rank - layer.active_rank())
            grown_parameters = parameters + count * _cost(layer)
            if count == 0 or (self.budget is not None and grown_parameters > self.budget):
                continue
            growing[path], parameters = count, grown_parameters
            if len(growing) == self.grow_layers:
                break
        if not growing:
            return {}
        for path, count in growing.items():
            self._grow(adaptive[path], optimizer, count)
        self.evaluations_without_improvement = 0
        return {"rank/mean": _mean_rank(adaptive), "rank/grown": float(sum(growing.values()))}

    def _grow(self, layer: AdaLoraLinear, optimizer: torch.optim.Optimizer, count: int) -> None:
        k = layer.active_rank()
        A = layer.factors()[1].to("cpu", torch.float64)
        write_leading(layer.A, self._extend(layer, A, k + count))  # B is zero beyond k already
        for moments in _factor_moments(layer, optimizer).values():
            moments.grow(k, count)
        layer.activate(k + count)
        layer.svds_to_skip.fill_(SVDS_WITHOUT_CUT)

    def _extend(self, layer: AdaLoraLinear, A: Tensor, k: int) -> Tensor:
        """A with rows drawn anew until it has k of them."""
        while len(A) < k:
            row = new_row(A, self.seed, layer.path, "A", "new", int(layer.drawn))
            A = torch.cat([A, row[None]])
            layer.drawn += 1
        return A

    # ---- state ----------------------------------------------------------------------------------

    def unmet(self, layers: Mapping[str, AdapterLinear], steps: Collection[int]) -> str:
        due = sum(map(self.is_due, steps))
        return "" if self.svds == due else f"ranks were cut {self.svds} times instead of {due}."

    def state_dict(self) -> dict:
        """The state that the layers' own (ranks, statistics) lacks."""
        return {
            "svds": self.svds,
            "lowest_loss_nats": self.lowest_loss_nats,
            "evaluations_without_improvement": self.evaluations_without_improvement,
        }

    def load_state_dict(self, state: dict) -> None:
        for key, kind in (("svds", int), ("evaluations_without_improvement", int)):
            check_type(f"the allocator's {key}", state.get(key), kind)
        check_type("the allocator's lowest_loss_nats", state.get("lowest_loss_nats"), float | None)
        self.svds = state["svds"]
        self.lowest_loss_nats = state["lowest_loss_nats"]
        self.evaluations_without_improvement = state["evaluations_without_improvement"]


def _factor_moments(layer: AdaLoraLinear, optimizer: torch.optim.Optimizer) -> dict[str, Moments]:
    return {
        role: moments_of(parameter, optimizer, columns=role == "B", name=f"{layer.path}: {role}")
        for role, parameter in (("B", layer.B), ("A", layer.A))
    }


def _weakest_share(layer: AdaLoraLinear) -> float:
    """The share of a layer's energy that its weakest active direction carries."""
    energy = spectrum(*layer.factors()).S.square()
    return float(energy[-1] / energy.sum()) if energy[0] > 0 else 0.0


def _mean_rank(layers: Mapping[str, AdaLoraLinear]) -> float:
    return sum(layer.active_rank() for layer in layers.values()) / len(layers)


def _cost(layer: AdaLoraLinear) -> int:
    """Parameters of one direction, o + i."""
    return layer.out_features + layer.in_features
