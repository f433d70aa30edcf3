"""A trained adapter merged into its base: an ordinary transformers folder, and what rounding cost.

A weight W of the base, in float32 as it was loaded, becomes W'. What a target dtype leaves of the
update is judged by

    cos(dW, recovered dW)        dW = W' - W        recovered dW = round(W') - round(W)

layer by layer: rounding a small dW moves most entries not at all and the rest by a whole step, so
the cosine falls before anything else shows it. What all of it does to the model is the divergence
KL(p || p') = sum_c p_c (log p_c - log p'_c) of its classes, in nats, on some texts.

An adapter trained over a quantised base is merged into the original weights, which it has never
seen: the gap is reported. Rounding the merged weights to 4 bits is another, separate act.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.adapter import inference, native
from harness.adapter.folders import free_for_merged, report_path
from harness.adapter.restore import restore
from harness.config import build
from harness.disk.write import new_folder, to_json, write_text
from harness.models import hf, new_tokens, quantised
from harness.models.base import STORAGE_DTYPES, quiet_loading
from harness.tasks.generation import ends
from harness.words import did_you_mean, kind_of
from variants import AdapterLinear, DenseStore, Int8Store, Nf4Store, Variant, WeightStore
from variants.inject import extract, weight_of
from variants.site import holds_matrix

DTYPES = {**STORAGE_DTYPES, "bf16": torch.bfloat16, "fp16": torch.float16}
STORES: Mapping[str, type[WeightStore]] = {"nf4": Nf4Store, "int8": Int8Store}
ROWS = 64  # texts for the divergence
LOW_COS = 0.9  # below it a fifth of the recovered update, as energy, is rounding


def choose(kind: str, name: str, allowed: Mapping[str, Any]) -> Any:
    """allowed[name]. Raises ValueError, with the nearest match, if it is not there."""
    if name not in allowed:
        hint = did_you_mean(name, allowed)
        raise ValueError(f"{kind} is {name}; it must be {', '.join(allowed)}.{hint}")
    return allowed[name]


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_quantised(variant: Variant) -> bool:
    """True if the variant keeps its frozen weights otherwise than as they were loaded."""
    return getattr(variant.store, "func", variant.store) is not DenseStore


def rounding(
    dtype: torch.dtype, store: Callable[[Tensor], WeightStore] | None = None
) -> Callable[[Tensor], Tensor]:
    """The function that a float32 weight passes on its way into the folder."""
    if store is None:
        return lambda weight: weight.to(dtype)
    return lambda weight: store(weight).dequantize(torch.float32).to(dtype)


@torch.no_grad()
def merge_into_base(
    model: PreTrainedModel, dtype: torch.dtype, store: Callable[[Tensor], WeightStore] | None = None
) -> PreTrainedModel:
    """The same model, in place, as transformers would have loaded it: no layer or hook of ours.

    Args:
        dtype: of everything that is floating and saved.
        store: rounds the merged weights first.

    Raises ValueError if `dtype` cannot hold a value, or the architecture a bias.
    """
    rounded = rounding(dtype, store)
    for path, layer in model.named_modules():
        if isinstance(layer, AdapterLinear) and layer.bias_added:
            raise ValueError(
                f"{path} has a bias of the adapter (lora_bias), and none in the base: a merged "
                "model of this architecture cannot hold it; --peft writes the adapter."
            )
    extract(model, torch.float32, rounded)
    new_tokens.fold(model)
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False  # one of the two was adapted
    for module in model.modules():
        module._forward_pre_hooks.clear()  # heads cast their input, which has their dtype now
        module._forward_pre_hooks_with_kwargs.clear()
    held = [*model.named_parameters(), *model.named_buffers()]
    saved = model.state_dict()
    for name, tensor in held:
        if name in saved and tensor.is_floating_point():
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            tensor.data = tensor.to(dtype)
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{name} has an entry of {largest:g}, which {short_name(dtype)} cannot hold."
                )
    model.requires_grad_(False)
    model.config.dtype = dtype
    return model.eval()


@torch.no_grad()
def coded(layers: Mapping[str, AdapterLinear], kind: type[WeightStore]) -> dict[str, WeightStore]:
    """The merged weight of each linear layer in a store of this kind, by path."""
    return {
        path: kind(layer.adapted_weight())
        for path, layer in layers.items()
        if layer.site is not None and layer.site.kind == "linear" and layer.site.shell is None
    }


def save(model: PreTrainedModel, folder: Path, codes: Mapping[str, WeightStore]) -> None:
    """Write a model as transformers does, some of its weights as bitsandbytes would."""
    if not codes:
        model.save_pretrained(folder)
        return
    state = model.state_dict()
    for path, store in codes.items():
        del state[f"{path}.weight"]
        state |= quantised.tensors_of(path, store, model.dtype)
    dense = [path for path, module in model.named_modules() if holds_matrix(module)]
    kind = type(next(iter(codes.values())))
    model.config.quantization_config = quantised.configuration(
        kind, model.dtype, [path for path in dense if path not in codes]
    )
    model.save_pretrained(folder, state_dict=state)


def set_ends(model: PreTrainedModel, restored: native.Restored) -> None:
    """Let the model's own generation end where the run taught its answers to end.

    For an end that is text, transformers asks to be handed the tokenizer.
    """
    end, settings = inference.end_of(restored), model.generation_config
    if settings is None:  # it does not generate
        return
    known = ends(model, restored.base.tokenizer, end)
    settings.eos_token_id = known[0] if known and len(known) == 1 else known
    if end.texts:
        settings.stop_strings = [*dict.fromkeys([*(settings.stop_strings or ()), *end.texts])]


@torch.no_grad()
def layer_rows(
    base: nn.Module, layers: Mapping[str, AdapterLinear], rounded: Callable[[Tensor], Tensor]
) -> list[dict[str, Any]]:
    """Per adapted layer ||dW|| / ||W|| and cos(dW, recovered dW).

    `cos` is None where nothing was trained (dW = 0), and 0 where rounding left nothing of it.
    """
    rows = []
    for path, layer in layers.items():
        assert layer.site is not None
        W = weight_of(base.get_submodule(layer.site.owner), layer.site).float()
        merged = layer.adapted_weight()
        update = (merged - W).double()
        recovered = (rounded(merged).float() - rounded(W).float()).double()
        norm, recovered_norm, base_norm = (
            float(tensor.norm()) for tensor in (update, recovered, W.double())
        )
        cos: float | None = None
        if norm:
            product = float((update * recovered).sum())
            cos = product / (norm * recovered_norm) if recovered_norm else 0.0
        rows.append({"layer": path, "relative_norm": norm / base_norm if base_norm else None,
                     "cos": cos})  # fmt: skip
    return rows


def divergence(logits: Tensor, others: Tensor) -> dict[str, float | int]:
    """KL(p || p') in nats over texts, and how many predictions changed, from logits (n, c)."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (logits, others))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)  # n; rounding may fall below 0
    changed = logits.argmax(-1) != others.argmax(-1)
    return {
        "kl_mean_nats": float(kl.mean()),
        "kl_max_nats": float(kl.max()),
        "changed_predictions_frac": float(changed.double().mean()),
        "n": len(kl),
    }


def export_merged(
    path: Path,
    out: Path,
    *,
    dtype: str | None = None,
    requantize: str | None = None,
    packed: bool = False,
    replace: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write the merged model of a run to the folder `out` and its report next to it; the report.

    Args:
        path: the run's folder, or its adapter's.
        dtype: a key of `DTYPES`, None for the one in which the base was loaded.
        requantize: a key of `STORES`: the merged weights are rounded through it and saved dense.
        packed: save their codes instead, as bitsandbytes does.
        replace: an earlier merge.
        force: take another base than the adapter was trained on.

    Raises ValueError if `out` holds anything else, and as `native.restore` does.
    """
    out = free_for_merged(out, replace=replace)
    target = choose("--dtype", dtype, DTYPES) if dtype else None
    store = choose("--requantize", requantize, STORES) if requantize else None
    if packed and store is None:
        raise ValueError("--packed is set without --requantize; give --requantize nf4 or int8.")
    restored = restore(path, force=force)
    target = target or STORAGE_DTYPES[restored.config["model"].get("dtype", "float32")]
    notes, seed = list(restored.notes), restored.config.get("seed", 0)
    texts, source = inference.sample_texts(restored, ROWS)

    def logits(model: nn.Module) -> Tensor:
        limit = inference.token_limit(restored)
        return inference.classify(model, restored.base.tokenizer, texts, limit=limit)

    steps = {"as trained": logits(restored.model)}
    if is_quantised(restored.variant) and not restored.base.quantised:
        kept = getattr(restored.variant.store, "func", restored.variant.store).__name__
        restored = restore(path, dense=True, force=force)
        steps["on the original weights"] = logits(restored.model)
        notes.append(
            f"Trained over a quantised base ({kept}), merged into the original weights of "
            f"{restored.base.name}: see the divergence."
        )
    if requantize:
        notes.append(
            f"The merged weights of the {len(restored.layers)} adapted layers were rounded to "
            f"{requantize} and are saved {'as bitsandbytes saves them' if packed else 'dense'}."
        )
    base = build.load_base(restored.config, restored.labels)  # some layers keep no W to subtract
    rows = layer_rows(base.model, restored.layers, rounding(target, store))
    codes = coded(restored.layers, store) if packed and store else {}
    model = merge_into_base(restored.base.model, target, store)

    if restored.base.use_cache is not None:
        model.config.get_text_config().use_cache = restored.base.use_cache
    if restored.labels is None:
        set_ends(model, restored)

    with new_folder(out) as folder, quiet_loading(seed):
        save(model, folder, codes)
        restored.base.tokenizer.save_pretrained(folder)
        if codes:  # without bitsandbytes
            kept = {"labels": restored.labels, "seed": seed, "dtype": short_name(target)}
            steps["as saved"] = logits(hf.load_checkpoint(folder, name=str(folder), **kept).model)
        else:
            steps["as saved"] = logits(type(model).from_pretrained(folder, dtype="auto"))
    names = list(steps)
    pairs = [*pairwise(names)]
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    low = sorted(
        (row["cos"], row["layer"])
        for row in rows
        if row["cos"] is not None and row["cos"] < LOW_COS
    )
    report = {
        "base": restored.base.name,
        "dtype": short_name(target),
        "requantized": requantize,
        "rounding": f"{requantize} and {short_name(target)}" if requantize else short_name(target),
        "notes": notes,
        "texts": source,
        "divergence": [{"from": a, "to": b, **divergence(steps[a], steps[b])} for a, b in pairs],
        "lowest": [layer for _, layer in low],
        "layers": rows,
    }
    write_text(report_path(out), json.dumps(to_json(report), indent=2) + "\n")
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """The report for people: kinds of layers, worst layers, divergence."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in report["layers"]:
        kinds[kind_of(row["layer"])].append(row)

    def number(values: Sequence[float | None], of: Callable[[Sequence[float]], float]) -> str:
        known = [value for value in values if value is not None]
        return f"{of(known):.3g}" if known else "-"

    width = max(len("layer"), *map(len, kinds))
    lines = [
        *report["notes"],
        f"cos(dW, recovered dW) after rounding to {report['rounding']}\n",
        f"{'layer':<{width}}  {'n':>3}  {'|dW|/|W|':>9}  {'median cos':>10}  {'lowest':>7}",
    ]
    for name, rows in kinds.items():
        cos = [row["cos"] for row in rows]
        norm = number([row["relative_norm"] for row in rows], statistics.median)
        median, lowest = number(cos, statistics.median), number(cos, min)
        lines.append(f"{name:<{width}}  {len(rows):>3}  {norm:>9}  {median:>10}  {lowest:>7}")
    if low := report["lowest"]:
        cos_of = {row["layer"]: row["cos"] for row in report["layers"]}
        worst = ", ".join(f"{layer} ({cos_of[layer]:.2f})" for layer in low[:3])
        remedy = "" if report["rounding"] == "float32" else " --dtype float32 keeps it."
        if report["requantized"]:
            remedy = " Without --requantize it is kept."
        lines.append(
            f"\nwarning: rounding to {report['rounding']} eats the update of {len(low)} of "
            f"{len(report['layers'])} layers (cos below {LOW_COS}), most of all {worst}.{remedy}"
        )
    pairs = [f"{row['from']} -> {row['to']}" for row in report["divergence"]]
    width = max(map(len, pairs))
    lines.append(f"\non {report['texts']}")
    lines.append(f"{'':<{width}}  {'KL mean':>9}  {'KL max (nats)':>13}  {'changed':>8}")
    for name, row in zip(pairs, report["divergence"], strict=True):
        lines.append(
            f"{name:<{width}}  {row['kl_mean_nats']:>9.2g}  {row['kl_max_nats']:>13.2g}"
            f"  {row['changed_predictions_frac']:>8.1%}"
        )
    if not math.isfinite(report["divergence"][-1]["kl_max_nats"]):
        lines.append(
            f"\nwarning: the logits of the saved model are not finite: its activations overflow "
            f"{report['dtype']}. --dtype bf16 has the range of float32."
        )
    return "\n".join(lines)
