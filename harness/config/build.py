"""Builds objects of a resolved config: the base model, the variant, the adapted layers.

Training, matching by parameters and adapters that are loaded again all build them here.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import PreTrainedModel

from harness.config import identity
from harness.config.identity import present_name
from harness.config.overrides import check_command_line, known_targets, refuse_several
from harness.config.secrets import refuse_secrets
from harness.config.settings import Settings, check_call
from harness.disk.digest import mapped
from harness.disk.read import check, shortened
from harness.machine import distributed, hardware
from harness.models import new_tokens, passes
from harness.models.base import BaseModel, Outline, enable_activation_checkpointing
from harness.models.streamed import read_rest
from variants import AdapterLinear, DenseStore, LowRankLinear, RankAllocator, Variant, inject

CONF = Path(__file__).resolve().parents[2] / "conf"
_KEYWORDS = ("_target_", "_partial_", "_convert_")  # Hydra's, as far as conf/ uses them


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved config of train.py with these overrides, in plain values. Raises ValueError for
    a mistake in them, with the nearest match."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    refuse_several(overrides, "give one of them")
    given = check_command_line(overrides, CONF)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return mapped(compose("config", given), lambda leaf: leaf)
    except HydraException as error:
        raise ValueError(str(error.__cause__ or error)) from error


def make(config: Mapping[str, Any], part: str) -> Any:
    """Builds what conf/<part>/ describes: `_target_` called with the other keys, or with
    `_partial_` a functools.partial of it.

    Values are data: no text among them is looked at, let alone interpolated. For a config from a
    file see `check_recorded` first. Raises ValueError if the target does not take its settings.
    """
    return _built(config[part], part)


def _built(node: Any, where: str) -> Any:
    from hydra.utils import get_object

    if isinstance(node, list):
        return [_built(item, where) for item in node]
    if not isinstance(node, Mapping):
        return node
    built = {k: _built(v, f"{where}.{k}") for k, v in node.items() if k not in _KEYWORDS}
    if "_target_" not in node:
        return built
    try:
        target = get_object(present_name(node["_target_"]))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    call = functools.partial(target, **built)
    if node.get("_partial_"):
        return call
    check_call(call, where)
    try:
        inspect.signature(target).bind(**built)
    except TypeError as error:
        raise ValueError(f"{where} does not fit {node['_target_']}: {error}.") from None
    try:
        return call()
    except TypeError as error:
        twice = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
        if twice and twice[1] in built:  # which a class gives to its base
            raise ValueError(f"{where} sets {twice[1]} itself; leave it out.") from error
        raise


def make_factory(config: Mapping[str, Any], part: str, *given: str) -> Any:
    """The same where it is yet to be called, with what is `given` to it then. Raises ValueError on
    an option that it would ignore."""
    check_call(factory := make(config, part), part, given)
    return factory


def make_schedule(settings: Settings) -> Callable[[int, int], float]:
    """conf/schedule, tried once: a mistake in it should not wait for the first step."""
    schedule: Callable[[int, int], float] = make_factory(
        settings.config, "schedule", "step", "steps"
    )
    schedule(1, settings.train.steps)
    return schedule


def make_optimizer(config: Mapping[str, Any], groups: Sequence[dict]) -> torch.optim.Optimizer:
    """conf/optimizer over these groups. Raises ValueError if it does not take its settings."""
    factory = make_factory(config, "optimizer", "params")
    try:
        return factory(groups)
    except (TypeError, RuntimeError) as error:
        settings = ", ".join(f"{key}={value!r}" for key, value in factory.keywords.items())
        reason = " ".join(str(error).split())
        raise ValueError(f"optimizer does not take {settings}: {reason}.") from error


def load_base(
    config: Mapping[str, Any], labels: Sequence[str] | None, *, streamed: bool = False
) -> BaseModel:
    """The base model with a classifier for `labels`; for None, as the language model it is.

    Args:
        streamed: leave the weights on the disk that the variant's store will keep in another form;
            `adapt` reads them one by one. The model works meanwhile, and is the same. With new
            tokens all is loaded.

    Raises ValueError if it cannot be loaded.
    """
    model, tokens = _without_tokens(config)
    load = make_factory(model, "model", "labels", "seed", "streamed")
    if tokens:
        return new_tokens.add(load(labels=labels, seed=config["seed"]), tokens, config["seed"])
    if streamed:
        streamed = getattr(make_variant(config).store, "func", DenseStore) is not DenseStore
    return load(labels=labels, seed=config["seed"], streamed=streamed)


def outline_base(config: Mapping[str, Any], labels: Sequence[str] | None) -> Outline:
    """The same model of shapes alone, without a weight. Raises ValueError as `load_base` does."""
    model, tokens = _without_tokens(config)
    settings = dict(model["model"])
    target = settings["_target_"].rpartition(".")[0] + ".outline"  # next to each loader's `load`
    outline: Outline = make({"model": {**settings, "_target_": target}}, "model")(labels=labels)
    return new_tokens.outline(outline, tokens) if tokens else outline


def _without_tokens(config: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
    """The model's part of a config as its loader takes it, and the tokens to add to any."""
    settings = dict(config["model"])
    tokens = new_tokens.check(settings.pop("new_tokens", ()))
    return {"model": settings}, tokens


