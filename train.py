"""Fine-tune a base model with one LoRA variant, under control.

    python train.py variant=dora                        one run
    python train.py -m variant=lora,dora seed=0,1,2     six
    python train.py --help                              every key
    torchrun --nproc-per-node 8 train.py variant=dora   one run on eight GPUs

The loop below is the only one. It knows no variant by name: what may differ between two runs is
what `variants.Variant` holds, and the rest is held constant.
"""

import functools
import math
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

# Or torch's profiler, by which memory is counted, warns of what was there before it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One job; its validation score, for sweepers that look for the best one. A user's mistake ends
    it with one sentence and exit code 1."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from harness.config import overrides

    job = HydraConfig.get()
    config: Any = {}
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
        config = overrides.from_home(config)
        return run(
            config,
            variant_yaml=OmegaConf.to_yaml(cfg.variant, resolve=False),
            overridden=[o.partition("=")[0].lstrip("+") for o in job.overrides.task],
            experiment=job.runtime.choices.get("experiment") or "default",
        )
    except (
        ValueError,
        HydraException,
        OmegaConfBaseException,
        OSError,
        RuntimeError,
        MemoryError,
    ) as error:
        from harness.disk import locks
        from harness.machine import distributed
        from harness.memory import advice

        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if advice.is_out_of_memory(error):
            distributed.say(f"error: {advice.out_of_memory(config)}")
        elif not isinstance(error, RuntimeError):
            cause = error.__cause__ if isinstance(error, HydraException) else None
            distributed.say(f"error: {' '.join(str(cause or error).split())}")
        elif not distributed.others_have_failed():
            raise  # it is ours
        if job.mode == RunMode.MULTIRUN:
            raise  # Hydra goes on with the other jobs and fails at the end
        sys.exit(locks.EXIT_CODE if isinstance(error, locks.Busy) else 1)


