"""Nothing that has changed is passed over: files that a run has read, lines of an archive, tokens
in a shared cache, folders on file systems without locks."""

import dataclasses
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command import CommandLine
from made_study import made_study
from test_models import checkpoint
from test_tasks import byte_tokenizer, small_task

from harness.compare.rows import read_rows, row
from harness.disk import cache, inputs, locks
from harness.loop.folder import RunFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def rewrite(path: Path, change) -> None:
    """Change a file's content, and neither its size nor its times."""
    times, content = path.stat(), path.read_bytes()
    changed = change(content)
    assert changed != content and len(changed) == len(content)
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


# ---- what a run has read -------------------------------------------------------------------------


def test_every_file_that_a_run_read_is_noticed(cli, tmp_path):
    """Labels, weights, configuration, tokenizer, the adapter it starts from; and nothing else."""
    base = tmp_path / "base"
    tiny = ["train.steps=2", "train.eval_every=2", "model=hf", f"model.name={checkpoint(base)}"]
    (base / "notes.md").write_text("read by nobody")
    assert cli(*tiny, f"run_dir={tmp_path / 'first'}") == 0, cli.err
    assert cli(*tiny, f"init_from={tmp_path / 'first'}") == 0, cli.err
    (folder,) = (path.parent for path in (tmp_path / "outputs").rglob("run.json"))
    read = json.loads((folder / "run.json").read_text())["inputs"]
    adapter = tmp_path / "first/adapter"
    files = [*(tmp_path / "data").iterdir(), *base.glob("*.json"), base / "model.safetensors",
             *adapter.iterdir()]  # fmt: skip
    assert {Path(name) for name in read["files"]} == {*files, base, adapter}
    assert inputs.changed(read) is None and inputs.changed_file(read, times=False) is None
    for file in files:
        before = file.read_bytes()
        os.utime(file, (1, 1))  # as a checkout sets it
        assert inputs.changed(read) is None, file
        rewrite(file, flipped)
        assert inputs.changed(read) == inputs.changed_file(read, times=False) == str(file)
        file.write_bytes(before)
        file.rename(file.with_suffix(".away"))
        assert inputs.changed(read) in (str(file), str(file.parent)), file
        file.with_suffix(".away").rename(file)
    (base / "notes.md").write_text("still")
    assert inputs.changed(read) is None
    (base / "chat_template.jinja").write_text("a new file, which would be read")
    assert inputs.changed(read) == str(base)


def test_code_and_packages_that_read_data_are_inputs_too(monkeypatch):
    read = inputs.record([])
    assert inputs.changed(read) is None
    for name, value in (("code_of_readers", "0"), ("_packages", {"transformers": "0"})):
        with monkeypatch.context() as patch:
            patch.setattr(inputs, name, lambda value=value: value)
            assert inputs.changed(read) == "the code that reads data and base"
            assert inputs.changed_file(read) is None  # which a study does not go by
    for unknown in (None, {}, [], {"files": 3}, {**read, "files": {"x": {}}}):
        assert inputs.changed(unknown)


@pytest.mark.skipif(sys.platform != "linux", reason="starts processes in Linux's way")
def test_a_multirun_does_not_pass_over_a_run_on_other_labels(cli, tmp_path):
    """From the command line, after an edit that neither size nor times of the file show."""
    assert cli("variant=lora") == 0, cli.err
    rewrite(tmp_path / "data/train.csv", lambda text: text.replace(b",good", b",bad ", 1))
    launcher = ["hydra/launcher=processes", "hydra.launcher.preload=[]"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *cli.defaults, *launcher]
    done = subprocess.run(
        [*command, "variant=lora"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "1 failed" in said and "the data changed since" in said, said


def test_a_run_that_stands_on_rewritten_files_says_so_once(cli, tmp_path):
    """Other bytes, the same rows: the result stands, and launchers need not ask again."""
    assert cli("variant=lora") == 0, cli.err
    file = tmp_path / "data/train.csv"
    file.write_text(file.read_text() + "\n")  # a blank line
    marker = cli.folders()[0] / "run.json"
    before = json.loads(marker.read_text())
    assert inputs.changed(before["inputs"]) == str(file)
    assert cli("variant=lora") == 0 and "complete already" in cli.out
    after = json.loads(marker.read_text())
    assert inputs.changed(after.pop("inputs")) is None
    assert after == {key: value for key, value in before.items() if key != "inputs"}


# ---- archives ------------------------------------------------------------------------------------


def test_two_results_of_one_run_in_an_archive_are_refused(tmp_path):
    study, file = made_study(), tmp_path / "runs.jsonl"
    run = study.runs[3]
    lines = [row(r) for r in study.runs]
    file.write_text("\n".join([*lines, lines[3]]))  # the same line twice says nothing else
    assert len(read_rows(file)) == len(lines)
    better = {**run.result, "validation": {**run.result["validation"], "accuracy": 0.99}}
    file.write_text("\n".join([*lines, row(dataclasses.replace(run, result=better))]))
    with pytest.raises(ValueError, match=rf"lines 4 and {len(lines) + 1} are two results of one"):
        read_rows(file)


# ---- a shared cache ------------------------------------------------------------------------------


def tokens(task) -> dict:
    task.prepare(byte_tokenizer(), 40)
    return task._tokens


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path / "cache"))
    tokens(small_task())
    (file,) = (tmp_path / "cache").iterdir()
    return file


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_cached_file_that_others_may_write_is_not_believed(kept, mode):
    assert cache.read(kept) is not None and not kept.stat().st_mode & 0o077
    kept.chmod(mode)
    assert cache.read(kept) is None
    tokens(small_task())
    assert not kept.stat().st_mode & 0o077 and cache.read(kept)  # made anew


