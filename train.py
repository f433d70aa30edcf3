"""Fine-tune a base model with one LoRA variant, under control.

    python train.py variant=dora                        one run
    python train.py -m variant=lora,dora seed=0,1,2     six
    python train.py --help                              every key
    torchrun --nproc-per-node 8 train.py variant=dora   one run on eight GPUs

The loop below is the only one. It knows no variant by name: what may differ between two runs is
what `variants.Variant` holds, and the rest is held constant.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from harness.config.settings import Settings
    from harness.loop.facts import Held

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
            variant=OmegaConf.to_container(cfg.variant),
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


def hold(settings: "Settings") -> "Held":
    """Build all that is held constant, and say whether it will fit into memory before the base is
    loaded."""
    from harness.adapter.start import Start
    from harness.config import build
    from harness.config.identity import identify
    from harness.loop import facts
    from harness.machine import distributed
    from harness.memory.estimate import Plan
    from harness.tracking import NoTracker

    config, train = settings.config, settings.train
    schedule = build.make_schedule(settings)
    tracker, task = build.make(config, "tracking"), build.make(config, "task")
    plan = Plan(config, task)
    print(plan.describe(), end="")
    base = build.load_base(config, task.labels, streamed=True)
    start = Start(settings.init_from)
    fingerprints = {"data": task.fingerprint, **base.fingerprints, **start.fingerprints}
    return facts.Held(
        schedule=schedule,
        tracker=tracker if distributed.is_first() else NoTracker(),
        task=task,
        plan=plan,
        base=base,
        start=start.give_to,
        batches_from=partial(task.train_batches, seed=settings.seed, batch_size=train.batch_size),
        read=partial(facts.inputs, config, task, base, start.files),
        environment=facts.environment(settings, base),
        identity=identify(config, fingerprints, base.definition),
    )


def run(
    config: dict[str, Any], *, variant: Any, overridden: list[str], experiment: str
) -> float | None:
    """Straight down: settle, hold constant, put under test, train, evaluate, record. Returns the
    task's metric on validation, None where nothing was trained.

    Args:
        config, variant, overridden: see `build.settle`.
        experiment: names the folder of runs.
    """
    import time

    from harness import wandb_run
    from harness.adapter import peft_format, write
    from harness.config import build
    from harness.loop import checkpoint, dry_run, facts, meter, rate_test, show
    from harness.loop.folder import folder_to_write, open_folder
    from harness.loop.laws import BrokenLaw, Laws
    from harness.loop.step import NonFiniteLoss, prepared
    from harness.machine import distributed, signals

    # ---- settle ---------------------------------------------------------------------------------
    started = time.monotonic()
    settings = build.settle(config, variant=variant, overridden=overridden)
    train, keep = settings.train, settings.train.keep_checkpoints

    # ---- hold constant --------------------------------------------------------------------------
    held = hold(settings)
    task, base, plan, identity = held.task, held.base, held.plan, held.identity
    if not settings.keeps_nothing:
        folder = open_folder(settings, identity, experiment)
        if (done := folder.finished(held.read, keep_checkpoints=keep is None)) is not None:
            print(show.result_table(done))
            return done["validation"][task.primary_metric]
    task.prepare(base.tokenizer, min(task.max_tokens, base.max_tokens))
    task.check_base(base)

    # ---- put under test -------------------------------------------------------------------------
    reference = None if settings.keeps_nothing else task.remember(base)
    steps = rate_test.STEPS if settings.rate_test else train.steps
    test = build.under_test(settings, base, held.start, steps=steps)
    model, layers, method, allocator = test.model, test.layers, test.variant, test.allocator
    laws, gauge = Laws(test, settings.dtypes), meter.Meter(model, test.optimizer, settings.device)
    take_step = prepared(settings, test, task.loss)
    evaluate = partial(
        task.evaluate, model, batch_size=train.eval_batch_size, device=settings.device
    )
    result = facts.at_start(settings, held, test)
    print(show.banner(settings, base, task, test, peft_format.obstacles(model, layers)))
    if settings.dry_run:
        dry_run.run(take_step, gauge, held.batches_from(), train.steps, task.example(), plan)
    elif settings.rate_test:
        rate_test.run(take_step, held.batches_from(), settings, identity.name)
    if settings.keeps_nothing:
        return None

    # ---- train ----------------------------------------------------------------------------------
    folder.create(config, held.read())
    laws.watch()
    state = checkpoint.RunState(folder.checkpoints, identity.run, test, gauge, laws)
    state.load(held.environment, train.resume)
    folder.describe(config, held.environment)
    begun, tags = state.step, [method.name, base.name, task.name]
    about = wandb_run.training(config, identity, held.environment, experiment, tags)
    with (
        held.tracker.open(**about, **folder.view(begun)) as view,
        folder.recording_failure(result, (NonFiniteLoss, BrokenLaw)),
        signals.on_signal() as asked,
    ):
        batches = held.batches_from(start=begun * train.accumulation)
        for step in (progress := show.bar(begun, train.steps)):
            last, factor = step == train.steps, held.schedule(step, train.steps)
            logged, row = step % train.log_every == 0 or last, dict[str, Any]()
            try:
                now = gauge.step(step, take_step, batches=batches, rate_factor=factor, norms=logged)
            except NonFiniteLoss:
                state.skipped.append(step)
                if not train.may_skip(state.skipped):
                    state.save(step - 1, keep=keep)  # the last good state
                    raise
                row["train/skipped_steps"] = len(state.skipped)
            else:
                row |= now.log | state.note_overflow(step, now)
                if logged:
                    row |= meter.training_row(now, method.lr * factor, gauge, test)
                    progress.set_postfix_str(show.progress(now, method.lr * factor, gauge))
            laws.after_step(step - begun, last=last)
            if step % train.eval_every == 0 or last:
                with gauge.pause():
                    laws.check_replicas()
                    validation = evaluate("validation")
                row |= {f"eval/{k}": v for k, v in validation.metrics.items()}
                if allocator is not None and task.counts["signal"] and not last:
                    with gauge.pause():
                        signal = evaluate("signal").metrics["loss_nats"]
                    row["eval/signal_loss_nats"] = signal
                    row |= allocator.after_evaluation(layers, test.optimizer, step, signal)
            state.note_ranks(step)
            if row:
                folder.log({"step": step, **row})
                view.log({"step": step, **row})
            asked_by = next(filter(None, distributed.gather(asked.name)), None)
            if (step % train.checkpoint_every == 0 or asked_by) and not last:
                with gauge.pause():
                    state.save(step, keep=keep)
            if asked_by and not last:
                distributed.wait()  # for the checkpoint: torchrun ends all when one has ended
                signals.end(asked_by, step)
        memory = {**gauge.memory(), "estimated_peak_bytes": plan.total_bytes(gauge.peak_shape)}

        # ---- evaluate ---------------------------------------------------------------------------
        scores = {"validation": validation}
        with gauge.pause():
            if train.evaluate_test:
                scores["test"] = evaluate("test")
            if reference is not None:
                result["forgetting"] = reference.compare(model)
        facts.check_finite(scores, train.steps)

        # ---- record -----------------------------------------------------------------------------
        inputs = next(held.batches_from()).to(settings.device).inputs
        result |= laws.check(inputs, train, skipped=state.untaken, signal=task.counts["signal"])
        result |= facts.at_end(test, state, scores, memory, seconds=time.monotonic() - started)
        with folder_to_write(folder.path) as out:
            result["adapter_bytes"] = write.write_adapter(out / "adapter", held, layers, config)
        view.samples(folder.write_predictions(scores, task))
        view.finish({key: value for key, value in result.items() if key != "definition"})
        folder.finish(result, keep_checkpoints=keep is None)
    print(show.end(result, folder.path, view.where))
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
