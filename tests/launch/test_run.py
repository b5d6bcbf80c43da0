"""Short runs with real launchers and two workers, and what is left of them."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tests.train.runs import events

ROOT = Path(__file__).parents[2]
SHORT = ["train.epochs=1", "train.global_batch=128"]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, CompletedProcess[str]]:
    """`syncnorm train digits` in an empty folder."""
    folder = tmp_path_factory.mktemp("local")
    return folder, commands.run([*commands.SYNCNORM, "train", "digits", *SHORT], folder)


def run_folder(folder: Path, done: CompletedProcess[str]) -> Path:
    """The run's folder, as the last line names it."""
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def digests(done: CompletedProcess[str]) -> list[str]:
    return [line.split()[-1] for line in done.stdout.splitlines() if "sha256" in line]


def test_the_last_two_lines_are_accuracy_and_folder(local):
    folder, done = local
    run = run_folder(folder, done)
    assert run.parent == folder / "runs"
    assert run.name.startswith("digits-")
    (epoch,) = events(run, "epoch")
    assert done.stdout.splitlines()[-2] == f"test accuracy {100 * epoch['test_accuracy']:.2f} %"
    assert epoch["test_accuracy"] > 0.5


def test_progress_is_a_line_per_epoch_on_standard_error(local):
    _, done = local
    (line,) = done.stderr.splitlines()
    assert line.startswith("epoch 1/1  step 12  loss ")


def test_the_run_folder(local):
    run = run_folder(*local)
    names = {"config.yaml", "metrics.jsonl", "checkpoints", "exit.json", "logs", "run.lock"}
    assert {path.name for path in run.iterdir()} == names
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert load_config(str(run / "config.yaml")) == load_config("digits", SHORT)
    assert json.loads((run / "exit.json").read_text()) == {
        "status": "done",
        "reason": "all epochs done",
        "step": 12,
        "exit_code": 0,
    }
    snapshot, _, _ = CheckpointStore(run / "checkpoints").newest()
    assert snapshot is not None
    assert snapshot.step == len(events(run, "step")) == 12


def test_both_workers_have_the_same_running_statistics(local):
    _, done = local
    first, second = digests(done)
    assert first == second
    assert len(first) == 64
    assert "running statistics: equal on all 2 workers" in done.stdout


def test_torchrun_gives_the_same_run(local, tmp_path):
    command = [
        *commands.TORCHRUN,
        str(ROOT / "launch" / "torchrun.py"),
        str(ROOT / "configs" / "digits.yaml"),
        *SHORT,
    ]
    done = commands.run(command, tmp_path)
    ours, theirs = (events(run_folder(*run), "step") for run in (local, (tmp_path, done)))
    assert ours == theirs
    assert digests(done) == digests(local[1])
    exit_note = json.loads((run_folder(tmp_path, done) / "exit.json").read_text())
    assert (exit_note["status"], exit_note["step"]) == ("done", 12)


def test_torchrun_on_the_module_and_local_statistics(local, tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "train", "digits", *SHORT, "norm.sync=none"]
    done = commands.run(command, tmp_path)
    run_folder(tmp_path, done)
    first, second = digests(done)
    assert first != second
    assert {first, second}.isdisjoint(digests(local[1]))
    assert "running statistics: different on 2 of 2 workers" in done.stdout
    assert "each worker judged its share of the test set by its own" in done.stdout


# The network of the packed configuration, built in a worker whose optimizer takes other steps.
OTHER_STEPS = """
import gc, os, time
import torch
from syncnorm.train.models import MODELS

take = torch.optim.SGD.step

def step(self, closure=None):
    if len(self.param_groups[0]["params"]) > 1:  # the network's, not a trial
        with_a_network()
    return take(self, closure)

def net(**kwargs):
    torch.optim.SGD.step = step
    return MODELS["digits_resnet"](**kwargs)

def with_a_network():
"""
WITH_OTHER_STEPS = ["model.name=other_steps:net", "--allow", "other_steps"]


def write_other_steps(folder: Path, *lines: str) -> None:
    (folder / "other_steps.py").write_text(OTHER_STEPS + "".join(f"    {line}\n" for line in lines))


