"""An adapter that PEFT has saved, put to use without training: its factors over a base model."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.adapter import native, peft_format
from harness.config import build
from harness.models import minilm, new_tokens, smollm2
from harness.models.base import BaseModel
from variants import LowRankLinear, Variant, WeightStore, by_role
from variants.site import sites


class ImportedLinear(LowRankLinear):
    """W' = diag(g) (W + s B A) with the factors that an adapter has for `path`.

    g = m / ||W + s B A|| per row if the adapter has an m; an E is multiplied into A. A bias that
    the adapter has (lora_bias) and the module does not is one of the layer.
    """

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        adapter: peft_format.PeftAdapter,
        compute_dtype: torch.dtype | None = None,
    ):
        factors = {role: factor.float() for role, factor in adapter.factors[path].items()}
        B, A = factors["B"], factors["A"]
        if (B.shape[0], A.shape[1]) != store.shape:
            raise ValueError(
                f"{path} is {store.shape[0]} x {store.shape[1]}; the adapter's B is "
                f"{tuple(B.shape)}, its A {tuple(A.shape)}."
            )
        added = bias is None and path in adapter.biases
        if added:
            bias = torch.zeros(store.shape[0])
        super().__init__(
            store,
            bias,
            path=path,
            seed=seed,
            compute_dtype=compute_dtype,
            scale=adapter.scales[path],
        )
        self.bias_added = added
        self.B = nn.Parameter(B)
        self.A = nn.Parameter(factors["E"][:, None] * A if "E" in factors else A)
        self.m = nn.Parameter(factors["m"]) if "m" in factors else None

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def gain(self) -> Tensor | None:
        if self.m is None:
            return None
        direction = torch.addmm(self.base_weight(), self.B, self.A, alpha=self.scale)
        return self.m / torch.linalg.vector_norm(direction, dim=1)


@torch.no_grad()
def restore(folder: Path) -> native.Restored:
    """The model that an adapter's folder describes, on the base it names; on the CPU.

    Its labels are LABEL_0 and so on, as transformers calls them; one without a classifier is a
    language model.

    Raises ValueError if a file is damaged, the base cannot be loaded, or they do not fit.
    """
    adapter = peft_format.read(folder)
    if adapter.base is None:
        raise ValueError(
            f"{folder / peft_format.CONFIG} names no base model; write its name or "
            "folder there, as base_model_name_or_path."
        )
    model = _model(adapter.base)
    names = _labels(folder, adapter, model)
    config = {
        "model": model,
        "seed": 0,
        "targets": [],
        "layers": "all",
        "rank_pattern": {},
        "alpha_pattern": {},
        "train_modules": [],
        "dropout": 0.0,
        "bias": adapter.bias,
        "train": {"compute_dtype": "float32"},
    }
    base = build.load_base(config, names)
    adapter = _placed(folder, adapter, base.model, base.name)
    config["targets"] = sorted(adapter.factors)
    variant = Variant(
        name="imported",
        lr=1.0,
        adapter=functools.partial(ImportedLinear, adapter=adapter),
        groups=by_role,
    )
    notes = _resize(adapter, base)
    layers = build.adapt(base, variant, config)
    new_tokens.attach(base.model, {path: ids for path, (ids, _) in adapter.tokens.items()})
    take_rows(folder, adapter, base)
    _take_others(folder, adapter.beside(folder, base.model, layers, base.name), base)
    base.model.eval()
    return native.Restored(
        folder=folder,
        base=base,
        variant=variant,
        layers=layers,
        labels=names,
        config=config,
        fingerprints={},
        notes=(
            f"The adapter names its base, {adapter.base}, but no digest of it: nothing is checked.",
            *notes,
        ),
    )


def _resize(adapter: peft_format.PeftAdapter, base: BaseModel) -> list[str]:
    """Give the base the rows that the adapter's tokens need; a sentence if the tokenizer does not
    know them."""
    largest = max((max(ids) for ids, _ in adapter.tokens.values()), default=-1)
    old = base.model.get_input_embeddings().get_parameter("weight").shape[0]
    new_tokens.resize(base.model, max(old, largest + 1))
    if largest < len(base.tokenizer):
        return []
    return [f"The tokenizer of {base.name} does not know token {largest}, which the adapter has."]


@torch.no_grad()
def take_rows(folder: Path, adapter: peft_format.PeftAdapter, base: BaseModel) -> None:
    """Give the model's trained tokens their rows. Raises ValueError for others than it trains."""
    ours = new_tokens.rows(base.model)
    for path, (ids, rows) in adapter.tokens.items():
        if path not in ours or ours[path][0] != sorted(ids):
            raise ValueError(
                f"{folder} has trained tokens {sorted(ids)} of {path}, and this run "
                f"{ours[path][0] if path in ours else 'none'}; set model.new_tokens to fit."
            )
        order = sorted(range(len(ids)), key=ids.__getitem__)
        if ours[path][1].shape != rows.shape:
            raise ValueError(
                f"{folder}: the rows of tokens of {path} have shape {tuple(rows.shape)}, the "
                f"model's {tuple(ours[path][1].shape)}."
            )
        ours[path][1].copy_(rows[order])


