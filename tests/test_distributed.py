"""One run on two processes is the run on one: with gloo, on the CPU, started by torchrun.

Starting processes takes most of the time, so that all runs of a kind share one torchrun.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import CommandLine, write_task
from hydra.core.global_hydra import GlobalHydra
from torch import nn

import train
from harness.loop import laws
from harness.loop.folder import ReadOnlyFolder, RunFolder
from harness.loop.step import own_part
from harness.machine import distributed
from harness.tasks.batch import Batch
from variants.dropout import DropoutMasks

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
CUTS = [
    "variant.allocator.interval=1",
    "variant.allocator.epsilon=0.2",
    "variant.allocator.patience=1",
]
DDP, BOTH = distributed.STRATEGIES[:1], distributed.STRATEGIES
# Name of the run -> strategies, and what it adds to the settings below. A Llama drops nothing by
# itself, as a BERT does.
RUNS = {
    "lora": (DDP, ["variant=lora", "train.accumulation=2", "dropout=0.2"]),
    "dora": (BOTH, ["variant=dora", "dropout=0.2", "train.activation_checkpointing=true"]),
    "adalora": (DDP, ["variant=adalora", *CUTS]),
    "adalora_budget": (DDP, ["variant=adalora_budget", "train.accumulation=2"]),  # a penalty
    "qadalora": (BOTH, ["variant=qadalora", *CUTS]),
    "language": (BOTH, ["variant=lora", "dropout=0.3", "train.accumulation=2"]),  # unequal rows
    "bert": (BOTH, ["variant=lora"]),
}
SENTENCES = ["a", "a good film", "what a long and tedious evening it was", "fine, and that is all"]


def write_language_task(folder: Path) -> list[str]:
    """Prompts whose completions are of very unequal length."""
    for split, count in (("train", 24), ("test", 6)):
        rows = [{"prompt": f"say {n}", "completion": SENTENCES[n % 4]} for n in range(count)]
        text = "\n".join(map(json.dumps, rows))
        (folder / f"{split}.jsonl").write_text(text)
    return [
        "task=local_sft",
        f"task.files.train={folder}/train.jsonl",
        f"task.files.validation={folder}/test.jsonl",
        f"task.files.test={folder}/test.jsonl",
        "task.generate_rows=5",
        "task.max_new_tokens=6",
        "task.held_out_tokens=40",
    ]


def settings(task: list[str], model: str = "tiny_llama") -> list[str]:
    return [
        f"model={model}",
        "tracking=none",
        "train.steps=6",
        "train.batch_size=4",
        "train.eval_every=3",
        "train.eval_batch_size=5",
        "train.log_every=1",
        "train.checkpoint_every=3",
        "train.threads=1",
        "train.device=cpu",
        *task,
    ]


TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *command], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def command_of_the_page() -> list[str]:
    """The overrides of docs/run.md's torchrun, which is started as those here are."""
    page = (ROOT / "docs/run.md").read_text(encoding="utf-8")
    section = page[page.index("## More than one GPU") :]
    command = re.search(r"^(torchrun .*) train\.py (.*)$", section, re.MULTILINE)
    assert command[1].split()[1:] == TORCHRUN[3:]
    return command[2].split()


