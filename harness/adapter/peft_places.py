"""The places and shapes that PEFT has for the factors of each kind of site.

A module that it wraps has its factors at the module's path. Of a parameter that its module reads
(`target_parameters`) they are at the path of the module: of several, the last one's there, and
those of the one before it at `<path>.base_layer`. With r per expert and n experts,

    lora_A (n r, i), expert after expert      lora_B (o, r n), direction after direction

and where PEFT does not know that a stack is kept transposed, its A is our B^T and the reverse.
An embedding has lora_embedding_A (k, i) and lora_embedding_B (o, k), i its rows; a convolution
lora_A (k, i, ...) like its kernel and lora_B (o, k, 1, ...).

Where transformers keeps a mixture's experts in 3-D weights, PEFT rewrites the names that they had
in earlier adapters (peft/utils/transformers_weight_conversion.py), and so loses the LoRA of dense
and shared MLPs whose layers are called the same, with a warning of missing keys alone. It does so
for its LoRA only, for about thirty types of models.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import conversion_mapping

from variants.site import Site

# The conversion that a type of model shares -> what its experts' matrices were called.
EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# Type of model -> conversion, in transformers' words.
_CONVERSIONS = {**getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
                "mixtral": "mixtral"}  # fmt: skip


def read_as_experts(model: nn.Module, sites: Iterable[Site]) -> str | None:
    """The first of the adapted linear layers whose name PEFT would rewrite; None if it leaves
    all."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = EXPERTS.get(_CONVERSIONS.get(kind, ""), ())
    linear = (site.path for site in sites if site.kind == "linear")
    return next((path for path in linear if path.rpartition(".")[2] in names), None)


@dataclass(frozen=True)
class Place:
    """The factors of one parameter in PEFT's format.

    Args:
        sites: of the parameter, all experts of a stack.
        prefix: of its tensors' names.
        key: by which a rank_pattern names it.
        target: what names it in target_modules, or if `parameter` in target_parameters.
        flipped: whether PEFT takes the axes of a stack for each other.
    """

    sites: tuple[Site, ...]
    prefix: str
    key: str
    target: str
    parameter: bool = False
    flipped: bool = False

    @property
    def stacked(self) -> bool:
        return self.sites[0].expert is not None

    def tensors(self, factors: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The tensors, by name, for (B (o, k), A (k, i)) of each site."""
        first, kind = self.sites[0], self.sites[0].kind
        if self.flipped:
            factors = [(A.mT, B.mT) for B, A in factors]
        if self.stacked:
            A = torch.cat([A for _, A in factors])
            B = rearrange(torch.stack([B for B, _ in factors]), "n o k -> o (k n)")
        else:
            ((B, A),) = factors
        if kind == "embedding":
            names = {"lora_embedding_A": A, "lora_embedding_B": B}
        else:
            if kind == "kernel":
                A = A.reshape(len(A), *first.shape[1:])
                B = B.reshape(*B.shape, *[1] * (len(first.shape) - 2))
            names = {"lora_A.weight": A, "lora_B.weight": B}
        return {f"{self.prefix}.{name}": tensor for name, tensor in names.items()}

    def factors(self, found: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By path of a layer, "A" (k, i), "B" (o, k) and what else was found, from PEFT's."""
        A, B, n = found["A"].flatten(1), found["B"].flatten(1), len(self.sites)
        As, Bs = [A], [B]
        if self.stacked:
            As = [*rearrange(A, "(n k) i -> n k i", n=n)]
            Bs = [*rearrange(B, "o (k n) -> n o k", n=n)]
        if self.flipped:
            As, Bs = [B.mT for B in Bs], [A.mT for A in As]
        rest = {role: t.flatten() for role, t in found.items() if role not in "AB"}
        pairs = zip(self.sites, Bs, As, strict=True)
        return {site.path: {"A": A, "B": B, **rest} for site, B, A in pairs}


def places(model: nn.Module, sites: Iterable[Site]) -> list[Place]:
    """PEFT's places of these sites, in their order.

    Args:
        model: adapted or not.
        sites: of a stack one is enough.
    """
    chosen: dict[str, list[Site]] = {}
    for site in sites:
        chosen.setdefault(site.parameter, []).append(site)
    read = [name for name, found in chosen.items() if found[0].kind in ("expert", "other")]
    found = []
    for name, (site, *_) in chosen.items():
        owner = site.owner
        module = model.get_submodule(owner)
        if name in read:
            outer = [n for n in read if n.rpartition(".")[0] == owner]
            depth = len(outer) - 1 - outer.index(name)
            stack = [site] if site.expert is None else map(site.of_expert, range(site.experts))
            stated = getattr(module, "is_transposed", False)
            found.append(
                Place(
                    tuple(stack),
                    prefix=owner + depth * ".base_layer",
                    key=name,
                    target=name,
                    parameter=True,
                    flipped=site.transposed and not stated,
                )
            )
        else:
            found.append(Place((site,), prefix=owner, key=owner, target=owner))
    return found


def without_a_place(model: nn.Module, sites: Sequence[Site]) -> str:
    """The reason why PEFT has no place for one of these sites, a sentence without its end; empty if
    it has."""
    for site in sites:
        module: Any = model.get_submodule(site.owner)
        if site.expert is not None and len(site.shape) == 2:
            return (
                f"{site.parameter} is read from outside its module, where it finds none of its own"
            )
        if site.kind == "kernel":
            plain = (module.groups, module.padding_mode, *module.dilation)
            if plain != (1, "zeros", *[1] * len(module.dilation)):
                return f"{site.owner} is a convolution in groups, dilated or padded by reflection"
        if of_attention(model, site.owner):
            return f"PEFT adds the change of out_proj in {site.owner} twice"
    return ""


def of_attention(model: nn.Module, path: str) -> bool:
    """True of an nn.MultiheadAttention and its output layer. PEFT (0.21.2) merges their adapters in
    every pass, and that of out_proj twice: no adapter would be the same map in both."""
    modules = dict(model.named_modules())
    around = (modules.get(p) for p in (path, path.rpartition(".")[0]))
    return any(isinstance(module, nn.MultiheadAttention) for module in around)