def run(
    config: dict[str, Any], *, variant_yaml: str, overridden: list[str], experiment: str
) -> float | None:
    """Straight down: hold constant, put under test, train, evaluate, record. Returns the task's
    on validation, None where nothing was trained.

    Args:
        config: resolved, plain values; see conf/config.yaml.
        variant_yaml: the variant's part before interpolation, and the keys that the user set: an
            option that the variant never reads is an error.
        experiment: names the folder of runs.
    """
    import time

    import torch
    import yaml
    from tqdm import tqdm

    import variants
    from harness import wandb_run
    from harness.adapter import peft_format, write
    from harness.adapter import start as initial
    from harness.config import build
    from harness.config import identity as keys
    from harness.config.secrets import refuse_secrets
    from harness.config.settings import TrainSettings, check_top_level
    from harness.disk import digest, inputs
    from harness.loop import checkpoint, dry_run, facts, hooks, meter, rate_test, sessions, show
    from harness.loop.folder import ReadOnlyFolder, RunFolder, folder_to_write
    from harness.loop.step import NonFiniteLoss, training_step
    from harness.machine import distributed, hardware, signals
    from harness.memory import estimate
    from harness.models import passes
    from harness.models.base import enable_activation_checkpointing
    from harness.tracking import NoTracker

    # ---- settings -------------------------------------------------------------------------------
    started = time.monotonic()
    check_top_level(config)
    refuse_secrets("", config)
    keys.check_free(config)
    if config["dry_run"] and config["rate_test"]:
        raise ValueError("dry_run keeps nothing and rate_test keeps its plot; choose one.")
    keys.ignored_options(overridden, variant_yaml, config["variant"]["name"])
    train, seed = TrainSettings(**config["train"]), config["seed"]
    distributed.begin(
        config["strategy"],
        batch_size=train.batch_size,
        device=train.device,
        compiled=train.compile,
    )
    dtypes = [train.compute_dtype, config["model"]["dtype"]]
    device = hardware.resolve_device(train.device, dtypes)
    torch.set_num_threads(train.threads or hardware.default_threads())
    # Bits depend on both, so they are part of the run's key.
    config["train"] |= {"threads": torch.get_num_threads(), "device": str(device)}
    key = keys.run_key(config)

    # ---- hold constant --------------------------------------------------------------------------
    environment = hardware.environment(torch.get_num_threads(), device)
    environment |= distributed.described(config["strategy"])
    schedule = build.make_factory(config, "schedule", "step", "steps")
    tracker, task = build.make(config, "tracking"), build.make(config, "task")
    schedule(1, train.steps)  # a mistake in it should not wait for the first step
    plan = estimate.Plan(config, task)
    print(plan.describe(), end="")
    base = build.load_base(config, task.labels, streamed=True)
    model = base.model
    environment["attention"] = model.config._attn_implementation
    parameters_total = sum(parameter.numel() for parameter in model.parameters())
    fingerprints = {"data": task.fingerprint, **base.fingerprints}
    if config["init_from"]:
        fingerprints["init_from"] = initial.fingerprint(Path(config["init_from"]))
    control_hash = keys.control_hash(config, fingerprints)
    identity = {"run_key": key, "fingerprints": fingerprints}
    keep_nothing = config["dry_run"] or config["rate_test"]
    path = config["run_dir"] or Path(config["outputs_dir"], experiment, keys.run_name(config))
    if not keep_nothing:
        open_folder = RunFolder if distributed.is_first() else ReadOnlyFolder
        folder = open_folder(
            Path(path), key, fingerprints, definition=base.definition, force=config["force"]
        )
        done = folder.result()
        distributed.agree(run_key=key, fingerprints=fingerprints, finished=done is not None)
        if done is not None:
            print(f"{folder.path} is {done['status']} already (force=true runs it again)\n")
            if inputs.changed(folder.inputs, times=False):  # but not what is made of it
                folder.read_again(
                    facts.inputs(config, task, base, initial.files(config["init_from"]))
                )
            if done["status"] == "failed":
                raise ValueError(done["reason"])
            if train.keep_checkpoints is not None:
                checkpoint.remove(folder.path / "checkpoints")  # killed before it could
            print(show.result_table(done))
            return done["validation"][task.primary_metric]
    task.prepare(base.tokenizer, min(task.max_tokens, base.max_tokens))
    task.check_base(base)
    batches_from = functools.partial(task.train_batches, seed=seed, batch_size=train.batch_size)
    evaluate = functools.partial(
        task.evaluate, model, batch_size=train.eval_batch_size, device=device
    )

    # ---- put under test -------------------------------------------------------------------------
    reference = task.remember(base) if not keep_nothing else None
    variant = build.make_variant(config)
    passed = passes.through(model, base.head)
    layers = build.adapt(base, variant, config, passed)
    matrices = passes.coverage(passed, model, layers, chosen=config["layers"])
    passes.check_coverage(matrices, config["targets"], config["partial"])
    notes = [*base.notes, *show.lowered(layers, variant)]
    if obstacle := peft_format.without_a_form(model, layers):
        notes.append(f"PEFT cannot hold this adapter: {obstacle}.")
    if config["init_from"]:
        notes += initial.start_from(Path(config["init_from"]), base, layers, config)
    groups = variant.groups(model, lr=variant.lr)
    for group in groups:
        group["initial_lr"] = group["lr"]
    fingerprint_before = facts.base_fingerprint(model)
    base_norms = meter.base_norms(layers)
    distributed.place(model, layers, device, config["strategy"])
    optimizer = build.make_optimizer(config, groups)
    steps = rate_test.STEPS if config["rate_test"] else train.steps
    allocator = variant.allocator and variant.allocator(layers, total_steps=steps, seed=seed)
    if train.activation_checkpointing:
        enable_activation_checkpointing(model)
    if train.compile:
        torch._dynamo.reset()  # what an earlier job has compiled is another model's
        model.compile()
    gauge = meter.Meter(model, optimizer, device)
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
    result: dict[str, Any] = {
        "status": "complete",
        "variant": variant.name,
        "seed": seed,
        "lr": variant.lr,
        "steps": train.steps,
        **facts.of_task(task),
        "base": base.name,
        "notes": [*base.notes],
        **identity,
        "control_hash": control_hash,
        "definition": base.definition,
        "effective_scale": facts.effective_scale(layers),
        "parameters": facts.parameters(model, layers, parameters_total),
        "matrix_weights": matrices,
        "environment_hash": digest.digest(environment),
    }
    print(f"{variant.name} on {base.name}, seed {seed}", task.describe(), *notes, sep="\n")
    print(f"\n{show.layer_table(layers)}\n\n{variants.describe_groups(groups)}\n")
    print(f"{show.parameters(result['parameters'])}, ", end="")
    print(f"frozen base {show.size(facts.frozen_bytes(model))}")
    print(f"{show.coverage(matrices)}\n")
    if config["dry_run"]:
        dry_run.run(take_step, gauge, batches_from(), train.steps, task.example(), plan)
        return None
    if config["rate_test"]:
        out, file = Path(config["outputs_dir"]), f"rate_test-{keys.run_name(config)}"
        rate_test.run(
            take_step, model, batches_from(), lr=variant.lr, out=out, name=file, config=config
        )
        return None

    # ---- train ----------------------------------------------------------------------------------
    folder.create(config, facts.inputs(config, task, base, initial.files(config["init_from"])))
    distributed.wait()  # for the first process, which may have removed what was there
    checkpoints = folder.path / "checkpoints"
    start, rank_history, skipped = 0, [{"step": 0, "ranks": facts.ranks(layers)}], []
    counter, watch = hooks.HookCounter(layers, allocator), hooks.GradientWatch(model, layers)
    saved = checkpoint.load(
        checkpoints, run=identity, model=model, layers=layers, optimizer=optimizer
    )
    session = distributed.gather(sessions.now(environment))[0]
    computed_by = sessions.continued(saved, session, train.resume, folder.path)
    if saved is not None:
        start, rank_history, skipped = (saved[k] for k in ("step", "rank_history", "skipped"))
        fingerprint_before = saved["fingerprint_before"]
        gauge.load_state_dict(saved["meter"])
        counter.load_state_dict(saved["hooks"])
        if allocator is not None:
            allocator.load_state_dict(saved["allocator"])
        print(f"continuing {folder.path} after step {start}")
    distributed.agree(checkpoint=start)
    folder.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    folder.write_json("environment.json", environment)

    def save_checkpoint(step: int) -> None:
        if not distributed.is_first():
            return
        state = {
            "sessions": computed_by,
            "rank_history": rank_history,
            "skipped": skipped,
            "fingerprint_before": fingerprint_before,
            "meter": gauge.state_dict(),
            "hooks": counter.state_dict(),
            "allocator": allocator and allocator.state_dict(),
        }
        checkpoint.save(
            checkpoints,
            step,
            run=identity,
            model=model,
            layers=layers,
            optimizer=optimizer,
            state=state,
            keep=train.keep_checkpoints,
        )

    if not distributed.is_first():
        tracker = NoTracker()
    with (
        tracker.open(
            run_dir=folder.path,
            run_id=folder.run_id,
            name=folder.path.name,
            group=experiment,
            job_type="train",
            tags=[variant.name, base.name, task.name],
            config=wandb_run.config_of(
                config,
                study=experiment,
                arm=variant.name,
                environment=environment,
                control_hash=control_hash,
                run_key=key,
            ),
            history=folder.history(up_to=start),
        ) as view,
        folder.recording_failure(result, (NonFiniteLoss, facts.BrokenLaw)),
        signals.on_signal() as asked,
    ):
        batches = batches_from(start=start * train.accumulation)
        progress = tqdm(
            range(start + 1, train.steps + 1),
            initial=start,
            total=train.steps,
            disable=not (sys.stderr.isatty() and distributed.is_first()),
            unit="step",
        )
        model.train()
        for step in progress:
            last, factor = step == train.steps, schedule(step, train.steps)
            row: dict[str, Any] = {}
            try:
                now = gauge.step(step, take_step, batches=batches, rate_factor=factor)
            except NonFiniteLoss:
                skipped.append(step)
                if not train.may_skip(skipped):
                    save_checkpoint(step - 1)  # the last good state, if it is one
                    raise
                row["train/skipped_steps"] = len(skipped)
            else:
                row |= now.log
                if step % train.log_every == 0 or last:
                    norms = meter.factor_norms(layers, base_norms)
                    row |= meter.training_row(now, variant.lr * factor, gauge, norms)
                    progress.set_postfix_str(show.progress(now, variant.lr * factor, gauge))
            if step == start + 1 or last:
                facts.check_gradients(model, optimizer)
            if step == start + 2 or last:
                watch.check()
            if step % train.eval_every == 0 or last:
                with gauge.pause():
                    facts.check_replicas(model, layers)
                    validation = evaluate("validation")
                row |= {f"eval/{k}": v for k, v in validation.metrics.items()}
                if allocator is not None and task.counts["signal"] and not last:
                    with gauge.pause():
                        signal = evaluate("signal").metrics["loss_nats"]
                    row["eval/signal_loss_nats"] = signal
                    row |= allocator.after_evaluation(layers, optimizer, step, signal)
            if (ranks := facts.ranks(layers)) != rank_history[-1]["ranks"]:
                rank_history.append({"step": step, "ranks": ranks})
            if row:
                folder.log({"step": step, **row})
                view.log({"step": step, **row})
            asked_by = next(filter(None, distributed.gather(asked.name)), None)
            if (step % train.checkpoint_every == 0 or asked_by) and not last:
                with gauge.pause():
                    save_checkpoint(step)
            if asked_by and not last:
                distributed.wait()  # for the checkpoint: torchrun ends all when one has ended
                print(f"ended by {asked_by} after step {step}; the same command goes on from it")
                sys.exit(signals.exit_code(asked_by))
        memory = gauge.memory()

        # ---- evaluate ---------------------------------------------------------------------------
        scores = {"validation": validation}
        if train.evaluate_test:
            with gauge.pause():
                scores["test"] = evaluate("test")
        if reference is not None:
            with gauge.pause():
                result["forgetting"] = reference.compare(model)
        merged_diff = facts.merged_max_abs_diff(
            model, layers, next(batches_from()).to(device).inputs
        )
        for split, score in scores.items():
            if not math.isfinite(score.metrics["loss_nats"]):
                raise NonFiniteLoss(f"the loss on {split} is not finite after {train.steps} steps.")

        # ---- record -----------------------------------------------------------------------------
        counter.check(
            variant,
            taken=set(range(1, train.steps + 1)).difference(skipped),
            steps=train.steps,
            evaluations=(train.steps - 1) // train.eval_every if task.counts["signal"] else 0,
        )
        result |= facts.check_laws(model, fingerprint_before, merged_diff, dtypes)
        result |= {
            "test": None,
            **{split: score.metrics for split, score in scores.items()},
            "generation": validation.generation,
            "parameters": facts.parameters(model, layers, parameters_total),
            "active_rank": {path: layer.active_rank() for path, layer in layers.items()},
            "rank_history": rank_history,
            "skipped_steps": len(skipped),
            **sessions.in_result(computed_by),
            "time": {**gauge.times(), "total_s": time.monotonic() - started},
            "memory": {
                **memory,
                "base_bytes": facts.frozen_bytes(model),
                "estimated_peak_bytes": plan.total_bytes(gauge.peak_shape),
            },
        }
        with folder_to_write(folder.path) as out:
            result["adapter_bytes"] = write.write_adapter(
                out / "adapter", base, layers, task.labels, fingerprints, config
            )
        folder.write_lines(
            "predictions.jsonl",
            [{"split": s, **row} for s, score in scores.items() for row in score.predictions],
        )
        split = list(scores)[-1]
        samples = task.samples(split, scores[split].predictions)[:50]
        folder.write_lines("samples.jsonl", samples)
        view.samples(samples)
        view.finish({key: value for key, value in result.items() if key != "definition"})
        folder.write_json("result.json", result)  # last: a folder that has it is finished
        if distributed.is_first() and train.keep_checkpoints is not None:
            checkpoint.remove(checkpoints)
    print(show.result_table(result))
    print(f"\nin {folder.path}: result.json, metrics.jsonl, predictions.jsonl, adapter/")
    if view.where:
        print(f"W&B: {view.where}")
    return result["validation"][task.primary_metric]


def command() -> None:
    """The command line: check the overrides, which Hydra 1.3 does without naming the nearest match,
    then hand over to Hydra."""
    from harness.config.overrides import check_command_line, flags_first, refuse_several

    shared = "TORCHELASTIC_RUN_ID" in os.environ  # by the processes of a torchrun
    try:
        sys.argv[1:] = check_command_line(flags_first(sys.argv[1:]), CONF)
        several = {"-m", "--multirun"} & set(sys.argv)
        if not several:
            refuse_several(sys.argv[1:], "add -m to run each, or write [a,b] for one list")
        if shared and several:
            raise ValueError("torchrun shares one run; start a multirun with python.")
    except ValueError as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if shared:
        from harness.machine import distributed

        distributed.end()


if __name__ == "__main__":
    command()
