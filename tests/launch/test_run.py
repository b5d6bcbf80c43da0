"""Short runs with real launchers and two workers, and what is left of them."""

import contextlib
import json
import os
import pty
import re
import shlex
import subprocess
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from syncnorm.run.ending import read_exit
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tests.launch.record import run_folder
from tests.train.runs import events

ROOT = Path(__file__).parents[2]
SHORT = ["train.epochs=1", "train.global_batch=128"]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, CompletedProcess[str]]:
    """`syncnorm train digits` in an empty folder."""
    folder = tmp_path_factory.mktemp("local")
    return folder, commands.run([*commands.SYNCNORM, "train", "digits", *SHORT], folder)


def test_the_last_two_lines_are_accuracy_and_folder(local):
    folder, done = local
    run = run_folder(folder, done)
    assert run.parent == folder / "runs"
    assert run.name.startswith("digits-")
    (epoch,) = events(run, "epoch")
    assert done.stdout.splitlines()[-2] == f"test accuracy {100 * epoch['test_accuracy']:.2f} %"
    assert epoch["test_accuracy"] > 0.5


def test_standard_error_says_what_is_trained_then_a_line_per_epoch(local):
    folder, done = local
    run = run_folder(folder, done).relative_to(folder)
    *header, epoch, last = done.stderr.splitlines()
    assert header == [
        "2 workers on cpu",
        "model: digits_resnet, 77754 parameters trained, 9 layers of syncnorm's",
        "data: 1437 training and 360 test images of 1x8x8 of 10 classes, 12 steps per epoch",
        f"folder: {run}",
    ]
    assert epoch.startswith("epoch 1/1  step 12  loss ")
    assert last == f"To see it: syncnorm report {run}"


def test_the_run_folder(local):
    run = run_folder(*local)
    names = {"config.yaml", "metrics.jsonl", "checkpoints", "exit.json", "logs", "run.lock"}
    assert {path.name for path in run.iterdir()} == names
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert load_config(str(run / "config.yaml")) == load_config("digits", SHORT)
    (epoch,) = events(run, "epoch")
    assert json.loads((run / "exit.json").read_text()) == {
        "status": "done",
        "reason": "all epochs done",
        "step": 12,
        "exit_code": 0,
        "metrics": {"test": {"accuracy": epoch["test_accuracy"], "loss": epoch["test_loss"]}},
    }
    snapshot, _, _ = CheckpointStore(run / "checkpoints").newest()
    assert snapshot is not None
    assert snapshot.step == len(events(run, "step")) == 12


def test_both_workers_have_the_same_running_statistics(local):
    (end,) = events(run_folder(*local), "end")
    first, second = end["digests"]
    assert first == second
    assert len(first) == 64
    line = f"running statistics: equal on 2 workers, sha256 {first[:16]}"
    assert line in local[1].stdout.splitlines()


def test_local_statistics_are_different_ones(local, tmp_path):
    command = [*commands.SYNCNORM, "train", "digits", *SHORT, "norm.sync=none"]
    done = commands.run(command, tmp_path)
    (end,), (pooled,) = (events(run_folder(*run), "end") for run in ((tmp_path, done), local))
    first, second = end["digests"]
    assert first != second
    assert {first, second}.isdisjoint(pooled["digests"])
    assert "running statistics: different on 2 of 2 workers" in done.stdout
    assert "each worker judged its share of the samples by its own" in done.stdout


def test_on_a_terminal_there_is_a_bar_with_figures(tmp_path):
    terminal, end = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "160"}
    command = [
        *commands.SYNCNORM,
        "train",
        "digits",
        "train.epochs=3",
        "follow.every=5",
        "launch.workers=1",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **environment}, stdout=end, stderr=end
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(terminal, 65536):
            shown += piece
    assert process.wait(commands.DEADLINE_SECONDS) == 0
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(
        r"training .*\d+/69 steps loss \d\.\d{4}  \d+ samples/s ",
        text,
    )
    assert "exchanging" not in text, "there is nobody to exchange with"
    assert "epoch 3/3  step 69  loss" in text


