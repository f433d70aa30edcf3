"""An optimiser's moments when the factors of B A are rebuilt in another basis.

With B' = B T and A' = T+ A, T (k_old, k) and T+ (k, k_old), let m and v be Adam's averages free of
their bias correction. First moments average gradients, which are covectors, so they transform
exactly, pruned or not: dL/dB = s G A^T with G = dL/dW', so dL/dB' = s G A'^T = (dL/dB) (T+)^T. The
mean of the squares cannot be had from v, which keeps no correlations; taking the mean exactly and
the variance as diagonal,

    m_B' = m_B (T+)^T    v_B' = m_B'^2 + max(v_B - m_B^2, 0) (T+ * T+)^T
    m_A' = T^T m_A       v_A' = m_A'^2 + (T * T)^T max(v_A - m_A^2, 0)

so that |m'| <= sqrt(v') and no entry steps further than Adam allows, which transporting v alone
does not keep.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Moments:
    """One factor's optimiser state, with the ranks first: views (max_rank, ...), written in place.

    Understands Adam's exp_avg, exp_avg_sq and amsgrad's max_exp_avg_sq, and momentum_buffer; each
    may be absent.
    """

    FIRST = ("exp_avg", "momentum_buffer")
    SECOND = ("exp_avg_sq", "max_exp_avg_sq")

    def __init__(self, state: Mapping, betas: tuple[float, float], columns: bool, optimizer: str):
        self.step = state.get("step")
        self.betas = betas
        tensors = {
            name: value
            for name, value in state.items()
            if torch.is_tensor(value) and name != "step"
        }
        unknown = sorted(set(tensors) - {*self.FIRST, *self.SECOND})
        if unknown:
            raise ValueError(
                f"cannot carry {optimizer}'s state {unknown[0]!r} through a change "
                "of rank; use AdamW, Adam or SGD."
            )
        self.rows = {name: value.T if columns else value for name, value in tensors.items()}

    def reset(self) -> None:
        """Back to before the first step."""
        for rows in self.rows.values():
            rows.zero_()
        if torch.is_tensor(self.step):
            self.step.zero_()

    def transport(self, basis: Tensor, k: int) -> None:
        """Carry into the basis (alive, k_old); directions from alive to k are new."""
        alive, k_old = basis.shape
        step = 0.0 if self.step is None else float(self.step)
        # What the zero start leaves out of each average; no step taken, nothing to divide.
        first, second = ((1 - beta**step) or 1.0 for beta in self.betas)
        old = {name: rows[:k_old].to("cpu", torch.float64) for name, rows in self.rows.items()}
        if "momentum_buffer" in old:
            write_leading(self.rows["momentum_buffer"], basis @ old["momentum_buffer"])
        if "exp_avg" in old:
            old_mean = old["exp_avg"] / first
            mean = basis @ old_mean
            write_leading(self.rows["exp_avg"], mean * first)
            for name in set(self.SECOND) & set(old):
                variance = (old[name] / second - old_mean.square()).clamp(min=0)
                write_leading(self.rows[name], (mean.square() + basis.square() @ variance) * second)
        self.grow(alive, k - alive)

    def grow(self, k: int, count: int) -> None:
        """Start `count` directions after the first k: first moments 0, second their mean."""
        for name in set(self.SECOND) & set(self.rows):
            rows = self.rows[name]
            rows[k : k + count] = rows[:k].mean(0)


def moments_of(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer, *, columns: bool, name: str
) -> Moments:
    """The optimiser's state of a factor: of A (r, i), or with `columns` of B (o, r).

    Raises ValueError if the optimiser does not hold it, or its state cannot be carried.
    """
    for group in optimizer.param_groups:
        if any(parameter is held for held in group["params"]):
            return Moments(
                optimizer.state.get(parameter, {}),
                group.get("betas", (0.0, 0.0)),
                columns=columns,
                optimizer=type(optimizer).__name__,
            )
    raise ValueError(f"{name} is in no group of the optimiser.")


def write_leading(rows: Tensor, leading: Tensor) -> None:
    """Make `leading` (k, n) the first rows of (max_rank, n), and the rest zero."""
    rows[: len(leading)] = leading.to(rows)
    rows[len(leading) :] = 0.0