def begun_alone(commands: list[list[str]]) -> None:
    """Runs these commands of train.py on one process, each until step 4 is done."""
    import harness.loop.step

    real = harness.loop.step.training_step

    def interrupted(step, **arguments):
        if step == 5:
            raise KeyboardInterrupt
        return real(step, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.loop.step, "training_step", interrupted)
        for command in commands:
            GlobalHydra.instance().clear()
            patch.setattr(sys, "argv", ["train.py", *command])
            with pytest.raises(KeyboardInterrupt):
                train.command()


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def predictions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """Losses, gradients, norms, ranks and predictions agree; the base is the same to the bit."""
    rows, others = rows_of(one), rows_of(two)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith("time/"):
                assert other[name] == pytest.approx(row[name], rel=10 * tolerance, abs=tolerance), (
                    name, row["step"],
                )  # fmt: skip
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    for key in ("rank_history", "base_fingerprint", "parameters", "run_key", "control_hash"):
        assert first[key] == second[key], key
    assert first["test"].keys() == second["test"].keys()
    assert second["merged_max_abs_diff"] < 1e-5
    if "forgetting" in first:
        assert second["forgetting"] == pytest.approx(first["forgetting"], abs=10 * tolerance)
    for row, other in zip(predictions_of(one), predictions_of(two), strict=True):
        assert row["row"] == other["row"] and row["split"] == other["split"]
        assert other["loss_nats"] == pytest.approx(row["loss_nats"], abs=10 * tolerance)
        assert other.get("prediction") == row.get("prediction")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every run on two processes, with both strategies: folder, common settings by kind, output."""
    folder = tmp_path_factory.mktemp("two")
    common = {
        "classes": settings(write_task(folder)),
        "language": settings(write_language_task(folder)),
        "bert": settings(write_task(folder), model="tiny"),
    }
    commands = {
        name: [*common.get(name, common["classes"]), *extra] for name, (_, extra) in RUNS.items()
    }
    # Long enough for a signal to come in between.
    lasting = ["train.steps=60", "train.eval_every=30", "train.checkpoint_every=30"]
    changed = {option.partition("=")[0] for option in lasting}
    held = [option for option in common["classes"] if option.partition("=")[0] not in changed]
    commands["long"] = [*held, "variant=adalora", *CUTS, *lasting]
    begun = {s: [*commands["adalora"], f"run_dir={folder / 'begun' / s}"] for s in BOTH}
    begun_alone([*begun.values()])
    page = command_of_the_page()
    page += [option for option in common["bert"] if option not in page]
    every = [
        *(
            [*commands[name], f"strategy={strategy}", f"run_dir={folder / strategy / name}"]
            for name, (strategies, _) in [*RUNS.items(), ("long", (DDP, []))]
            for strategy in strategies
        ),
        *([*command, f"strategy={strategy}"] for strategy, command in begun.items()),
        [*page, f"outputs_dir={folder / 'page'}"],
    ]
    (folder / "commands.json").write_text(json.dumps(every))
    script = str(ROOT / "tests/in_one_torchrun.py")
    done = torchrun(script, str(folder / "commands.json"), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, commands, done.stdout


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"bert"}))
def test_two_processes_give_the_run_of_one(two, cli, name):
    folder, commands, _ = two
    one = cli.root / "one"
    assert cli.exactly(*commands[name], f"run_dir={one}") == 0, cli.err
    if "adalora" in name:
        assert len(json.loads((one / "result.json").read_text())["rank_history"]) > 1  # ranks fell
    for strategy in RUNS[name][0]:
        assert_same_run(one, folder / strategy / name)


@pytest.mark.parametrize(
    "name", [name for name, (strategies, _) in RUNS.items() if strategies == BOTH]
)
def test_a_sharded_base_is_the_same_base(two, name):
    """Also where the base has dropout of its own, and adapters outside its blocks."""
    folder, *_ = two
    assert_same_run(folder / "ddp" / name, folder / "fsdp2" / name, tolerance=1e-6)


def test_only_the_first_process_prints_and_writes(two):
    folder, _, printed = two
    assert printed.count("dora on tiny-llama, seed 0") == 2  # runs
    environment = json.loads((folder / "fsdp2/dora/environment.json").read_text())
    assert (environment["processes"], environment["strategy"]) == (2, "fsdp2")
    left = {path.name for path in (folder / "ddp/lora").iterdir()}
    assert left >= {"adapter", "metrics.jsonl", "predictions.jsonl", "result.json", "run.json"}
    assert not {name for name in left if name.startswith(".") or name == "checkpoints"}


def test_a_checkpoint_is_continued_by_any_number_of_processes(two):
    """Begun alone, stopped after step 4, ended by two, which may shard the base."""
    folder, _, printed = two
    assert printed.count("after step 3") == 2
    for strategy in distributed.STRATEGIES:
        assert_same_run(folder / "ddp/adalora", folder / "begun" / strategy)


def test_the_command_of_the_page_runs(two):
    (result,) = two[0].glob("page/default/*/result.json")
    assert json.loads(result.read_text())["status"] == "complete"


def test_what_one_process_fails_of_ends_all_with_one_sentence(tmp_path):
    """The second process alone fails, in step 3; a wrong setting fails in all."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys\n"
        "import harness.loop.step, train\n"
        "real = harness.loop.step.training_step\n"
        "def step(number, **arguments):\n"
        "    if number == 3 and os.environ['RANK'] == '1':\n"
        "        raise ValueError('the disk is on fire.')\n"
        "    return real(number, **arguments)\n"
        "harness.loop.step.training_step = step\n"
        "arguments = [*sys.argv]\n"
        "sys.argv.append('train.batch_size=5')\n"
        "try:\n"
        "    train.command()\n"
        "except SystemExit as ended:\n"
        "    print('refused', os.environ['RANK'], ended.code)\n"
        "from hydra.core.global_hydra import GlobalHydra\n"
        "GlobalHydra.instance().clear()\n"
        "sys.argv[:] = arguments\n"
        "train.command()\n"
    )
    given = [*settings(write_task(tmp_path)), "variant=lora", f"run_dir={tmp_path / 'run'}"]
    done = torchrun(str(script), *given, cwd=tmp_path)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said[0].startswith("error: train.batch_size is 5") and said[0].endswith("number, 2.")
    assert said[1:] == ["error: the disk is on fire."]
    assert not (tmp_path / "run/result.json").exists()
    refused = sorted(line for line in done.stdout.splitlines() if line.startswith("refused"))
    assert refused == ["refused 0 1", "refused 1 1"]


