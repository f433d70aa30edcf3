"""Adapters in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

What a layer is written as follows from its equation alone, W' = diag(g) (W + s B A): LoRA of its
rank with lora_alpha / r = s, and use_dora with lora_magnitude_vector = the row norms of W' where
there is a gain. Tensors are called

    base_model.model.<path>.lora_A.weight (k, i)      base_model.model.<path>.lora_B.weight (o, k)
    base_model.model.<path>.lora_magnitude_vector (o,)
    base_model.model.<path>.base_layer.bias           base_model.model.<name> of a trained module

Rows of new tokens are <path>.token_adapter.trainable_tokens_delta (n, h), with their ids as
trainable_token_indices; PEFT's base needs as many rows. A weight that others are tied to is written
under each of its names, with ensure_weight_tying. What else than a linear layer is adapted has its
factors as peft_places.py says. Where PEFT would take the names of linear layers for experts' (there
too), the factors are written as its AdaLoRA, which has the same map, with E = 1 and one rank for
all.

Read are LoRA with alpha / r or alpha / sqrt(r), with a bias b of B (lora_bias), which adds s b to
the layer's, DoRA, and AdaLoRA, whose lora_A (k, i), lora_E (k, 1) and lora_B (o, k) hold what is
left of init_r triplets, with s = alpha / (init_r + 1e-5).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from typing_extensions import TypedDict

from harness.adapter.folders import PEFT
from harness.adapter.peft_places import (
    Place,
    of_attention,
    places,
    read_as_experts,
    without_a_place,
)
from harness.adapter.tensors import head_and_biases, read_tensors
from harness.disk import patterns
from harness.disk.kinds import Number, Positive
from harness.disk.read import check, read_json, shortened
from harness.machine import distributed
from harness.models import new_tokens
from variants import AdapterLinear, DenseStore
from variants.layer import LowRankLinear
from variants.site import Site

CONFIG, TENSORS = PEFT
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    rf"{re.escape(_PREFIX)}(.+)\.lora_(?:embedding_)?(A|B|E|magnitude_vector|B\.bias)(?:\.weight)?"
)
_TOKENS = "token_adapter.trainable_tokens_delta"
_BIAS = {"none": "none", "adapted": "lora_only", "all": "all"}

# Fields of adapter_config.json that change nothing about what the tensors mean.
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "bias", "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "eva_config", "use_dora",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "loftq_config", "init_r",
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "fan_in_fan_out", "target_parameters", "lora_bias", "trainable_token_indices",
}  # fmt: skip
# Values of init_lora_weights under which the base stays as it was.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT's words for the kinds of transformers' models, by which it chooses the inputs that it hands
# on -> the classes of that kind, by name.
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
# Types of models whose out_proj PEFT refuses (peft/tuners/tuners_utils.py).
_MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
# What adapters are of that can be put to use here.
_TASKS = ("SEQ_CLS", "CAUSAL_LM")


class NotLowRank(ValueError):
    """The variant's change is no low-rank product, so that the format cannot hold it."""


# ---- write ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A layer as LoRA: B (o, k), A (k, i), s; m (o,) if it has a gain."""

    B: Tensor
    A: Tensor
    scale: float
    m: Tensor | None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def folded(self, rank: int, scale: float = 1.0) -> "_Part":
        """The same map of at least this rank, with another s."""
        B = torch.zeros(self.B.shape[0], max(rank, self.rank))
        A = torch.zeros(max(rank, self.rank), self.A.shape[1])
        B[:, : self.rank], A[: self.rank] = self.scale / scale * self.B, self.A
        return _Part(B, A, scale, self.m)