def test_a_failing_worker_is_named_once_with_its_own_cause(tmp_path):
    # Worker 1 fails in its first step, worker 0 then loses its peer.
    write_other_steps(
        tmp_path,
        "if os.environ['RANK'] == '1':",
        "    raise RuntimeError('no step on rank ' + os.environ['RANK'])",
    )
    command = [*commands.SYNCNORM, "train", "digits", *SHORT, *WITH_OTHER_STEPS]
    done = commands.run(command, tmp_path)
    assert done.returncode == 1
    message, traceback = done.stderr.splitlines()
    assert message == "syncnorm: worker 1 failed: RuntimeError: no step on rank 1"
    assert "in training_step" in (tmp_path / traceback).read_text()
    exit_note = json.loads((tmp_path / traceback).with_name("exit.json").read_text())
    # Worker 0 may have made its first step.
    assert exit_note.pop("step") in (0, 1)
    assert exit_note == {
        "status": "failed",
        "reason": "worker 1 failed: RuntimeError: no step on rank 1",
        "exit_code": 1,
    }


ENDLESS = [*commands.SYNCNORM, "train", "digits", "train.epochs=100000"]
UNTIL_KILLED = [*ENDLESS, "launch.restarts=0"]


def wait_for_first_epoch(process) -> None:
    assert process.stderr.readline().startswith("epoch 1/")