def make_variant(config: Mapping[str, Any]) -> Variant:
    """The method under test. Raises ValueError on an option that a part of it would ignore."""
    variant = make(config, "variant")
    if not isinstance(variant, Variant):
        raise ValueError(f"variant is {variant!r}; its _target_ must be variants.Variant.")
    if not callable(variant.adapter):
        raise ValueError(
            f"variant.adapter is {variant.adapter!r}; it must be a mapping with a _target_."
        )
    check_call(variant.groups, "variant.groups", ("model", "lr"))
    check_call(variant.store, "variant.store")
    if variant.allocator is not None:
        check_call(variant.allocator, "variant.allocator", ("layers", "total_steps", "seed"))
    return variant


def adapt(
    base: BaseModel | Outline,
    variant: Variant,
    config: Mapping[str, Any],
    passed: passes.Passed | None = None,
) -> dict[str, AdapterLinear]:
    """Put the variant into the base model, in place; see `variants.inject`. What it leaves on the
    disk is read now.

    Args:
        passed: what a text passes through; None to look. A config without the key `partial`, of an
            adapter made elsewhere or before there was one, is taken at its word.
    """
    trained_tokens = new_tokens.names(base.model, base.new_tokens) if base.new_tokens else {}
    if passed is None and "partial" in config:
        passed = passes.through(base.model, base.head)
    layers = inject(
        base.model,
        variant,
        seed=config["seed"],
        targets=config["targets"],
        layers=config["layers"],
        rank_pattern=config["rank_pattern"],
        alpha_pattern=config["alpha_pattern"],
        head=base.head,
        train_modules=config["train_modules"],
        compute_dtype=getattr(torch, config["train"]["compute_dtype"]),
        passed=None if passed is None else passed.parameters,
    )
    for path in layers.keys() & (passed.read if passed is not None else set()):
        layers[path].weight_read = True
    read_rest(base.model)
    new_tokens.attach(base.model, trained_tokens)
    return layers


# ---- the parts of a run -------------------------------------------------------------------------


def settle(
    config: dict[str, Any], *, variant: Mapping[str, Any], overridden: Sequence[str]
) -> Settings:
    """Check all that can be checked before anything is built, join the processes of a torchrun and
    fix device, threads and dtypes, in the config too: bits depend on them, so they are part of the
    run's key.

    Args:
        config: resolved, plain values; see conf/config.yaml.
        variant: its part before interpolation.
        overridden: keys that the user set; an option that the variant never reads is an error.

    Raises ValueError for a mistake in them.
    """
    refuse_secrets("", config)
    settings = Settings.of(config)
    identity.check_free(config)
    identity.ignored_options(overridden, variant)
    train = settings.train
    distributed.begin(
        settings.strategy, batch_size=train.batch_size, device=train.device, compiled=train.compile
    )
    device = hardware.resolve_device(train.device, settings.dtypes)
    torch.set_num_threads(train.threads or hardware.default_threads())
    config["train"] |= {"threads": torch.get_num_threads(), "device": str(device)}
    return Settings.of(config, hardware.float16_instead(config, device))


@dataclass(frozen=True, kw_only=True)
class UnderTest:
    """The method under test, in its model.

    Args:
        parameters: of the base model, their number.
        layers: the adapted layers by path.
        groups: of parameters, with their rates.
        scaler: of the loss, enabled if the model computes or is kept in float16.
        base_norms: ||W||_F of each low-rank layer.
        coverage: of the matrix weights, see `passes.coverage`.
        notes: sentences that a user should know.
    """

    variant: Variant
    model: PreTrainedModel
    parameters: int
    layers: Mapping[str, AdapterLinear]
    groups: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer
    allocator: RankAllocator | None
    scaler: torch.amp.GradScaler
    base_norms: Mapping[str, float]
    coverage: Mapping[str, Any]
    notes: list[str]


