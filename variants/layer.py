"""A frozen weight and a map of it: the layer that every variant is.

`AdapterLinear` is any map of a frozen W (o, i). A variant states it once, as `definition(W)`, and
may compute it faster in `adapted(x)`; the base class merges, exports, keeps state and seeds.
`LowRankLinear` is the map that most of them are,

    W' = diag(g) (W + s B A)        y = x W'^T + bias

with B (o, k), A (k, i), s a number and g (o,) a row gain that is 1 for most. Such a variant states
its factors and its gain, and has the fast path of `variants.product`.

Shapes: i input features, o output features, r rank allocated, k rank active (k <= r),
... batch axes, n rows of a flattened batch.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.dropout import DropoutMasks, Mask
from variants.product import frozen_linear, gained_low_rank_linear
from variants.reading import ReadWeight
from variants.settings import check_type
from variants.site import Site, filled
from variants.store import WeightStore


class AdapterLinear(nn.Module, ABC):
    """A linear map (o, i) over a frozen store, adapted by what its subclass trains.

    Code that reaches past `forward` for the weight sees W', not W: `variants.reading`.

    Args:
        store: the frozen weight.
        bias: (o,) or None, added to the product with W'.
        path: the module's path in the unwrapped model; names the layer in messages and seeds it.
        seed: with `path` and a role, all that an initial value depends on.
        compute_dtype: the dtype of the matrix products; None keeps the input's. What is trained
            stays float32, and the output has the input's dtype.
        dropout: probability of dropping an entry of the adapter's input, for the classes that
            drop it (`drops_input`).
    """

    scale: float | None = None  # s, where the variant has one
    site: Site | None = None  # where it stands in a model; None outside of one
    bias_added = False  # True of a bias that the module which stood here did not have
    weight_read = False  # True where the model's code multiplies with a linear layer's weight
    drops_input = False  # True where `adapted` drops its input as `mask` says

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        compute_dtype: torch.dtype | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_type("dropout", dropout, float)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")
        if dropout and not self.drops_input:
            raise ValueError(
                f"dropout is {dropout}; it must be 0, since {type(self).__name__} drops no input."
            )
        self.store: WeightStore | None = store  # None where W itself is trained
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        (self.out_features, self.in_features), self.dtype = store.shape, store.dtype
        self.path, self.seed, self.compute_dtype = path, seed, compute_dtype
        self.dropout = float(dropout)
        self.masks: DropoutMasks | None = None  # of this pass over a batch: begin_step
        self.part = (0, 1)  # of each batch: this process's part, and how many there are
        self.register_buffer("merged_weight", None, persistent=False)
        self.merged_weight: Tensor | None

    # ---- what a variant writes ------------------------------------------------------------------

    @abstractmethod
    def definition(self, W: Tensor) -> Tensor:
        """W' (o, i) from W (o, i), differentiable in what is trained; W must not be written."""

    def adapted(self, x: Tensor) -> Tensor:
        """x (..., i) -> x W'^T + bias (..., o), in x's dtype. This one forms a dense W'."""
        return self.linear(x, self.definition(self.base_weight()))

    def looked_up(self, index: Tensor, padding_idx: int | None = None) -> Tensor:
        """The columns of W' at `index` (...), for an embedding that keeps W^T: (..., o) in the
        base's dtype, without dropout, for an index has nothing to drop. This one forms a dense W'.

        Args:
            padding_idx: a column that is trained by no gradient; factors that all columns share may
                be, as in PEFT.
        """
        weight = self.definition(self.base_weight()).mT
        return F.embedding(index, weight, padding_idx).to(self.dtype)

    def roles(self) -> Mapping[str, nn.Parameter]:
        """Every trainable parameter once, under the paper's symbol: its attribute's name."""
        own = {name: p for name, p in self._parameters.items() if p is not None and p.requires_grad}
        return {**{name: p for name, p in own.items() if name != "bias"}, **own}

    def penalty(self) -> Tensor | None:
        """An unweighted term of the loss, or None."""
        return None

    def after_step(self, step: int) -> None:
        """Called after optimizer.step() and before zero_grad(), for the layer's own statistics."""

    @classmethod
    def narrowed(cls, options: Mapping[str, Any], least: int) -> dict[str, Any]:
        """The changes to this class's `options` that fit the rank to a layer whose smaller side
        is `least`, with the same s; nothing where it fits, or there is no rank."""
        return {}

    def active_rank(self) -> int:
        """The rank that the change of W may have now."""
        return min(self.out_features, self.in_features)

    def active_parameters(self) -> int:
        """The number of trained numbers in use now; fewer than are held once ranks are pruned."""
        return sum(parameter.numel() for parameter in self.roles().values())

    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        """Start from a low-rank adapter that was trained elsewhere.

        Args:
            factors: B (o, k) and A (k, i); perhaps E (k,), for B diag(E) A; perhaps m (o,), the
                row norms of W'. Directions that the layer has beyond k keep their initial A, with
                nothing on B's side.
            scale: s there; a layer with another one takes it into its factors.

        Raises ValueError if they do not fit the layer, or the variant has no such factors.
        """
        raise ValueError(f"{self.path}: this variant has no factors that could be taken over.")

    # ---- what every variant gets ----------------------------------------------------------------

    def base_weight(self) -> Tensor:
        """W (o, i) in float32, which the caller must not write."""
        assert self.store is not None
        return self.store.dequantize(torch.float32)

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (o, i) in float32, a tensor of its own."""
        return self.definition(self.base_weight()).clone()

    @property
    def weight(self) -> Tensor:
        """W' in the base's dtype, for code that reads it: (o, i), or as the parameter that
        stood here was kept."""
        site = self.site
        if torch.compiler.is_compiling():
            weight = self.definition(self.base_weight()).to(self.dtype)
            return weight if site is None else site.kept(weight)
        kernel = site.shape if site is not None and site.kind == "kernel" else None
        return ReadWeight([self], transposed=site is not None and site.transposed, kernel=kernel)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """W' - W (o, i) in float32: the change that the variant is."""
        return self.adapted_weight() - self.base_weight()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x weight^T + bias in the compute dtype, given back in x's."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)

    def frozen(self, x: Tensor) -> Tensor:
        """x W^T + bias, for a variant that adapts x or the output; no dense W outlives it."""
        assert self.store is not None
        return frozen_linear(x, self.store, self.bias, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., i) -> (..., o) in x's dtype; one matrix product if merged."""
        if self.merged_weight is None:
            return self.adapted(x)
        return self.linear(x, self.merged_weight)

    def mask(self) -> Mask | None:
        """The dropout mask of this forward pass, which is drawn again in the backward pass; None if
        nothing is dropped."""
        if not (self.training and self.dropout > 0.0):
            return None
        if self.masks is None:
            raise RuntimeError(
                f"{self.path} has dropout but was not told the step: call "
                "variants.begin_step(layers, step) before each forward pass in training."
            )
        return functools.partial(self.masks.keep, self.dropout, self.seed, self.path, self.part)

    def merge(self) -> None:
        """Cache W'; the store is never written."""
        self.merged_weight = self.adapted_weight()

    def unmerge(self) -> None:
        """Forget the cached W'. Exact, since nothing was added to the store."""
        self.merged_weight = None

    @torch.no_grad()
    def export(
        self, dtype: torch.dtype, rounded: Callable[[Tensor], Tensor] | None = None
    ) -> nn.Module:
        """An ordinary module holding W' and the bias in `dtype`, of the kind that stood here.

        Args:
            rounded: what W' passes on its way, instead of a cast.
        """
        W = self.adapted_weight()
        W = W.to(dtype) if rounded is None else rounded(W)
        bias = None if self.bias is None else self.bias.detach().to(dtype, copy=True)
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        empty = None if self.site is None else self.site.shell
        return filled(linear if empty is None else empty, W, bias)

    def adapter_state(self) -> dict[str, Tensor]:
        """Everything but the base: what is trained and the layer's statistics."""
        frozen_bias = self.bias is not None and not self.bias.requires_grad
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("store.") and not (name == "bias" and frozen_bias)
        }

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `adapter_state` gave. Raises ValueError on a missing or extra name."""
        if set(state) != set(self.adapter_state()):
            raise ValueError(
                f"{self.path} expects {sorted(self.adapter_state())}, found {sorted(state)}."
            )
        self.load_state_dict(dict(state), strict=False)
        self.unmerge()

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        return f"{self.path}: {self.in_features} -> {self.out_features}{scale}"


class UnadaptedLinear(AdapterLinear):
    """W as it is, with nothing that is trained but perhaps the bias."""

    def definition(self, W: Tensor) -> Tensor:
        return W

    def adapted(self, x: Tensor) -> Tensor:
        return self.frozen(x)

    def active_rank(self) -> int:
        return 0


class LowRankLinear(AdapterLinear):
    """W' = diag(g) (W + s B A), by a product that forms no second dense weight.

    Args:
        scale: s.

    The remaining arguments are those of `AdapterLinear`; dropout acts on the input of B A alone,
    and the bias is never scaled by the gain.
    """

    store: WeightStore
    scale: float
    drops_input = True

    def __init__(self, store: WeightStore, bias: Tensor | None, *, scale: float = 1.0, **given):
        super().__init__(store, bias, **given)
        self.scale = float(scale)

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """B (o, k) and A (k, i), differentiable."""

    def gain(self) -> Tensor | None:
        """g (o,), or None for ones."""
        return None

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """B and A with W' = diag(g) (V + s B A), for a store that keeps another V than W."""
        return self.factors()

    def used_factors(self) -> tuple[Tensor, Tensor]:
        """`factors` without the directions that are masked, for those who only read them."""
        return self.factors()

    def active_rank(self) -> int:
        """k, the rank in use now."""
        return self.factors()[1].shape[0]

    def definition(self, W: Tensor) -> Tensor:
        B, A = self.factors()
        weight = torch.addmm(W, B, A, alpha=self.scale)
        gain = self.gain()
        return weight if gain is None else gain[:, None] * weight

    def adapted(self, x: Tensor) -> Tensor:
        B, A = self.stored_factors()
        return gained_low_rank_linear(
            x,
            self.store,
            self.bias,
            B,
            A,
            scale=self.scale,
            gain=self.gain(),
            dropout=self.dropout if self.training else 0.0,
            mask=self.mask(),
            compute_dtype=self.compute_dtype,
        )

    def looked_up(self, index: Tensor, padding_idx: int | None = None) -> Tensor:
        (B, A), gain = self.stored_factors(), self.gain()
        low_rank = F.embedding(index, A.mT, padding_idx) @ B.mT
        rows = F.embedding(index, self.store.dequantize(self.dtype).mT)
        y = torch.add(rows, low_rank, alpha=self.scale)
        return (y if gain is None else y * gain).to(self.dtype)

    def _fitted(
        self, factors: Mapping[str, Tensor], rank: int, symbols: str = "ABE"
    ) -> dict[str, Tensor]:
        """The factors to `take` in float32, E as ones if there is none."""
        if extra := set(factors) - set(symbols):
            raise ValueError(f"{self.path}: this variant has no {min(extra)}, and the adapter has.")
        B, A = factors["B"].float(), factors["A"].float()
        k = A.shape[0]
        E = factors["E"].float() if "E" in factors else torch.ones(k)
        shapes = (*B.shape, *A.shape, *E.shape)
        if shapes != (self.out_features, k, k, self.in_features, k):
            raise ValueError(
                f"{self.path} is {self.out_features} x {self.in_features}; the adapter's B is "
                f"{tuple(B.shape)}, its A {tuple(A.shape)}."
            )
        if k > rank:
            raise ValueError(f"{self.path} has room for rank {rank}; the adapter's is {k}.")
        return {"A": A, "B": B, "E": E}