@torch.no_grad()
def write(
    folder: Path,
    *,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    base: str,
    config: Mapping[str, Any],
    head: Sequence[str] = (),
    uniform: bool = False,
) -> None:
    """Write both files into an existing folder.

    Where the ranks of layers with one s differ, as they do after pruning, s goes into B and
    lora_alpha is the rank everywhere. A layer of rank 0 is left out; if all are, one of rank 1
    that does nothing stands for them, since the format needs one.

    Args:
        base: name of the base model.
        config: the run's; dropout, bias and train_modules are named in adapter_config.json.
        head: paths of the modules that are trained as they are.
        uniform: pad all layers to the largest rank, with lora_alpha = r, for servers that do not
            read rank_pattern.

    Raises NotLowRank if the layers are not of the form above.
    """
    if obstacle := without_a_form(model, layers):
        raise NotLowRank(obstacle)
    parts = _parts(layers)
    held = places(model, [_site(layers, path) for path in parts])
    parts = _evened(parts, held)
    disguised = read_as_experts(model, (_site(layers, path) for path in layers))
    uniform = uniform or bool(disguised)
    ranks = {part.rank for part in parts.values()}
    if uniform or (len(ranks) > 1 and len({part.scale for part in parts.values()}) == 1):
        least = max(ranks) if uniform else 0
        parts = {path: part.folded(least) for path, part in parts.items()}
    firsts = {place: parts[place.sites[0].path] for place in held}
    rank_of = {place.key: part.rank for place, part in firsts.items()}
    alphas = {place.key: _number(p.scale * rank_of[place.key]) for place, p in firsts.items()}
    r = Counter(rank_of.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]

    tensors: dict[str, Tensor] = {}
    for place, part in firsts.items():
        own = [parts[site.path] for site in place.sites]
        found = place.tensors([(each.B, each.A) for each in own])
        tensors |= {_PREFIX + name: tensor for name, tensor in found.items()}
        if part.m is not None:
            shape = [1, -1, *[1] * (len(place.sites[0].shape) - 2)]
            m = part.m.view(shape) if place.sites[0].kind == "kernel" else part.m
            tensors[f"{_PREFIX}{place.prefix}.lora_magnitude_vector"] = m
        if disguised:  # which PEFT divides by r + 1e-5
            for factor in "AB":
                name = f"{_PREFIX}{place.prefix}.lora_{factor}"
                tensors[name] = tensors.pop(f"{name}.weight")
            name = f"{_PREFIX}{place.prefix}.lora_E"
            tensors[name] = torch.full((part.rank, 1), 1 + 1e-5 / part.rank)
    parameters = [place.target for place in held if place.parameter]
    prefixes = {place.sites[0].owner: place.prefix for place in held if not place.parameter}
    if added := {path for path in prefixes if path in layers and layers[path].bias_added}:
        for path, own_prefix in prefixes.items():  # PEFT has all or none
            part = parts[path]
            bias = layers[path].bias if path in added else None
            b = torch.zeros(len(part.B)) if bias is None else bias.detach().cpu() / part.scale
            tensors[f"{_PREFIX}{own_prefix}.lora_B.bias"] = b
    within: dict[str, str] = {}  # owner -> where PEFT keeps what the module itself holds
    for place in held:
        owner, inmost = place.sites[0].owner, f"{place.prefix}.base_layer"
        within[owner] = max(within.get(owner, ""), inmost, key=len)
    tokens = new_tokens.rows(model)
    for path, (_, rows) in tokens.items():
        tensors[f"{_PREFIX}{path}.{_TOKENS}"] = rows
    whole = [*head, *_paths(model, config["train_modules"])]
    tied = tied_names(model)
    shared = False
    for name, tensor in head_and_biases(model, layers).items():
        path, _, last = name.rpartition(".")
        if path in added or (path in tokens and name.endswith(f".{new_tokens.ROWS}")):
            continue
        wrapped = f"{within.get(path, path)}.{last}".removeprefix(".")
        tensors |= {_PREFIX + each: tensor for each in tied.get(name, (wrapped,))}
        shared = shared or name in tied
    about = {
        "peft_type": "LORA",
        "task_type": _task_type(type(model).__name__),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else config["dropout"],  # PEFT refuses it for them
        "target_modules": _targets(model, layers, [p.target for p in held if not p.parameter]),
        "target_parameters": parameters or None,
        "rank_pattern": {key: rank for key, rank in rank_of.items() if rank != r},
        "alpha_pattern": {key: a for key, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(part.m is not None for part in parts.values()),
        "bias": _BIAS[config["bias"]],
        "modules_to_save": whole or None,
        "init_lora_weights": True,
        **({"lora_bias": True} if added else {}),
        **(
            {"trainable_token_indices": {k: ids for k, (ids, _) in tokens.items()}}
            if tokens
            else {}
        ),
        "fan_in_fan_out": any(
            place.sites[0].kind == "linear" and place.sites[0].transposed for place in held
        ),
        **({"ensure_weight_tying": True} if shared else {}),
    }
    if disguised:  # PEFT asks for a schedule, and for 8 where r is not read
        about |= {"peft_type": "ADALORA", "init_r": r, "target_r": r, "total_step": 1, "r": 8}
    kept = {name: tensor.cpu().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _task_type(kind_of_model: object) -> str | None:
    """PEFT's word for what a class of transformers, given by name, does; None for what it has no
    word for, as for models of images."""
    return next((word for word, names in _KINDS.items() if kind_of_model in names.values()), None)


def obstacles(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> list[str]:
    """A sentence if PEFT cannot hold these layers."""
    obstacle = without_a_form(model, layers)
    return [f"PEFT cannot hold this adapter: {obstacle}."] if obstacle else []


def without_a_form(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> str:
    """The reason why PEFT cannot hold these layers, a sentence without its end; empty if it can."""
    for path, layer in layers.items():
        if not isinstance(layer, LowRankLinear) and layer.active_rank():
            return (
                f"{path} is not W + s B A with a gain for each row, which is what this format holds"
            )
        if layer.weight_read and layer.active_rank():
            return (
                f"the model's code reads the weight of {path} instead of calling the layer, and "
                "finds the base's there"
            )
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if new_tokens.rows(model) and getattr(output, "bias", None) is not None:
        return "lm_head has a bias, which PEFT leaves out where rows of tokens are trained"
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _MAMBAS and any(path.endswith("out_proj") for path in layers):
        return f"PEFT adapts no out_proj of a {kind}, since its kernels read the weight"
    sites = [_site(layers, path) for path in layers]
    if reason := without_a_place(model, sites):
        return reason
    held = places(model, sites)
    for place in held:
        own = (layers[site.path] for site in place.sites if site.path in layers)
        if place.parameter and any(map(_gained, own)):
            return f"it has no magnitude for {place.sites[0].parameter}"
    expert = read_as_experts(model, sites)
    parameters = [place for place in held if place.parameter]
    if expert and parameters:
        return (
            f"PEFT takes the name of {expert} for that of experts, and has no form for it next to "
            f"{parameters[0].target}"
        )
    if expert and any(map(_gained, layers.values())):
        return (
            f"{expert} has a magnitude, and PEFT takes its name for that of experts, for which it "
            "has none"
        )
    return ""


def _gained(layer: AdapterLinear) -> bool:
    with distributed.unsharded(layer):
        return isinstance(layer, LowRankLinear) and layer.gain() is not None


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of each parameter that has more than one, by every one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = (tuple(group) for group in names.values() if len(group) > 1)
    return {name: group for group in groups for name in group}


def _site(layers: Mapping[str, AdapterLinear], path: str) -> Site:
    site = layers[path].site
    assert site is not None  # `inject` gives it
    return site


def _evened(parts: Mapping[str, _Part], held: Sequence[Place]) -> dict[str, _Part]:
    """With one rank and one s for the experts of a stack, whose tensors have room for no more, and
    zeros for those that are not adapted."""
    found = {}
    for place in held:
        own = {site.path: parts[site.path] for site in place.sites if site.path in parts}
        rank = max(part.rank for part in own.values())
        scales = {part.scale for part in own.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        for site in place.sites:
            o, i = site.matrix_shape
            part = own.get(site.path, _Part(torch.zeros(o, 0), torch.zeros(0, i), scale, None))
            even = part.rank == rank and part.scale == scale
            found[site.path] = part if even else part.folded(rank, scale)
    return found


def _parts(layers: Mapping[str, AdapterLinear]) -> dict[str, _Part]:
    parts = {}
    for path, layer in layers.items():
        if not isinstance(layer, LowRankLinear):  # of rank 0: `without_a_form`
            o, i = layer.out_features, layer.in_features
            parts[path] = _Part(torch.zeros(o, 0), torch.zeros(0, i), 1.0, None)
            continue
        B, A = (factor.detach().float().cpu() for factor in layer.used_factors())
        m = None
        with distributed.unsharded(layer):
            if (gain := layer.gain()) is not None:
                W = layer.base_weight()
                direction = torch.addmm(W, B.to(W.device), A.to(W.device), alpha=layer.scale)
                m = (gain * torch.linalg.vector_norm(direction, dim=1)).cpu()
        parts[path] = _Part(B, A, layer.scale, m)
    used = {path: part for path, part in parts.items() if part.rank or part.m is not None}
    if not used:
        path, part = next(iter(parts.items()))
        used = {path: part.folded(1)}
    return used


def _number(value: float) -> float | int:
    """Without the rounding of s = alpha / r, and whole where it is."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value


def _paths(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    from variants.select import matches

    return [
        path
        for path, _ in model.named_modules()
        if path and any(matches(path, p) for p in patterns)
    ]


def _targets(
    model: nn.Module, layers: Mapping[str, AdapterLinear], chosen: Sequence[str]
) -> list[str]:
    """The last names of the chosen layers if these name no other module, else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in chosen})
    inside = tuple(f"{path}." for path in layers)
    named = {
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in names and not path.startswith(inside)
    }
    return names if named == set(chosen) else sorted(chosen)


# ---- read ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter that PEFT, or `write`, has saved.

    Args:
        base: name of the base model, None if it is not given.
        factors: by PEFT's path of a module, "A" and "B", perhaps "E" and "m"; once `placed`, by
            layer (k, i), (o, k), (k,) and (o,).
        scales: s likewise.
        parameters: `target_parameters`.
        scale_of: by a parameter's name, its s.
        biases: by layer, what its bias has gained (o,).
        tokens: by the path of an embedding or output layer, the tokens that were trained there and
            their rows (n, h).
        others: what else was trained, by its name in the unwrapped model.
        bias: as in conf/config.yaml.
        task: SEQ_CLS, CAUSAL_LM, or None if it is not given.
        tied: whether tied weights that were trained stayed tied.
    """

    base: str | None
    factors: Mapping[str, Mapping[str, Tensor]]
    scales: Mapping[str, float]
    biases: Mapping[str, Tensor]
    tokens: Mapping[str, tuple[Sequence[int], Tensor]]
    others: Mapping[str, Tensor]
    bias: str
    task: str | None
    tied: bool
    parameters: tuple[str, ...] = ()
    scale_of: Callable[[str], float] = field(default=lambda name: 1.0, compare=False)

    def placed(self, model: nn.Module, sites: Iterable[Site]) -> "PeftAdapter":
        """With the factors of each of the model's sites; of a module without one as they are.

        Raises ValueError if those of a stack do not fit its experts.
        """

        def is_named(site: Site) -> bool:
            if site.kind not in ("expert", "other"):
                return True
            return any(f".{site.parameter}".endswith(f".{name}") for name in self.parameters)

        held = {place.prefix: place for place in places(model, filter(is_named, sites))}
        factors: dict[str, Mapping[str, Tensor]] = {}
        scales: dict[str, float] = {}
        for path, found in self.factors.items():
            if (place := held.get(path)) is None:
                if of_attention(model, path.split(".base_layer")[0]):
                    raise ValueError(
                        f"the adapter adapts {path}, of an nn.MultiheadAttention, whose output "
                        "layer PEFT changes twice; merge it there."
                    )
                factors[path], scales[path] = found, self.scales[path]
                continue
            if place.stacked and len(found["A"]) % len(place.sites):
                raise ValueError(
                    f"the adapter has {len(found['A'])} directions for {place.key}, which its "
                    f"{len(place.sites)} experts cannot share."
                )
            scale = self.scale_of(place.key) if place.parameter else self.scales[path]
            for layer, own in place.factors(found).items():
                factors[layer], scales[layer] = own, scale
        return replace(self, factors=factors, scales=scales)

    def beside(
        self, folder: Path, model: nn.Module, layers: Mapping[str, AdapterLinear], base: str
    ) -> dict[str, Tensor]:
        """`others` by the first name of the model's parameter, without what PEFT has copied from
        the base: embeddings, and the weights of adapted output layers.

        Raises ValueError, naming `folder`, for a base that is another one there, and for weights
        that the adapter has trained apart and `model` ties.
        """
        names, found = tied_names(model), {}
        whole = {
            layer.site.parameter: layer
            for layer in layers.values()
            if layer.site is not None and layer.site.expert is None
        }
        for path, gained in self.biases.items():
            if (own := getattr(layers.get(path), "bias", None)) is None:
                raise ValueError(
                    f"{folder} has trained a bias of {path} (lora_bias), which {base} has none of."
                )
            name = f"{path}.bias"
            found[name] = self.others.get(name, own.detach().cpu().float()) + gained
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in self.others.items():
            if name in found:
                continue
            if (layer := whole.get(name)) is not None:
                store, site = layer.store, layer.site
                assert site is not None
                if isinstance(store, DenseStore) and not _equal(store.weight, site.matrix(tensor)):
                    raise ValueError(
                        f"{folder} adapts {layer.path} over another weight than {base} has there: "
                        "it was trained on another base."
                    )
                continue
            if name in parameters and _equal(parameters[name], tensor):
                continue
            group = names.get(name, (name,))
            apart = [n for n in group if not _equal(self.others.get(n, tensor), tensor)]
            apart += [n for n in group if n not in self.others and not self.tied]
            if apart:
                raise ValueError(
                    f"{folder} has trained {name} apart from {apart[0]}, which {base} ties to it; "
                    "train it with ensure_weight_tying=True."
                )
            found[group[0]] = tensor
        return found


def _equal(weight: Tensor, saved: Tensor) -> bool:
    """True if a weight is what was saved of it, in the dtype in which it was."""
    return weight.shape == saved.shape and torch.equal(weight.detach().cpu().to(saved.dtype), saved)


def read(folder: Path) -> PeftAdapter:
    """Both files, whole. Raises ValueError, naming the tensor or the field, for what is damaged,
    does not fit together, or means something that is not supported here."""
    path = folder / CONFIG
    config = _read_config(path)
    if not (folder / TENSORS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = ": adapter_model.bin is a pickle, which is never read; save it as safetensors"
        raise ValueError(f"{folder} has no {TENSORS}{hint if pickled else ''}.")
    source = folder / TENSORS
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in read_tensors(source).items():
        if factor := _FACTOR.fullmatch(key):
            symbol = factor[2].replace("magnitude_vector", "m").replace("B.bias", "bias")
            value = tensor[:, 0] if symbol == "E" and tensor.ndim == 2 else tensor
            factors.setdefault(factor[1], {})[symbol] = value
        elif key.startswith(_PREFIX) and key.endswith(f".{_TOKENS}"):
            rows[key.removeprefix(_PREFIX).removesuffix(f".{_TOKENS}")] = tensor
        elif ".original_module." in key:  # bias=all saves those of the base beside the trained
            continue
        elif key.startswith(_PREFIX) and "lora_" not in key:
            name = key.removeprefix(_PREFIX)
            name = re.sub(r"(\.base_layer)+\.", ".", name)
            others[name.replace(".modules_to_save.", ".")] = tensor
        else:
            raise ValueError(f"{source}: the tensor {key} is of a kind that is not supported here.")
    if not factors:
        raise ValueError(f"{source} holds no low-rank factors.")
    adaptive = config["peft_type"] == "ADALORA"
    scales, biases = {}, {}
    if not adaptive:
        rank_of, alpha_of = (_patterns(path, config, f) for f in ("rank_pattern", "alpha_pattern"))
    parameters = tuple(config.get("target_parameters") or ())

    def scale_of(layer: str) -> float:
        r, alpha = rank_of(layer, config["r"]), alpha_of(layer, config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        if not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"{path}: lora_alpha of {layer} is {alpha}; it must be positive.")
        return float(scale)

    for layer, found in factors.items():
        _check_shapes(source, layer, found, {"A", "B"} | ({"E"} if adaptive else set()))
        k = found["A"].shape[0]
        if adaptive:
            scales[layer] = _alpha(config, layer) / (config["init_r"] + 1e-5)
            continue
        r = rank_of(layer, config["r"])
        if r != k and not (parameters and k):  # of all experts: `placed`
            raise ValueError(f"{source}: {layer} has rank {k}, and {CONFIG} says {r}.")
        scales[layer] = scale_of(layer)
        for key, symbol in (("use_dora", "m"), ("lora_bias", "bias")):
            if bool(config.get(key)) != (symbol in found):
                raise ValueError(f"{source}: {key} does not fit the tensors of {layer}.")
        if "bias" in found:
            biases[layer] = scales[layer] * found.pop("bias").float()
    bias = {peft: ours for ours, peft in _BIAS.items()}[config.get("bias", "none")]
    bias = "adapted" if biases and bias == "none" else bias
    base = config.get("base_model_name_or_path")
    return PeftAdapter(
        base=base,
        factors=factors,
        scales=scales,
        biases=biases,
        tokens=_tokens(source, config, rows),
        others=others,
        bias=bias,
        task=config.get("task_type"),
        tied=bool(config.get("ensure_weight_tying")),
        parameters=parameters,
        scale_of=scale_of,
    )


def _tokens(
    source: Path, config: Mapping[str, Any], rows: Mapping[str, Tensor]
) -> Mapping[str, tuple[Sequence[int], Tensor]]:
    """The rows of trained tokens with their ids, by path. Raises ValueError if they do not fit."""
    given = config.get("trainable_token_indices") or {}
    found = {}
    for path, tensor in rows.items():
        named = given if isinstance(given, dict) else {path: given}
        ids: list[int] = next((v for k, v in named.items() if f".{path}".endswith(f".{k}")), [])
        if tensor.ndim != 2 or len(set(ids)) != len(ids) or len(ids) != len(tensor):
            raise ValueError(
                f"{source}: trainable_token_indices does not fit the tensors of {path}."
            )
        found[path] = (ids, tensor)
    if given and not rows:
        raise ValueError(f"{source}: trainable_token_indices is given, and no row is there.")
    return found


def _alpha(config: Mapping[str, Any], layer: str) -> float:
    """AdaLoRA ignores alpha_pattern; an alpha of 0 or less stands for init_r."""
    return config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"]


_Index = Annotated[int, Field(ge=0, lt=10**8)]


class _Config(TypedDict):
    """adapter_config.json, as far as it says what the tensors mean."""

    peft_type: Literal["LORA", "ADALORA"]
    lora_alpha: Number
    use_rslora: NotRequired[bool]
    use_dora: NotRequired[bool]
    lora_bias: NotRequired[bool]
    bias: NotRequired[Literal["none", "lora_only", "all"]]
    base_model_name_or_path: NotRequired[str | None]
    task_type: NotRequired[str | None]
    auto_mapping: NotRequired[dict[str, Any] | None]
    ensure_weight_tying: NotRequired[bool]
    target_parameters: NotRequired[list[str] | None]
    trainable_token_indices: NotRequired[list[_Index] | dict[str, list[_Index]] | None]


class _Fixed(_Config):
    r: Positive
    rank_pattern: NotRequired[dict[str, Positive] | None]
    alpha_pattern: NotRequired[dict[str, Number] | None]


class _Adaptive(_Config):
    init_r: Positive


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, dict[str, Any])
    check(_Config, config, str(path))
    check(_Fixed if config["peft_type"] == "LORA" else _Adaptive, config, str(path))
    if config.get("task_type") is None and (made_on := config.get("auto_mapping")):
        kind = made_on.get("base_model_class")
        bare = "FEATURE_EXTRACTION" if kind in MODEL_MAPPING_NAMES.values() else None
        config["task_type"] = _task_type(kind) or bare
    if (task := config.get("task_type")) not in (None, *_TASKS):
        raise ValueError(
            f"{path}: task_type is {shortened(task)}; adapters of sequence classifiers (SEQ_CLS) "
            "and causal language models (CAUSAL_LM) can be read."
        )
    if config.get("init_lora_weights") not in _INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {shortened(config['init_lora_weights'])}, which changes "
            "the base as well; save the adapter with path_initial_model_for_weight_conversion "
            "first."
        )
    for key, value in config.items():
        if key not in _HARMLESS and key != "init_lora_weights" and value:
            raise ValueError(f"{path}: {key} is {shortened(value)}, which is not supported here.")
    return config


def _check_shapes(source: Path, layer: str, found: Mapping[str, Tensor], needed: set[str]) -> None:
    for symbol in sorted(needed - set(found)):
        raise ValueError(f"{source}: {layer} has no lora_{symbol}.")
    if extra := set(found) - needed - {"m", "bias"}:
        raise ValueError(
            f"{source}: {layer} has a lora_{min(extra)}, which this kind does not have."
        )
    A, B = found["A"], found["B"]
    shapes = {symbol: tuple(tensor.shape) for symbol, tensor in found.items()}
    fits = A.ndim == B.ndim > 1 and A.shape[0] == B.shape[1] and math.prod(B.shape[2:]) == 1
    fits = fits and shapes.get("E", (A.shape[0],)) == (A.shape[0],)
    fits = fits and ("m" not in found or found["m"].numel() == B.shape[0])
    fits = fits and shapes.get("bias", (B.shape[0],)) == (B.shape[0],)
    if not fits:
        raise ValueError(f"{source}: the shapes of {layer} do not fit together: {shapes}.")
    if not all(tensor.is_floating_point() for tensor in found.values()):
        raise ValueError(f"{source}: the factors of {layer} are not floating-point numbers.")


def _patterns(path: Path, config: Mapping[str, Any], field: str) -> Callable[[str, Any], Any]:
    """(layer, default) -> its value in a field such as rank_pattern. PEFT's rule: the first key
    that matches the path, or its end after a dot, as a regular expression."""
    compiled = [
        (patterns.compiled(rf"^(?:.*\.)?(?:{key})$", f"{path}: the key {key!r} of {field}"), value)
        for key, value in (config.get(field) or {}).items()
    ]
    budget = patterns.Budget(f"{path}: {field}")

    def value_of(layer: str, default: Any) -> Any:
        return next((v for pattern, v in compiled if budget.search(pattern, layer)), default)

    return value_of
