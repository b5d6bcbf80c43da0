"""The command before it is up, and Ctrl-C from the first import on: one status, and not a word too
many.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from syncnorm import __version__
from tests.launch import commands

# Read by Python at its start. As long as its parent lives, it stands still where MODULE is about to
# be imported, in a process whose command has MARK;
AT_IMPORT = """
import os, sys, time

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["MODULE"] and os.environ["MARK"] in " ".join(sys.orig_argv):
            parent = os.getppid()
            os.write(1, b"here\\n")
            while os.getppid() == parent:
                time.sleep(0.01)

sys.meta_path.insert(0, Stop())
"""
# or where a process of our launcher has become a worker.
AT_BIRTH = """
import os, sys, time

def stop(event, arguments):
    if event == "os.putenv" and arguments[0] == b"RANK":
        os.write(1, b"here\\n")
        time.sleep(1000)

sys.addaudithook(stop)
"""


def interrupted(
    command: list[str], folder: Path, stands_still: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Ctrl-C as a terminal sends it, to all processes, when one of them stands still."""
    hooks = folder / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(stands_still)
    path = os.pathsep.join([str(hooks), *filter(None, [os.environ.get("PYTHONPATH")])])
    with commands.started(command, folder, {**environment, "PYTHONPATH": path}) as process:
        assert process.stdout.readline() == "here\n"
        os.killpg(process.pid, signal.SIGINT)
        # The pipes close when the last process is gone.
        out, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def in_the_shell(status: int) -> int:
    return 128 - status if status < 0 else status


DRY = ["train", "digits", "--dry-run"]


@pytest.mark.parametrize(
    ("arguments", "module", "mark"),
    [
        (["train", "digits"], "syncnorm.cli", ""),
        (["train", "digits"], "torch.nn", ""),
        (["train", "digits"], "torch._dynamo", ""),
        (DRY, "torch._dynamo", ""),
        (["verify"], "torch.nn", "forkserver"),
        (["report", "run"], "syncnorm.train.report", ""),
        (["submit", "digits"], "ray.job_submission", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_command_ends_quietly(tmp_path, arguments, module, mark):
    if arguments[0] == "submit":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")
    command = [*commands.SYNCNORM, *arguments]
    done = interrupted(command, tmp_path, AT_IMPORT, MODULE=module, MARK=mark)
    assert in_the_shell(done.returncode) == 130
    assert done.stderr == ""
    assert not (tmp_path / "runs").exists()


def test_a_run_that_has_not_begun_ends_in_one_line_and_on_record(tmp_path):
    command = [*commands.SYNCNORM, "train", "digits", "launch.workers=1"]
    done = interrupted(command, tmp_path, AT_BIRTH)
    assert in_the_shell(done.returncode) == 130
    (run,) = (tmp_path / "runs").iterdir()
    assert done.stderr.splitlines() == [
        "1 worker on cpu",
        "syncnorm: stopped by SIGINT, without saving",
        str(run.relative_to(tmp_path)),
    ]
    assert json.loads((run / "exit.json").read_text())["exit_code"] == 130


def test_workers_of_torchrun_say_nothing(tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "train", "digits"]
    done = interrupted(command, tmp_path, AT_IMPORT, MODULE="torch.nn", MARK="-u -m syncnorm")
    # torchrun itself tells that it was interrupted, with its own traceback.
    assert "KeyboardInterrupt" not in done.stderr
    assert "syncnorm/" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--help"], "typer"),
        (["config", "show", "digits"], "yaml"),
        (["verify"], "pydantic"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_bare_install_names_the_extra(tmp_path, arguments, missing):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    path = os.pathsep.join([str(hooks), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = commands.run([*commands.SYNCNORM, *arguments], tmp_path, {"PYTHONPATH": path})
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == (
        "",
        f"syncnorm: the command needs {missing}, which is missing: pip install 'syncnorm[train]'\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-V"], ["train", "--help"]],
    ids=" ".join,
)
def test_what_needs_no_tensor_starts_without_torch(arguments):
    code = (
        "import sys; from syncnorm.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = commands.run([sys.executable, "-c", code, *arguments], Path.cwd())
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_looking_at_jobs_needs_no_torch():
    pytest.importorskip("ray")
    code = "import sys, syncnorm.run.ray.submit; sys.exit('torch' in sys.modules)"
    done = commands.run([sys.executable, "-c", code], Path.cwd())
    assert done.returncode == 0, done.stderr


def test_the_version():
    done = commands.run([*commands.SYNCNORM, "--version"], Path.cwd())
    assert (done.returncode, done.stdout) == (0, f"syncnorm {__version__}\n")