def under_test(
    settings: Settings,
    base: BaseModel,
    start: Callable[[BaseModel, Mapping[str, AdapterLinear], Mapping[str, Any]], list[str]],
    *,
    steps: int,
) -> UnderTest:
    """Put the variant into the base, in place, freeze the rest and move all to its device, ready to
    be trained for so many steps.

    Args:
        start: may give the layers other values to start from; what it did, as sentences.
    """
    config, train, model = settings.config, settings.train, base.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    variant = make_variant(config)
    passed = passes.through(model, base.head)
    layers = adapt(base, variant, config, passed)
    covered = functools.partial(passes.coverage, passed, model, layers, chosen=config["layers"])
    targets = config["targets"]
    for word in [targets] if isinstance(targets, str) else targets:
        passes.check_coverage(covered(word=word), word, settings.partial)
    notes = start(base, layers, config)
    groups = variant.groups(model, lr=variant.lr)
    for group in groups:
        group["initial_lr"] = group["lr"]
    norms = base_norms(layers)
    distributed.place(model, layers, settings.device, settings.strategy)
    optimizer = make_optimizer(config, groups)
    allocator = None
    if variant.allocator is not None:
        allocator = variant.allocator(layers, total_steps=steps, seed=settings.seed)
    if train.activation_checkpointing:
        enable_activation_checkpointing(model)
    if train.compile:
        torch._dynamo.reset()  # what an earlier job has compiled is another model's
        model.compile()
    model.train()
    return UnderTest(
        variant=variant,
        model=model,
        parameters=parameters,
        layers=layers,
        groups=groups,
        optimizer=optimizer,
        allocator=allocator,
        scaler=torch.amp.GradScaler(settings.device.type, enabled="float16" in settings.dtypes),
        base_norms=norms,
        coverage=covered(),
        notes=notes,
    )


@torch.no_grad()
def base_norms(layers: Mapping[str, AdapterLinear]) -> dict[str, float]:
    """||W||_F of each layer with factors."""
    return {
        path: float(layer.base_weight().norm())
        for path, layer in layers.items()
        if isinstance(layer, LowRankLinear)
    }


# ---- what a file says ---------------------------------------------------------------------------


def check_recorded(config: Mapping[str, Any], parts: Sequence[str], where: str) -> None:
    """Raise ValueError, beginning with `where`, unless a config from a file is one that `make` may
    build `parts` of: everything named there is what conf/ names at the same place, with settings of
    the kinds that it takes. Nothing else is imported."""
    for part in parts:
        node = config.get(part)
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise ValueError(f"{where}: {part} is {shortened(node)}; it must have a _target_.")
        _check_node(node, part, where)


def _check_node(node: Any, key: str, where: str) -> None:
    for child in node if isinstance(node, list) else ():
        _check_node(child, key, where)
    if not isinstance(node, Mapping):
        return
    for name, child in node.items():
        _check_node(child, f"{key}.{name}", where)
    if extra := sorted(k for k in node if re.fullmatch("_.*_", k) and k not in _KEYWORDS):
        raise ValueError(f"{where}: {key} has {extra[0]}, which is no setting.")
    if "_target_" not in node:
        return
    target, known = present_name(node["_target_"]), known_targets(key, CONF)
    if not isinstance(target, str) or target not in known:
        raise ValueError(
            f"{where}: {key} asks for {shortened(target)}; a file may ask for "
            f"{', '.join(sorted(known)) or 'nothing there'}."
        )
    _check_settings(target, node, f"{where}: {key}")


def _check_settings(target: str, node: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless every setting is of the kind that the target's signature says."""
    from hydra.utils import get_object

    kinds = {**_kinds(get_object(target)), "_partial_": bool, "_convert_": Literal["all"]}
    for name, value in node.items():
        if name in kinds and not (isinstance(value, Mapping) and "_target_" in value):
            check(kinds[name], value, f"{where}.{name}")


def _kinds(target: Any) -> dict[str, Any]:
    """Setting -> its annotation, of those that say a kind of plain values; a class's **settings are
    its bases'."""
    kinds: dict[str, Any] = {}
    for owner in target.__mro__ if inspect.isclass(target) else [target]:
        call = owner.__dict__.get("__init__", owner) if inspect.isclass(owner) else owner
        with contextlib.suppress(NameError, TypeError):  # a name for type checkers alone
            for name, kind in get_type_hints(call).items():
                if _is_plain(kind):
                    kinds.setdefault(name, kind)
    return kinds


def _is_plain(kind: Any) -> bool:
    """Tells whether an annotation is of values that a file can hold."""
    if get_origin(kind) is Literal:
        return True
    plain = {Any, int, float, str, bool, NoneType, dict, list, Path, Sequence, Mapping,
             UnionType, Union}  # fmt: skip
    return (get_origin(kind) or kind) in plain and all(map(_is_plain, get_args(kind)))