@pytest.mark.parametrize("whom", ["torchrun", "1"])
def test_a_signal_ends_all_after_one_step_and_keeps_it(two, tmp_path, whom):
    """To torchrun, as a cluster sends it, or to the second process alone."""
    folder, commands, _ = two
    script = tmp_path / "saying.py"
    script.write_text(
        "import os, train\n"
        f"open('{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "train.command()\n"
    )
    parts = tmp_path / "parts"
    command = [str(script), *commands["long"], f"run_dir={parts}"]
    process = subprocess.Popen(
        [*TORCHRUN, *command], cwd=tmp_path, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (parts / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    pid = process.pid if whom == "torchrun" else int((tmp_path / whom).read_text())
    os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "ended by SIGTERM after step" in out, err[-3000:]
    (kept,) = (parts / "checkpoints").iterdir()
    assert int(kept.name.removeprefix("step-")) < 30 and not (parts / "result.json").exists()
    if whom == "torchrun":  # what is kept is the same, whoever was told
        done = torchrun(*command, cwd=tmp_path)
        assert done.returncode == 0 and "continuing" in done.stdout
        assert_same_run(folder / "ddp/long", parts, tolerance=0.0)


# ---- without processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (6, 5), (2, 7), (8, 1, 3), (310, 384)], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_parts_of_a_mask_are_the_mask(shape, parts):
    assert_parts_are_the_whole(shape, parts, torch.device("cpu"))


def assert_parts_are_the_whole(shape, parts, device):
    def mask(rows: int, index: int, of: int) -> torch.Tensor:
        size = torch.Size((rows, *shape[1:]))
        return DropoutMasks(3).keep(0.4, 11, "query", (index, of), size, device)

    pieces = [mask(shape[0] // parts, index, parts) for index in range(parts)]
    assert torch.equal(torch.cat(pieces), mask(shape[0], 0, 1))


@pytest.mark.gpu
def test_parts_of_a_mask_are_the_mask_on_a_gpu():
    assert_parts_are_the_whole((6, 1025), 3, torch.device("cuda"))


def pretend(monkeypatch, rank: int, size: int, peers: list | None = None) -> None:
    """This process is one of several; `peers` is what they all say."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    if peers is not None:
        monkeypatch.setattr(distributed, "gather", lambda value: peers)


def batch_of(labels: list) -> Batch:
    rows = torch.tensor(labels)
    ids = torch.arange(len(labels) * 3).view(len(labels), 3)
    return Batch({"input_ids": ids}, rows, tuple(range(len(labels))), n_tokens=7)


def test_a_process_has_its_rows_and_what_is_learned_in_them(monkeypatch):
    tokens = [[-100, 5, 6], [-100, -100, 6], [9, -100, 2], [-100, 4, 4]]
    counts = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        part = own_part(batch_of(tokens))
        assert part.inputs["input_ids"].tolist() == [[6 * rank + n for n in (0, 1, 2)],
                                                     [6 * rank + n for n in (3, 4, 5)]]  # fmt: skip
        assert part.n_tokens == 7
        counts.append(part.learned)
    assert counts == [3, 3]  # 9 stands first: nothing predicts it
    pretend(monkeypatch, 1, 4)
    assert own_part(batch_of(tokens)).learned == 1
    assert own_part(batch_of([0, 1, 1, 0])).learned == 1
    pretend(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="batches of 4 rows, which 3 processes cannot share"):
        own_part(batch_of(tokens))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shared_out_work_comes_back_in_order(monkeypatch, count, size):
    parts = []
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "gather", lambda value: parts.append(value) or [value] * 9)
            distributed.share_out(lambda item: item * item, range(count))
    assert len({len(part) for part in parts}) == 1  # equally often through the model
    pretend(monkeypatch, 0, size, parts)
    found = distributed.share_out(lambda item: item * item, range(count))
    assert found == [item * item for item in range(count)]


def test_disagreement_is_named(monkeypatch):
    pretend(monkeypatch, 0, 2, [{"run_key": "a", "n": 1}, {"run_key": "b", "n": 1}])
    with pytest.raises(ValueError, match="process 1 differs from the first in its run key"):
        distributed.agree(run_key="a", n=1)


def test_replicas_that_differ_are_no_result(monkeypatch):
    pretend(monkeypatch, 0, 2, ["one digest", "another"])
    with pytest.raises(laws.BrokenLaw, match="no longer hold the same adapter"):
        laws.check_replicas(nn.Linear(2, 2), {})


def test_other_processes_leave_the_folder_as_it_is(tmp_path):
    folder = ReadOnlyFolder(tmp_path / "run", "key", {})
    folder.create({})
    folder.log({"step": 1})
    folder.write_json("result.json", {})
    folder.write_lines("predictions.jsonl", [{}])
    assert not (tmp_path / "run").exists()
    RunFolder(tmp_path / "run", "key", {}).create({})
    assert folder.history(up_to=3) == [] and folder.result() is None


def test_blocks_are_the_layers_of_the_outermost_stacks():
    layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})] * 2)
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": layers})
    assert distributed.blocks(model) == list(layers)
    with pytest.raises(ValueError, match="no stack of layers in Linear; use strategy=ddp"):
        distributed.blocks(nn.Linear(2, 2))


TRAIN: dict = {"batch_size": 4, "device": "cpu", "compiled": False}


@pytest.mark.parametrize(
    ("strategy", "wrong", "message"),
    [
        ("fsdp3", {}, "strategy is fsdp3; it must be ddp or fsdp2. Did you mean fsdp2"),
        ("ddp", {"batch_size": 5}, "train.batch_size is 5, .* divisible by their number, 2"),
        ("ddp", {"device": "cuda:1"}, "under torchrun each process takes a GPU of its own"),
        ("fsdp2", {"compiled": True}, "train.compile with strategy=fsdp2 is not supported"),
    ],
)
def test_wrong_settings_are_refused(monkeypatch, strategy, wrong, message):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        distributed.begin(strategy, **{**TRAIN, **wrong})


def test_a_shard_needs_processes():
    with pytest.raises(ValueError, match="start them with torchrun"):
        distributed.begin("fsdp2", **TRAIN)


def test_floats_survive_being_gathered():
    assert math.isnan(json.loads(json.dumps(float("nan"))))
    numbers = torch.randn(100).tolist()
    assert json.loads(json.dumps(numbers)) == numbers


def test_torchrun_refuses_a_multirun(cli, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cli.exactly("-m", "variant=lora", "seed=0,1") == 1
    assert "torchrun shares one run; start a multirun with python." in cli.err


# ---- a cluster -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_by_submitits_local_executor(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = [*settings(write_task(tmp_path)), "outputs_dir=outputs"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=submitit_local",
         "variant=lora,dora", "hydra.sweep.dir=outputs/submitit", *given],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    results = sorted(tmp_path.glob("outputs/*/*/result.json"))
    assert [json.loads(path.read_text())["variant"] for path in results] == ["dora", "lora"]