def test_a_cached_file_of_another_owner_or_behind_a_link_is_not_believed(kept, monkeypatch):
    link = kept.with_name("link")
    link.symlink_to(kept)
    assert cache.read(link) is None and cache.read(kept.parent) is None
    monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
    assert cache.read(kept) is None


def test_a_cached_file_stands_for_its_own_key_alone(kept):
    """One whole file under the name of another: other data, cut elsewhere."""
    other = small_task(train=50)
    expected = tokens(other)
    (second,) = set(kept.parent.iterdir()) - {kept}
    shutil.copyfile(kept, second)
    again = small_task(train=50)
    assert tokens(again) == expected != tokens(small_task())


def test_a_link_in_the_place_of_a_temporary_file_leads_nowhere(kept, tmp_path):
    """Another user of the folder knows the names that a process number makes."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (f".{kept.name}.{os.getpid()}", kept.name):
        (kept.parent / name).unlink(missing_ok=True)
        (kept.parent / name).symlink_to(precious)
    tokens(small_task())
    assert precious.read_text() == "mine" and cache.read(kept)


@pytest.mark.parametrize(
    ("name", "value"),
    [("truncation_side", "left"), ("split_special_tokens", True), ("chat_template", "{{ x }}"),
     ("model_input_names", ["input_ids"]), ("eos_token", "a")],
)  # fmt: skip
def test_tokens_are_kept_for_one_setting_of_the_tokenizer(name, value):
    from harness.tasks.token_cache import cache_key

    tokenizer = byte_tokenizer()
    before = cache_key("data", tokenizer, 40)
    assert before == cache_key("data", byte_tokenizer(), 40)
    setattr(tokenizer, name, value)
    assert cache_key("data", tokenizer, 40) != before


# ---- without locks -------------------------------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch):
    """As some network file systems: flock fails."""
    if locks.fcntl is None:
        pytest.skip("there are none here anyway")

    def flock(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)


def test_a_folder_has_one_writer_where_there_are_no_locks(no_locks, tmp_path):
    first, second = (RunFolder(tmp_path / "run", "key", {}) for _ in range(2))
    first.create({})
    busy = locks.taken_by(tmp_path / "run")
    assert f"if it has ended, delete {tmp_path / 'run' / '.lock'}" in busy
    with pytest.raises(locks.Busy, match=r"process \d+ on .* made \.lock there, and this file sys"):
        second.create({})
    del first
    assert not locks.taken_by(tmp_path / "run")
    second.create({})
    second.write_json("result.json", {"status": "failed", "reason": "x"})
    del second
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "result.json"}
    RunFolder(tmp_path / "run", "key", {}, force=True).create({})


def test_the_lock_of_a_process_that_was_killed_is_taken_over_on_its_own_host(no_locks, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = os.uname().nodename
    (tmp_path / ".lock").write_text(f"{ended.pid} {host}")
    assert not locks.taken_by(tmp_path)
    release = locks.take(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {host}"
    release()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock").write_text(f"{ended.pid} another{host}")
    with pytest.raises(locks.Busy, match=r"if it has ended, delete /.*/\.lock\.$"):
        locks.take(tmp_path)
    folder = RunFolder(tmp_path, "key", {})  # killed before it wrote its first file: still ours
    (tmp_path / ".lock").unlink()
    folder.create({})


# ---- with locks ----------------------------------------------------------------------------------


@pytest.fixture
def locked_elsewhere(monkeypatch):
    """As NFS: locks on files reach other hosts, those on folders do not."""
    if locks.fcntl is None:
        pytest.skip("there are none here")
    real = locks.fcntl.flock

    def flock(descriptor, kind):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        real(descriptor, kind)

    monkeypatch.setattr(locks.fcntl, "flock", flock)


def test_a_lock_is_on_a_file_and_names_its_holder(locked_elsewhere, tmp_path):
    release = locks.take(tmp_path)
    me = f"process {os.getpid()} on {os.uname().nodename}"
    with pytest.raises(locks.Busy, match=f"another process is running in {tmp_path}: {me}"):
        locks.take(tmp_path)
    assert locks.taken_by(tmp_path).endswith(me)
    release()
    assert not locks.taken_by(tmp_path) and not list(tmp_path.iterdir())
    locks.take(tmp_path)()


def test_a_signature_that_a_killed_process_left_locks_nothing(tmp_path):
    """Locks alone decide, if there are any, whichever host the file is from."""
    (tmp_path / ".lock").write_text("1 elsewhere")
    assert not locks.taken_by(tmp_path)
    locks.take(tmp_path)()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "\x1b[2J 1", "1 a b", "x y", "1 " + "h" * 1000])
def test_a_signature_that_is_none_is_somebodys(no_locks, tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    assert locks.taken_by(tmp_path).startswith(
        f"another process is running in {tmp_path}: somebody"
    )


def test_a_lock_of_a_folder_that_was_moved_is_not_taken_from_its_successor(tmp_path):
    (tmp_path / "a").mkdir()
    release = locks.take(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    second = locks.take(tmp_path / "a")
    release()
    assert locks.taken_by(tmp_path / "a")
    second()


def test_a_folder_with_a_link_or_a_pipe_for_a_lock_is_not_waited_for(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.lock").symlink_to(other)
    with pytest.raises(OSError, match=r"\.lock"):
        locks.take(tmp_path / "linked")
    assert other.read_text() == "mine"
