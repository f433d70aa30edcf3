"""Fine-tune a base model with one LoRA variant, under control.

    python train.py variant=dora                        one run
    python train.py -m variant=lora,dora seed=0,1,2     six
    python train.py --help                              every key

The loop below is the only one. It knows no variant by name: what may differ between two runs is
what `variants.Variant` holds, and the rest is held constant.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    """One job. A user's mistake ends it with one sentence and exit code 1."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        run(cfg)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        cause = error.__cause__ if isinstance(error, HydraException) else None
        print(f"error: {cause or error}", file=sys.stderr)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # Hydra goes on with the other jobs and fails at the end
        sys.exit(1)


def run(cfg: DictConfig) -> None:
    import time

    import torch
    from hydra.utils import instantiate
    from safetensors.torch import save_file
    from tqdm import tqdm

    import variants
    from harness import banner, checkpoint, control, meter, rate_test
    from harness.models.base import enable_activation_checkpointing
    from harness.run import RunFolder, write_atomic
    from harness.settings import TrainSettings, check_top_level
    from harness.step import NonFiniteLoss, training_step

    started = time.time()
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    choices = HydraConfig.get().runtime.choices
    overridden = [o.partition("=")[0].lstrip("+") for o in HydraConfig.get().overrides.task]
    check_top_level(config)
    train = TrainSettings(**config["train"])
    control.ignored_options(
        overridden, OmegaConf.to_yaml(cfg.variant, resolve=False), config["variant"]["name"]
    )
    if train.threads:
        torch.set_num_threads(train.threads)
    config["train"]["threads"] = torch.get_num_threads()  # bits depend on it
    seed, name = config["seed"], config["variant"]["name"]
    key = control.run_key(config)
    folder = None
    if not (config["dry_run"] or config["rate_test"]):
        experiment = choices.get("experiment") or "default"
        default = Path(config["outputs_dir"], experiment, f"{name}-s{seed}-{key[:8]}")
        folder = RunFolder(Path(config["run_dir"] or default), key, force=config["force"])
        if not config["force"] and (done := folder.result()) is not None:
            print(f"{folder.path} is {done['status']} already (force=true runs it again)\n")
            print(banner.result_table(done))
            return

    # ---- hold constant --------------------------------------------------------------------------
    compute_dtype = getattr(torch, train.compute_dtype)
    device = control.resolve_device(train.device, [compute_dtype])
    environment = control.environment(torch.get_num_threads(), device)
    task = instantiate(cfg.task)
    base = instantiate(cfg.model)(labels=task.labels, seed=seed)
    model = base.model
    task.prepare(base.tokenizer, min(task.max_tokens, base.max_tokens))
    parameters_total = sum(p.numel() for p in model.parameters())
    fingerprints = {
        "data": task.fingerprint,
        "base": base.sha256,
        "tokenizer": base.tokenizer_sha256,
    }
    control_hash = control.control_hash(config, fingerprints)
    schedule = instantiate(cfg.schedule)

    # ---- put under test -------------------------------------------------------------------------
    variant: variants.Variant = instantiate(cfg.variant)
    layers = variants.inject(
        model,
        variant,
        seed=seed,
        targets=config["targets"],
        layers=config["layers"],
        rank_pattern=config["rank_pattern"],
        alpha_pattern=config["alpha_pattern"],
        train_modules=[*base.head, *config["train_modules"]],
        compute_dtype=compute_dtype,
    )
    model.to(device)
    groups = variant.groups(model, lr=variant.lr)
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = instantiate(cfg.optimizer)(groups)
    allocator = variant.allocator and variant.allocator(layers, total_steps=train.steps, seed=seed)
    if train.activation_checkpointing:
        enable_activation_checkpointing(model)
    if train.compile:
        model.compile()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = sum(
        p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad
    )
    base_norms = meter.base_norms(layers)
    fingerprint_before = control.base_fingerprint(model)
    take_step = functools.partial(
        training_step,
        model=model,
        layers=layers,
        variant=variant,
        optimizer=optimizer,
        allocator=allocator,
        loss=task.loss,
        device=device,
        seed=seed,
        accumulation=train.accumulation,
        clip_norm=train.clip_norm,
    )
    new_batches = functools.partial(task.train_batches, seed=seed, batch_size=train.batch_size)
    evaluate = functools.partial(
        task.evaluate, model, batch_size=train.eval_batch_size, device=device
    )

    print(f"{variant.name} on {base.name}, seed {seed}\n{task.describe()}")
    print("\n".join([*base.notes, ""]))
    print(banner.layer_table(layers), "\n")
    print(variants.describe_groups(groups), "\n")
    print(
        f"trainable {trainable:,} of {parameters_total:,} parameters "
        f"({100 * trainable / parameters_total:.2f} %), frozen base {banner.size(frozen_bytes)}\n"
    )

    if config["rate_test"]:
        out = Path(config["outputs_dir"])
        rate_test.run(take_step, model, new_batches(), variant.lr, out, f"rate_test-{name}-s{seed}")
        return
    gauge = meter.Meter(model, optimizer, device)
    if folder is None:
        model.train()
        batches = new_batches()
        for step in range(1, meter.WARMUP_STEPS + 2):
            gauge.step(step, lambda: take_step(step, batches=batches, rate_factor=0.0))  # noqa: B023
        minutes = gauge.step_s[-1] * train.steps / 60
        peak = banner.size(gauge.memory()["train_peak_bytes"])
        print(f"{task.example()}\n")
        print(f"about {minutes:.1f} min for {train.steps} steps without evaluation, peak {peak}")
        print("dry run: nothing was written")
        return

    # ---- train ----------------------------------------------------------------------------------
    folder.create(config)
    rank_history: list[dict[str, Any]] = [{"step": 0, "ranks": _ranks(layers)}]
    start = 0
    saved = checkpoint.load(
        folder.path / "checkpoints", model=model, layers=layers, optimizer=optimizer
    )
    if saved is not None:
        start, rank_history = saved["step"], saved["rank_history"]
        gauge.load_state_dict(saved["meter"])
        if allocator is not None:
            allocator.load_state_dict(saved["allocator"])
        print(f"continuing {folder.path} after step {start}")
    write_atomic(folder.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    folder.write_json("environment.json", environment)
    tracker = instantiate(cfg.tracking)
    with tracker.open(
        run_dir=folder.path,
        run_id=key[:16],
        name=folder.path.name,
        group=choices.get("experiment") or "default",
        job_type="train",
        tags=[variant.name, choices.get("model"), task.name],
        config={**config, "environment": environment, "control_hash": control_hash},
        history=folder.history(up_to=start),
    ) as view:

        def log(row: dict[str, Any]) -> None:
            folder.log(row)
            view.log(row)

        batches = new_batches(start=start * train.accumulation)
        progress = tqdm(
            range(start + 1, train.steps + 1),
            initial=start,
            total=train.steps,
            disable=not sys.stderr.isatty(),
            unit="step",
        )
        model.train()
        result: dict[str, Any] = {"status": "complete", "variant": variant.name, "seed": seed}
        try:
            for step in progress:
                factor = schedule(step, train.steps)
                now = gauge.step(
                    step,
                    lambda: take_step(step, batches=batches, rate_factor=factor),  # noqa: B023
                )
                row: dict[str, Any] = dict(now.log)
                if step % train.log_every == 0 or step == train.steps:
                    row |= {
                        "train/loss_nats": now.loss_nats,
                        "train/penalty": now.penalty,
                        "train/grad_norm": now.grad_norm,
                        "train/lr": variant.lr * factor,
                        "time/step_s": gauge.step_s[-1] if gauge.step_s else None,
                        **meter.factor_norms(layers, base_norms),
                    }
                    progress.set_postfix(
                        loss=f"{now.loss_nats:.3f}",
                        lr=f"{variant.lr * factor:.1e}",
                        tokens_s=f"{gauge.times()['tokens_per_s'] or 0:.0f}",
                        peak=banner.size(gauge.memory()["train_peak_bytes"]),
                    )
                if step % train.eval_every == 0 and step < train.steps:
                    with gauge.pause():
                        scores = evaluate("validation")
                        row |= {f"eval/{k}": v for k, v in scores.metrics.items()}
                        if allocator is not None and task.counts["signal"]:
                            signal = evaluate("signal").metrics["loss_nats"]
                            row["eval/signal_loss_nats"] = signal
                            row |= allocator.after_evaluation(layers, optimizer, step, signal)
                if (ranks := _ranks(layers)) != rank_history[-1]["ranks"]:
                    rank_history.append({"step": step, "ranks": ranks})
                if row:
                    log({"step": step, **row})
                if step % train.checkpoint_every == 0 and step < train.steps:
                    with gauge.pause():
                        checkpoint.save(
                            folder.path / "checkpoints",
                            step,
                            model=model,
                            layers=layers,
                            optimizer=optimizer,
                            state={
                                "rank_history": rank_history,
                                "meter": gauge.state_dict(),
                                "allocator": allocator and allocator.state_dict(),
                            },
                        )
        except NonFiniteLoss as error:
            result |= {"status": "failed", "reason": str(error), "steps": step - 1}
            result |= {"lr": variant.lr, "control_hash": control_hash}
            folder.write_json("result.json", result)
            raise
        memory = {**gauge.memory(), "base_bytes": frozen_bytes}

        # ---- evaluate ---------------------------------------------------------------------------
        predictions = []
        with gauge.pause():
            for split in ("validation", "test"):
                scores = evaluate(split)
                result[split] = scores.metrics
                predictions += [{"split": split, **row} for row in scores.predictions]
        merged_diff = _merged_max_abs_diff(model, layers, next(new_batches()).to(device).inputs)

        # ---- record -----------------------------------------------------------------------------
        ranks_final = {path: layer.active_rank() for path, layer in layers.items()}
        scales = {path: layer.scale for path, layer in layers.items()}
        result |= {
            "lr": variant.lr,
            "steps": train.steps,
            "task": task.name,
            "base": base.name,
            "run_key": key,
            "control_hash": control_hash,
            "fingerprints": fingerprints,
            "effective_scale": scales if len(set(scales.values())) > 1 else max(scales.values()),
            "parameters": {
                "trainable": trainable,
                "trainable_final": trainable
                - sum(
                    sum(p.numel() for p in layer.roles().values()) - layer.active_parameters()
                    for layer in layers.values()
                ),
                "total": parameters_total,
            },
            "active_rank": ranks_final,
            "rank_history": rank_history,
            "time": {**gauge.times(), "total_s": time.time() - started},
            "memory": memory,
            "base_fingerprint": {
                "before": fingerprint_before,
                "after": control.base_fingerprint(model),
            },
            "merged_max_abs_diff": merged_diff,
            "environment_hash": control.digest(environment),
        }
        (folder.path / "adapter").mkdir(exist_ok=True)
        save_file(
            checkpoint.trained_state(model, layers), folder.path / "adapter/adapter.safetensors"
        )
        about = {"base": base.name, "fingerprints": fingerprints, "labels": list(task.labels)}
        folder.write_json("adapter/adapter.json", {**about, "config": config})
        folder.write_lines("predictions.jsonl", predictions)
        folder.write_json("result.json", result)
        checkpoint.remove(folder.path / "checkpoints")
        view.samples([row for row in predictions if row["split"] == "test"][:50])
        view.finish({k: v for k, v in result.items() if k != "rank_history"})
    print(banner.result_table(result))
    print(f"\nin {folder.path}: result.json, metrics.jsonl, predictions.jsonl, adapter/")
    if view.where:
        print(f"W&B: {view.where}")


def _ranks(layers) -> list[int]:
    return [layer.active_rank() for layer in layers.values()]


def _merged_max_abs_diff(model, layers, inputs) -> float:
    """Merge, compare the logits of one batch with the unmerged model's, unmerge."""
    import torch

    model.eval()
    with torch.no_grad():
        unmerged = model(**inputs).logits
        for layer in layers.values():
            layer.merge()
        merged = model(**inputs).logits
        for layer in layers.values():
            layer.unmerge()
    return float((merged - unmerged).abs().max())


def check_command_line(arguments: list[str]) -> list[str]:
    """Name the nearest match of a misspelt override, which Hydra 1.3 does not."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from harness.overrides import check_overrides

    if any(argument in ("-sc", "--shell-completion") for argument in arguments):
        return arguments
    groups = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in CONF.iterdir()
        if folder.is_dir()
    }

    def keys_of(choices) -> set[str]:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return set(_dotted(OmegaConf.to_container(compose("config", list(choices)))))

    try:
        return check_overrides(arguments, groups, keys_of)
    except HydraException:  # Hydra will meet it again and say it itself
        return arguments


def _dotted(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items() if isinstance(node, dict) else ():
        keys += [prefix + str(key), *_dotted(value, f"{prefix}{key}.")]
    return keys


def command() -> None:
    """The command line: check the overrides, then hand over to Hydra."""
    try:
        sys.argv[1:] = check_command_line(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    main()


if __name__ == "__main__":
    command()
