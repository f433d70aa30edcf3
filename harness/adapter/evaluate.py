"""Evaluate a trained adapter on its task once more, from its folder alone.

python -m harness.adapter.evaluate outputs/<experiment>/<run> --split test

Data, base, batch size, threads and device are those of the run, so that on the same machine the
metrics are the same to the bit. They are compared with the result that is stored next to the
adapter: where they differ, the exit code is 1.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import cli
from harness.adapter.folders import adapter_folder
from harness.disk.write import to_json, write_text
from harness.loop.result import Result

if TYPE_CHECKING:
    from harness.adapter.native import Restored
    from harness.tasks.batch import Evaluation

SPLITS = ("validation", "test")


def evaluate(restored: "Restored", split: str) -> "Evaluation":
    """Measures `split` as the run would have. Sets the number of threads to the run's.

    Raises ValueError if the data differs from the adapter's, or this machine lacks the device.
    """
    import torch

    from harness.adapter import inference
    from harness.machine import hardware

    config = restored.config
    task = inference.recorded_task(config)
    if task.fingerprint != restored.fingerprints["data"]:
        raise ValueError(
            f"the data of {task.name} differs from what the adapter was trained with, so its "
            "scores cannot be compared."
        )
    train, model = config["train"], restored.model
    device = hardware.resolve_device(
        train["device"], [train["compute_dtype"], config["model"].get("dtype", "float32")]
    )
    torch.set_num_threads(train["threads"] or hardware.default_threads())
    task.prepare(restored.base.tokenizer, min(task.max_tokens, restored.base.max_tokens))
    model.to(device)
    if train["compile"]:
        model.compile()
    return task.evaluate(model, split, batch_size=train["eval_batch_size"], device=device)


def stored_metrics(folder: Path, split: str) -> dict[str, Any] | None:
    """The metrics of `split` in the result of the run that an adapter's folder belongs to."""
    path = folder.parent / "result.json"
    return Result.read(path).get(split) if path.is_file() else None


def differences(metrics: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """A sentence per metric that is not the stored one, to the last bit."""
    names = [*metrics, *(name for name in stored if name not in metrics)]
    return [
        f"{name} is {metrics.get(name)}, stored {stored.get(name)}"
        for name in names
        if metrics.get(name) != stored.get(name)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = cli.parser("harness.adapter.evaluate", __doc__)
    add = parser.add_argument
    add("run", type=cli.path, help="a run's folder, or its adapter's")
    add("--split", choices=SPLITS, default="test")
    add(
        "--out",
        type=cli.path,
        help="write the predictions to this file, one JSON object a line",
    )
    add("--force", action="store_true", help="accept another base than it was trained on")
    cli.run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    if options.out and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out is {options.out}, and there is no folder {options.out.parent}.")
    if options.out and options.out.is_dir():
        raise ValueError(f"--out is {options.out}, which is a folder; give a file.")
    adapter_folder(options.run)
    from harness.adapter.restore import restore

    restored = restore(options.run, force=options.force)
    stored = stored_metrics(restored.folder, options.split)
    evaluation = evaluate(restored, options.split)
    print(*restored.notes, f"{restored.base.name}, {options.split}", sep="\n")
    for name, value in evaluation.metrics.items():
        print(f"{name:<10}  {value}")
    if options.out:
        rows = [to_json({"split": options.split, **row}) for row in evaluation.predictions]
        write_text(options.out, "".join(json.dumps(row) + "\n" for row in rows))
    if stored is None:
        print("there is no stored result to compare with")
    elif differ := differences(to_json(evaluation.metrics), stored):
        raise ValueError(f"not the stored result: {'; '.join(differ)}.")
    else:
        print("equal to the stored result")


if __name__ == "__main__":
    main()