def worker_ids(process) -> list[int]:
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def resumed_to_the_end(folder: Path, run: Path, epochs: int, workers: int) -> CompletedProcess[str]:
    options = [f"train.epochs={epochs}", f"launch.workers={workers}", "--resume", str(run)]
    return commands.run([*commands.SYNCNORM, "train", "digits", *options], folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        # Ctrl-C of a terminal goes to all.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        # The pipes close when the last worker is gone.
        out, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 75
    run = tmp_path / out.splitlines()[-1]
    note = json.loads((run / "exit.json").read_text())
    assert (note["status"], note["exit_code"]) == ("stopped", 75)
    assert note["step"] == events(run, "step")[-1]["step"] >= 23
    snapshot, _, _ = CheckpointStore(run / "checkpoints").newest()
    assert snapshot is not None
    assert snapshot.step == note["step"]
    assert err.splitlines()[-1].endswith(
        f"saved. To go on: the same command with --resume {run.relative_to(tmp_path)}"
    )


def test_a_stopped_run_goes_on_on_another_number_of_workers(tmp_path):
    command = [*commands.SYNCNORM, "train", "digits", "train.epochs=3"]
    with commands.started(command, tmp_path) as process:
        wait_for_first_epoch(process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 75
    run = tmp_path / out.splitlines()[-1]
    done = resumed_to_the_end(tmp_path, run, 3, 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run)
    assert [event["world_size"] for event in events(run, "start")] == [2, 3]
    assert {event["step"] for event in events(run, "step")} == set(range(1, 70))

    other = commands.run(
        [*commands.SYNCNORM, "train", "digits", "train.lr=0.2", "--resume", str(run)], tmp_path
    )
    assert other.returncode == 2
    assert "where train.epochs, train.lr differ" in other.stderr


def test_a_second_signal_ends_at_once(tmp_path):
    # A step that never ends: the first signal is heard, and nothing comes of it.
    write_other_steps(
        tmp_path,
        "if os.environ['RANK'] == '1':",
        "    print('stuck', flush=True)",
        "    while True: time.sleep(0.1)",
    )
    with commands.started([*ENDLESS, *WITH_OTHER_STEPS], tmp_path) as process:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        for pid in worker_ids(process):
            os.kill(pid, signal.SIGTERM)
        process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_stuck_worker_leaves_all_stacks(tmp_path):
    write_other_steps(
        tmp_path,
        # Only now: before the first step a worker of a busy machine may take any time.
        "(watch,) = (each for each in gc.get_objects() if type(each).__name__ == 'SignalWatch')",
        "if watch._timeout > 5: watch._timeout, watch._armed = 5, 0.0; watch.alive()",
        "while os.environ['RANK'] == '1': time.sleep(0.1)",
    )
    command = [*UNTIL_KILLED, *WITH_OTHER_STEPS, "launch.timeout_seconds=300"]
    done = commands.run(command, tmp_path)
    assert done.returncode == 1
    message, folder = done.stderr.splitlines()
    assert re.fullmatch(
        r"syncnorm: worker [01] was stuck; where each worker was is in logs/stacks-\*.txt", message
    )
    stacks = [(tmp_path / folder / "logs" / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    assert "other_steps.py" in stacks[1]
    assert "in training_step" in stacks[0]


def test_workers_do_not_outlive_a_killed_launcher(tmp_path):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        process.kill()
        process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_worker_is_named(tmp_path):
    with commands.started(UNTIL_KILLED, tmp_path) as process:
        wait_for_first_epoch(process)
        os.kill(worker_ids(process)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "syncnorm: worker 0 was killed by SIGKILL" in err


@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_killed_worker_is_started_again_and_the_run_is_the_same(tmp_path, launcher):
    options = ["digits", "train.epochs=3", "checkpoint.every=10"]
    whole = commands.run([*commands.SYNCNORM, "train", *options], tmp_path)
    command = [*commands.SYNCNORM, "train", *options]
    environment = {}
    if launcher == "torchrun":
        command = [*commands.TORCHRUN, "--max-restarts", "3", "-m", "syncnorm", "train", *options]
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with commands.started(command, tmp_path, environment) as process:
        while not process.stderr.readline().startswith("epoch 1/"):
            assert process.poll() is None
        os.kill(worker_ids(process)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 0, err
    interrupted = tmp_path / out.splitlines()[-1]
    expected = run_folder(tmp_path, whole)
    curves = [
        {e["step"]: e["loss"] for e in events(run, "step")} for run in (expected, interrupted)
    ]
    assert curves[0] == curves[1]
    starts = events(interrupted, "start")
    assert len(starts) == 2
    assert starts[1]["step"] in (20, 23, 30, 40)
    assert digests(whole) == [line.split()[-1] for line in out.splitlines() if "sha256" in line]
    if launcher == "ours":
        (fault,) = events(interrupted, "fault")
        assert "worker 1 was killed by SIGKILL; starting again (1 of 3)" in fault["message"]


def test_torchrun_stops_and_the_same_launch_goes_on(tmp_path):
    rendezvous = ["--rdzv-id", "mine", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *rendezvous]
    command += ["-m", "syncnorm", "train", "digits", "train.epochs=4"]
    with commands.started(command, tmp_path) as process:
        while not process.stderr.readline().startswith("epoch 1/"):
            assert process.poll() is None
        process.terminate()
        process.communicate(timeout=commands.DEADLINE_SECONDS)
    (run,) = (tmp_path / "runs").iterdir()
    note = json.loads((run / "exit.json").read_text())
    assert (note["status"], note["exit_code"]) == ("stopped", 75)
    done = commands.run(command, tmp_path)
    assert run_folder(tmp_path, done) == run
    assert [event["step"] for event in events(run, "start")] == [0, note["step"]]
    assert json.loads((run / "exit.json").read_text())["status"] == "done"

    # A launch of the same name after the end is another run.
    again = commands.run([*command, "train.epochs=1"], tmp_path)
    assert run_folder(tmp_path, again) != run


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
        r"training .*\d+/69 steps loss \d\.\d{4}  \d+ samples/s  \d+ % exchanging  test accuracy",
        text,
    )
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


def test_two_launches_do_not_share_a_folder(tmp_path):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        (run,) = (tmp_path / "runs").iterdir()
        done = commands.run([*ENDLESS, "--resume", str(run)], tmp_path)
        assert process.poll() is None
    assert done.returncode == 2
    assert (
        done.stderr
        == f"syncnorm: run {str(run)!r} is being trained by another process. Stop that one first.\n"
    )


def test_a_callable_needs_permission(tmp_path):
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
    command = [*commands.SYNCNORM, "train", "mine.yaml"]
    done = commands.run(command, tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "`model.name`" in done.stderr
    assert "--allow mine" in done.stderr
    done = commands.run([*command, "--allow", "mine"], tmp_path, {"PYTHONPATH": str(tmp_path)})
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
    options = ["launch.workers=1", "model.name=resnet18_cifar", "launch.memory_gib=0.4"]
    done = commands.run([*commands.SYNCNORM, "train", "digits", *options], tmp_path)
    assert done.returncode == 2
    message = (
        r"syncnorm: `launch.micro_batch` must be such that a step fits into memory, got one that "
        r"needs \d+.\d\d MiB: "
        r"\d\d\d.\d\d MiB for the process with its data, 127.86 MiB for parameters, gradients and "
        r"optimizer, and "
        r"64 samples in a forward of \d+.\d\d KiB each. Worker 0 has 409.60 MiB. "
        r"Take fewer workers, a smaller model or more memory.\n"
    )
    assert re.fullmatch(message, done.stderr), done.stderr
    assert not list((tmp_path / "runs").iterdir())
