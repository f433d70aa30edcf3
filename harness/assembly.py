"""From a resolved config to objects: the base model, the variant, the adapted layers.

Training, matching by parameters and adapters that are loaded again all build them here.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.models.base import BaseModel, Outline
from harness.models.streamed import read_rest
from harness.overrides import check_command_line, refuse_several
from harness.settings import check_call
from variants import AdapterLinear, DenseStore, Variant, inject

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved config of train.py with these overrides, in plain values. Raises ValueError for
    a mistake in them, with the nearest match."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    def plain(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, Sequence) and not isinstance(node, str):
            return [plain(value) for value in node]
        return node

    refuse_several(overrides, "give one of them")
    given = check_command_line(overrides, CONF)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return plain(compose("config", given))
    except HydraException as error:
        raise ValueError(str(error.__cause__ or error)) from error


def make(config: Mapping[str, Any], part: str) -> Any:
    """What conf/<part>/ describes, from plain values."""
    from hydra.utils import instantiate

    return instantiate(config[part], _convert_="all")


def make_factory(config: Mapping[str, Any], part: str, *given: str) -> Any:
    """The same where it is yet to be called, with what is `given` to it then. Raises ValueError on
    an option that it would ignore."""
    check_call(factory := make(config, part), part, given)
    return factory


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
            `adapt` reads them one by one. The model works meanwhile, and is the same.

    Raises ValueError if it cannot be loaded.
    """
    load = make_factory(config, "model", "labels", "seed", "streamed")
    if streamed:
        streamed = getattr(make_variant(config).store, "func", DenseStore) is not DenseStore
    return load(labels=labels, seed=config["seed"], streamed=streamed)


def outline_base(config: Mapping[str, Any], labels: Sequence[str] | None) -> Outline:
    """The same model of shapes alone, without a weight. Raises ValueError as `load_base` does."""
    settings = dict(config["model"])
    target = settings["_target_"].rpartition(".")[0] + ".outline"  # beside each loader's `load`
    outline: Outline = make({"model": {**settings, "_target_": target}}, "model")(labels=labels)
    return outline


def make_variant(config: Mapping[str, Any]) -> Variant:
    """The method under test. Raises ValueError on an option that a part of it would ignore."""
    variant: Variant = make(config, "variant")
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
    base: BaseModel | Outline, variant: Variant, config: Mapping[str, Any]
) -> dict[str, AdapterLinear]:
    """Put the variant into the base model, in place; see `variants.inject`. What it leaves on the
    disk is read now."""
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
    )
    read_rest(base.model)
    return layers


def check_targets(config: Mapping[str, Any], packages: Mapping[str, str]) -> None:
    """Raise ValueError unless all that `make` would call for a config from elsewhere is ours.

    Args:
        packages: part of the config -> the package that everything in it must come from.
    """

    def check(node: Any, package: str) -> None:
        if isinstance(node, Mapping):
            if (target := node.get("_target_")) is not None and not _defined_in(target, package):
                raise ValueError(f"the config asks for {target!r}, which is not of {package}.")
            children: Collection[Any] = node.values()
        else:
            children = node if isinstance(node, list) else ()
        for child in children:
            check(child, package)

    for part, package in packages.items():
        check(config[part], package)


def _defined_in(target: object, package: str) -> bool:
    """Whether a dotted name is of the package, and not of something that is imported there."""
    from hydra.errors import InstantiationException
    from hydra.utils import get_object

    if not isinstance(target, str) or not target.startswith(package + "."):
        return False
    try:
        module = getattr(get_object(target), "__module__", "")
    except (ImportError, InstantiationException):
        return False
    return f"{module}.".startswith(package + ".")
