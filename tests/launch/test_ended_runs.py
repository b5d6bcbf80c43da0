"""Runs that fail, are stopped or killed, and go on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from syncnorm.run.folder import find_relaunched
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tests.launch.record import digests, run_folder
from tests.train.runs import events

SHORT = ["train.epochs=1", "train.global_batch=128"]
# Long enough to be disturbed on the way.
LONGER = ["digits", "train.epochs=3", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, CompletedProcess[str]]:
    """LONGER on two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, commands.run([*commands.SYNCNORM, "train", *LONGER], folder)


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
    *header, message, traceback = done.stderr.splitlines()
    assert len(header) == 4
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
    while not process.stderr.readline().startswith("epoch 1/"):
        assert process.poll() is None


def worker_ids(process) -> list[int]:
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def stopped_by(number: signal.Signals, command: list[str], folder: Path) -> CompletedProcess[str]:
    with commands.started(command, folder) as process:
        wait_for_first_epoch(process)
        # Ctrl-C of a terminal goes to all.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        # The pipes close when the last worker is gone.
        out, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    return CompletedProcess(command, process.returncode, out, err)


def assert_saved_and_stopped(done: CompletedProcess[str], folder: Path) -> Path:
    """The run's folder."""
    assert done.returncode == 75
    run = folder / done.stdout.splitlines()[-1]
    note = json.loads((run / "exit.json").read_text())
    assert (note["status"], note["exit_code"]) == ("stopped", 75)
    assert note["step"] == events(run, "step")[-1]["step"] >= 23
    snapshot, _, _ = CheckpointStore(run / "checkpoints").newest()
    assert snapshot is not None
    assert snapshot.step == note["step"]
    line = f"saved. To go on: syncnorm train --resume {run.relative_to(folder)}"
    assert line in done.stderr.splitlines()[-1]
    return run


def test_ctrl_c_saves_and_stops(tmp_path):
    assert_saved_and_stopped(stopped_by(signal.SIGINT, ENDLESS, tmp_path), tmp_path)


JUDGED = """
import gc, os, time
from syncnorm.train.models import MODELS

def net(**kwargs):
    model = MODELS["digits_resnet"](**kwargs)
    model.register_forward_pre_hook(wait)
    return model

def wait(model, inputs):
    # Before the first step it is tried out, which is no evaluation.
    if model.training or model.bn1.num_batches_tracked < 2 or os.environ["RANK"] != "0":
        return
    print("here", flush=True)
    (watch,) = (each for each in gc.get_objects() if type(each).__name__ == "SignalWatch")
    while watch.stop is None:
        time.sleep(0.01)
"""


def test_ctrl_c_in_an_evaluation_saves_and_stops(tmp_path):
    (tmp_path / "judged.py").write_text(JUDGED)
    command = [*ENDLESS, "model.name=judged:net", "--allow", "judged"]
    with commands.started(command, tmp_path) as process:
        assert process.stdout.readline() == "here\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert "Traceback" not in err
    assert_saved_and_stopped(CompletedProcess(command, process.returncode, out, err), tmp_path)


def test_code_that_fails_before_the_first_step_leaves_only_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def net(**kwargs): raise RuntimeError('no net')\n")
    options = ["digits", "model.name=broken:net", "--allow", "broken"]
    done = commands.run([*commands.SYNCNORM, "train", *options], tmp_path)
    assert done.returncode == 1
    *_, message, traceback = done.stderr.splitlines()
    assert re.fullmatch(r"syncnorm: worker [01] failed: RuntimeError: no net", message)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["traceback.txt"]
    assert "broken.py" in (tmp_path / traceback).read_text()


