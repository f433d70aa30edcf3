"""Processes that are started anew and processes that are forked from a template: no difference."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.machine import processes
from harness.machine.processes import LINUX, Template, exit_reason

pytestmark = pytest.mark.skipif(not LINUX, reason="templates are for Linux")


def test_how_a_process_ended_is_said():
    assert exit_reason(3) == "exit code 3"
    assert exit_reason(-9) == "killed by signal 9 (SIGKILL), perhaps out of memory"
    assert exit_reason(-11) == "killed by signal 11 (SIGSEGV)"


class Runner:
    """Runs a script to its end; `log` has what it printed."""

    def __init__(self, template: Template, folder: Path):
        self.template, self.script, self.log = template, folder / "job.py", folder / "log"

    def start(self, script: str, *arguments: str, **environment: str) -> processes.Process:
        self.script.write_text(script)
        self.log.write_text("head\n")
        command = [sys.executable, str(self.script), *arguments]
        return self.template.start(command, environment, self.log)

    def __call__(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        code = self.start(script, *arguments, **environment).wait()
        return code, self.log.read_text().removeprefix("head\n")


@pytest.fixture(params=["anew", "forked"])
def run(request, tmp_path):
    with Template(["this", "colorsys"] if request.param == "forked" else []) as template:
        yield Runner(template, tmp_path)


def test_a_job_gets_its_arguments_its_variables_and_a_session_of_its_own(run, monkeypatch):
    monkeypatch.chdir(run.script.parent)
    script = """
import os, sys
print(sys.argv[1:], __name__, os.environ["A"], os.environ["PYTHONUNBUFFERED"], os.getcwd())
print(os.getsid(0) == os.getpid() == os.getpgid(0), os.getppid(), repr(sys.stdin.read()))
print("colorsys" in sys.modules, sys.path[0])
print("to stderr", file=sys.stderr)
"""
    code, printed = run(script, "a=b c", "", A="1")
    forked = run.template.modules != []
    lines = printed.splitlines()
    assert (code, lines[3]) == (0, "to stderr")
    assert lines[0] == f"['a=b c', ''] __main__ 1 1 {os.getcwd()}"
    assert lines[1] == f"True {os.getpid()} ''"
    assert lines[2].startswith(str(forked))


def test_a_module_is_run_as_python_would(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_module_of_mine.py").write_text("import sys; print(__name__, sys.argv[1:])")
    command = [sys.executable, "-m", "a_module_of_mine", "x"]
    run.log.touch()
    with Template(run.template.modules) as template:  # knows the path
        environment = {"PYTHONPATH": str(tmp_path)}
        assert template.start(command, environment, run.log).wait() == 0
    assert run.log.read_text() == "__main__ ['x']\n"


@pytest.mark.parametrize(
    ("script", "code", "printed"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a word')", 1, "a word\n"),
        ("import os; os.kill(os.getpid(), 11)", -11, ""),
        ("import atexit; atexit.register(print, 'at exit'); print('first')", 0, "first\nat exit\n"),
        ("import threading as t; t.Timer(0.2, print, ['later']).start()", 0, "later\n"),
        ("print('no newline', end=''); import os; os._exit(3)", 3, "no newline"),
    ],
)
def test_an_end_is_an_end(run, script, code, printed):
    assert run(script) == (code, printed)


def test_an_exception_ends_with_its_traceback(run):
    code, printed = run("def f():\n    raise KeyError('lost')\nf()")
    assert code == 1
    assert printed.endswith("in f\n    raise KeyError('lost')\nKeyError: 'lost'\n")


def test_an_end_is_seen_without_waiting(run):
    process = run.start("import time; time.sleep(600)")
    assert process.poll() is None and process.returncode is None
    processes.signal_group(process, "SIGTERM")
    assert process.wait() == process.poll() == process.returncode == -signal.SIGTERM
    processes.signal_group(process, "SIGTERM")  # no error


def test_jobs_of_one_template_share_nothing_that_they_change(tmp_path):
    script = "import colorsys; print(hasattr(colorsys, 'mark')); colorsys.mark = 1"
    with Template(["colorsys"]) as template:
        run = Runner(template, tmp_path)
        assert run(script) == run(script) == (0, "False\n")


def test_many_at_a_time(tmp_path):
    with Template(["colorsys"]) as template:
        runs = []
        for number in range(8):
            (folder := tmp_path / str(number)).mkdir()
            run = Runner(template, folder)
            script = f"import time, sys; time.sleep(0.5); print({number}); sys.exit({number})"
            runs.append((run, run.start(script)))
        assert [process.poll() for _, process in runs] == [None] * 8
        assert [process.wait() for _, process in runs] == [*range(8)]
        assert [run.log.read_text() for run, _ in runs] == [f"head\n{n}\n" for n in range(8)]


@pytest.mark.parametrize("broken", ["no module", "killed", "killed later", "not python"])
def test_without_its_template_a_job_is_started_anew(tmp_path, broken):
    modules = ["no_such_module_anywhere"] if broken == "no module" else ["colorsys"]
    with Template(modules) as template:
        run = Runner(template, tmp_path)
        if broken == "killed later":
            assert run("print(1)") == (0, "1\n")
        if broken.startswith("killed"):
            template._process.kill()
        if broken == "not python":
            run.log.touch()
            process = template.start(["sh", "-c", "echo 1; exit 4"], {}, run.log)
            assert isinstance(process, subprocess.Popen) and process.wait() == 4
        else:
            assert run("import sys; print('colorsys' in sys.modules)") == (0, "False\n")


def test_the_end_of_the_template_is_waited_for(tmp_path):
    with Template(["colorsys"]) as template:
        process = Runner(template, tmp_path).start("import time; time.sleep(600)")
        inner = template._process
    assert inner.returncode == 0
    assert process.poll() is None  # a job is the pool's, not the template's
    processes.signal_group(process, "SIGKILL")
    assert process.wait() == -signal.SIGKILL