def _model(name: str) -> dict[str, Any]:
    """The config of the loader for a base model's name."""
    ours = {minilm.NAME: "minilm", smollm2.NAME: "smollm2"}
    if name in ours:
        return {"_target_": f"harness.models.{ours[name]}.load", "_partial_": True}
    if name.startswith("tiny-"):
        architecture = name.removeprefix("tiny-")
        return {
            "_target_": "harness.models.tiny.load",
            "_partial_": True,
            "architecture": architecture,
        }
    return {"_target_": "harness.models.hf.load", "_partial_": True, "name": name}


def _placed(
    folder: Path, adapter: peft_format.PeftAdapter, model: nn.Module, name: str
) -> peft_format.PeftAdapter:
    """With the factors by layer. Raises ValueError unless the model has every one of them."""
    found = sites(model)
    adapter = adapter.placed(model, found.values())
    if absent := sorted(set(adapter.factors) - set(found)):
        raise ValueError(
            f"{folder} adapts {absent[0]}, and {name} has no such layer: it was trained on another "
            "base."
        )
    return adapter


def _labels(
    folder: Path, adapter: peft_format.PeftAdapter, model: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """LABEL_0 and so on for each row of the classifier that the adapter holds; None for a language
    model. Raises ValueError for a classifier without one, and a regression.

    What the classifier is called is seen in the shapes of the architecture: with a label more it
    has a row more.
    """
    if adapter.task == "CAUSAL_LM" or (adapter.task is None and not adapter.others):
        return None
    try:
        two, three = (
            build.outline_base({"model": model}, [f"LABEL_{n}" for n in range(count)]).model
            for count in (2, 3)
        )
    except ValueError:
        if adapter.task is None:  # the architecture has no classifier
            return None
        raise
    shapes = {name: parameter.shape for name, parameter in two.named_parameters()}
    last = [name for name, p in three.named_parameters() if p.shape != shapes[name]]
    counts = [len(adapter.others[name]) for name in last if name in adapter.others]
    if not counts and adapter.task is None:
        return None
    _placed(folder, adapter, two, str(adapter.base))
    if not counts:
        raise ValueError(
            f"{folder} is of a classifier (task_type is SEQ_CLS) and does not hold {last[0]}; save "
            f"it with modules_to_save=[{last[0].rpartition('.')[0]}]."
        )
    if counts[0] == 1:
        raise ValueError(
            f"{folder} has a classifier of one label, which is a regression; adapters of two or "
            "more labels can be used here."
        )
    return tuple(f"LABEL_{index}" for index in range(counts[0]))


def _take_others(folder: Path, others: Mapping[str, Tensor], base: BaseModel) -> None:
    parameters = dict(base.model.named_parameters())
    for name, tensor in others.items():
        if name not in parameters:
            raise ValueError(f"{folder} has trained {name}, and {base.name} has no such weight.")
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, and {base.name} needs "
                f"{tuple(parameters[name].shape)}."
            )
        parameters[name].copy_(tensor)
        parameters[name].requires_grad_(True)  # it was trained, so it belongs to the adapter