def test_a_signal_saves_and_stops_and_the_run_goes_on_on_another_number_of_workers(
    tmp_path, monkeypatch, capsys
):
    command = [*commands.SYNCNORM, "train", "digits", "train.epochs=3"]
    run = assert_saved_and_stopped(stopped_by(signal.SIGTERM, command, tmp_path), tmp_path)
    options = ["--resume", str(run), "launch.workers=3", "train.epochs=4"]
    done = commands.run([*commands.SYNCNORM, "train", *options], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run)
    assert [event["world_size"] for event in events(run, "start")] == [2, 3]
    assert {event["step"] for event in events(run, "step")} == set(range(1, 93))
    assert "train.epochs grows from 3 to 4" in done.stderr
    assert load_config(str(run / "config.yaml")).train.epochs == 4

    monkeypatch.chdir(tmp_path)
    called = commands.call(capsys, "train", "digits", "train.lr=0.2", "--resume", str(run))
    assert called.status == 2
    assert "which differs: train.lr: 0.1 there, 0.2 here. Only " in called.err


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
    *_, message, folder = done.stderr.splitlines()
    assert re.fullmatch(
        r"syncnorm: worker [01] was stuck: no progress within `launch.timeout_seconds`; where each "
        r"worker was is in logs/stacks-\*.txt",
        message,
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


def assert_same(run: Path, undisturbed: tuple[Path, CompletedProcess[str]], out: str) -> None:
    """The run is LONGER's to the bit, though it was disturbed."""
    expected = run_folder(*undisturbed)
    curves = [{e["step"]: e["loss"] for e in events(each, "step")} for each in (expected, run)]
    assert curves[0] == curves[1]
    assert digests(undisturbed[1].stdout) == digests(out)


# A save that was under way is lost, and one before it counts.
SAVED = (10, 20, 23, 30, 40)


def test_a_killed_worker_is_started_again_and_the_run_is_the_same(tmp_path, undisturbed):
    with commands.started([*commands.SYNCNORM, "train", *LONGER], tmp_path) as process:
        wait_for_first_epoch(process)
        os.kill(worker_ids(process)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 0, err
    run = tmp_path / out.splitlines()[-1]
    assert_same(run, undisturbed, out)
    first, again = (event["step"] for event in events(run, "start"))
    assert first == 0
    assert again in SAVED
    (fault,) = events(run, "fault")
    assert "worker 1 was killed by SIGKILL; starting again (1 of 3)" in fault["message"]


def test_torchrun_starts_a_killed_worker_again_and_the_same_launch_goes_on(
    tmp_path, undisturbed, monkeypatch
):
    rendezvous = ["--rdzv-id", "mine", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *rendezvous]
    command += ["--max-restarts", "3", "-m", "syncnorm", "train", *LONGER]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with commands.started(command, tmp_path, environment) as process:
        wait_for_first_epoch(process)
        os.kill(worker_ids(process)[-1], signal.SIGKILL)
        # It goes on before the end of an epoch that it had begun.
        while not process.stderr.readline().startswith("epoch 2/"):
            assert process.poll() is None
        process.terminate()
        process.communicate(timeout=commands.DEADLINE_SECONDS)
    (run,) = (tmp_path / "runs").iterdir()
    note = json.loads((run / "exit.json").read_text())
    assert (note["status"], note["exit_code"]) == ("stopped", 75)
    done = commands.run(command, tmp_path, environment)
    assert run_folder(tmp_path, done) == run
    first, again, last = (event["step"] for event in events(run, "start"))
    assert (first, last) == (0, note["step"])
    assert again in SAVED
    assert json.loads((run / "exit.json").read_text())["status"] == "done"
    assert_same(run, undisturbed, done.stdout)

    # A launch of the same name after the end is another run.
    monkeypatch.chdir(tmp_path)
    config = load_config("digits", LONGER[1:])
    assert find_relaunched(config, "mine") is None
    (run / "exit.json").unlink()
    assert find_relaunched(config, "mine") == run.relative_to(tmp_path)


def test_two_launches_do_not_share_a_folder(tmp_path):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        (run,) = (tmp_path / "runs").iterdir()
        done = commands.run([*ENDLESS, "--resume", str(run)], tmp_path)
        assert process.poll() is None
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == f"syncnorm: {str(run)!r} is being trained by another process. Stop that one first."
    )