def test_a_full_disk_ends_the_save_and_not_the_run(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(runs)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        options = [
            "train.epochs=6",
            "train.global_batch=500",
            "launch.workers=1",
            "checkpoint.best=false",
        ]
        done = commands.run([*commands.SYNCNORM, "train", "digits", *options], tmp_path)
        (run,) = runs.iterdir()
        saved = [event["step"] for event in events(run, "checkpoint")]
        faults = events(run, "fault")
        names = [path.name for path in (run / "checkpoints").glob("step-*")]
        note = json.loads((run / "exit.json").read_text())
        losses = events(run, "step")
    finally:
        subprocess.run(["umount", str(runs)], check=True)
    # Two checkpoints fit, a third beside them does not; only that the last state is not saved fails
    # the run.
    assert saved == [3, 6]
    assert names
    assert set(names) <= {"step-00000003", "step-00000006"}
    assert faults
    assert all("No space left on device" in fault["message"] for fault in faults)
    assert len(losses) == 18
    assert done.returncode == 1
    assert note["status"] == "failed"
    assert "the state after step 18 could not be saved" in note["reason"]


def test_a_callable_needs_permission(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from syncnorm.train.models import MODELS\n"
        "def net(*, width, **kwargs):\n"
        "    print('width', width)\n"
        "    return MODELS['digits_resnet'](**kwargs)\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "model: {name: 'mine:net', options: {width: 7}}\ndata: {name: digits}\n"
        "train: {epochs: 1, global_batch: 500, lr: 0.1}\n"
    )
    monkeypatch.chdir(tmp_path)
    called = commands.call(capsys, "train", "mine.yaml")
    assert called.status == 2
    err = called.err
    assert "`model.name`" in err
    assert "--allow mine" in err
    assert not (tmp_path / "runs").exists()
    done = commands.run([*commands.SYNCNORM, "train", "mine.yaml", "--allow", "mine"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("width 7") == 1, "once on its worker"


def test_a_dry_run_takes_one_step_and_leaves_nothing(tmp_path):
    options = ["launch.workers=3", "train.norm_batch=32", "launch.micro_batch=32"]
    done = commands.run([*commands.SYNCNORM, "train", "digits", "--dry-run", *options], tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["model"] == "digits_resnet, 77754 parameters trained, 9 layers of syncnorm's"
    # Two statistics cannot be shared out among three workers: all pool both.
    expected = "64 samples on 3 worker(s); worker 0 has 1 forward(s), of 11 + 11 samples; each statistic is shared by 3"
    assert lines["step"].startswith(expected)
    # Each has the size of the widest layer's: 2 * 64 + 2 numbers.
    assert lines["messages of moments"].startswith("18, of 18.28 KiB in all")
    assert lines["messages of all moments"].startswith("1, of ")


def test_a_step_that_does_not_fit_is_refused_with_its_figures(tmp_path):
    """More than a process takes with torch's build for CUDA, less than AdamW needs besides."""
    options = ["launch.workers=1", "model.name=resnet18_cifar", "launch.memory_gib=0.45"]
    options += ["train.optimizer.name=AdamW", "train.optimizer.momentum=null"]
    done = commands.run([*commands.SYNCNORM, "train", "digits", *options], tmp_path)
    assert done.returncode == 2
    message = (
        r"1 worker on cpu\n"
        r"syncnorm: `launch.micro_batch` must be such that a step fits into memory, got one that "
        r"needs \d+.\d\d MiB: "
        r"\d\d\d.\d\d MiB for the process with its data, 170.48 MiB for parameters, gradients and "
        r"optimizer, and "
        r"64 samples in a forward of \d+.\d\d KiB each. Worker 0 has 460.80 MiB. "
        r"Take fewer workers, a smaller model or more memory.\n"
    )
    assert re.fullmatch(message, done.stderr), done.stderr
    assert not list((tmp_path / "runs").iterdir())


MEDDLES = """
import os
import shutil
from pathlib import Path
from syncnorm.train.data.builtin import digits

def data(root):
    (run,) = Path("mine").iterdir()
    shutil.rmtree(run / "logs")
    (run / "profile").touch()
    os.chdir("elsewhere")
    return digits(None)
"""


def test_a_program_that_leaves_its_folder_and_takes_logs_away_loses_no_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "meddles.py").write_text(MEDDLES)
    options = ["data.name=meddles:data", "run_dir=mine", "launch.workers=1", "follow.profile=2"]
    command = [*commands.SYNCNORM, "train", "digits", *SHORT, *options, "--allow", "meddles"]
    done = commands.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the profile could not be written" in done.stderr
    (run,) = (tmp_path / "mine").iterdir()
    assert read_exit(run).status == "done"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (run / "checkpoints" / "step-00000012").exists()
    assert done.stdout.splitlines()[-1] == f"mine/{run.name}"


def test_a_run_needs_no_standard_streams(tmp_path):
    """As under some daemons, whose first files would take the streams' numbers."""
    command = shlex.join([*commands.SYNCNORM, "train", "digits", *SHORT, "run_dir=runs"])
    subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=tmp_path, check=True)
    (run,) = (tmp_path / "runs").iterdir()
    assert read_exit(run).status == "done"
    assert "accuracy" in json.loads((run / "exit.json").read_text())["metrics"]["test"]


ENDS = """
import os
import sys
from syncnorm.train.models import MODELS

def net(ending, **kwargs):
    model, calls = MODELS["digits_resnet"](**kwargs), []
    def end(*_):
        calls.append(1)
        if len(calls) > 3:
            exec(ending)
    model.register_forward_pre_hook(end)
    return model
"""
ENDED_BY = "worker 0 failed: RuntimeError: the worker's program was ended by"


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("sys.exit(0)", f"{ENDED_BY} SystemExit(0)"),
        (
            "raise KeyboardInterrupt",
            f"{ENDED_BY} KeyboardInterrupt()",
        ),
        ("os._exit(0)", "the workers ended with status 0 before the run was done"),
    ],
)
def test_a_worker_that_ends_with_status_0_has_failed(tmp_path, ending, reason):
    (tmp_path / "mine.py").write_text(ENDS)
    options = ["model.name=mine:net", f"model.options.ending={ending}", "launch.workers=1"]
    command = [*commands.SYNCNORM, "train", "digits", *SHORT, *options, "--allow", "mine"]
    done = commands.run(command, tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"syncnorm: {reason}" in done.stderr.splitlines()
    (run,) = (tmp_path / "runs").iterdir()
    end = read_exit(run)
    assert end is not None
    assert (end.status, end.reason, end.exit_code) == ("failed", reason, 1)


@pytest.mark.parametrize("arguments", [["--version"], ["config", "show", "digits"], ["doctor"]])
def test_output_that_has_no_room_is_one_line(tmp_path, arguments):
    command = f"{shlex.join([*commands.SYNCNORM, *arguments])} > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "syncnorm: what it writes has no room: No space left on device\n"


def test_a_run_that_is_done_leaves_its_page(tmp_path):
    pytest.importorskip("matplotlib")
    command = [*commands.SYNCNORM, "train", "digits", *SHORT, "launch.workers=1"]
    done = commands.run(command, tmp_path, {"SYNCNORM_REPORT": "1"})
    page = run_folder(tmp_path, done) / "report.html"
    assert "Predictions" in page.read_text()
    assert done.stderr.splitlines()[-1] == f"To see it: {page.relative_to(tmp_path)}"


@pytest.mark.parametrize(
    "reader",
    [
        "| true",
        "2>&1 | head -n 4",
        "> /dev/full 2>&1",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("2>&1 | head -n 1", "> /dev/full")
        ),
    ],
)
def test_a_run_goes_on_where_nobody_reads_what_it_says(tmp_path, reader):
    """Its result is in its folder."""
    options = shlex.join([*SHORT, "launch.workers=1", "train.epochs=3"])
    command = f"set -o pipefail; {shlex.join(commands.SYNCNORM)} train digits {options} {reader}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done
    (run,) = (tmp_path / "runs").iterdir()
    end = read_exit(run)
    assert end is not None
    assert (end.status, end.step) == ("done", 36)
