"""Short runs with real launchers and two workers, and what is left of them."""

import json
import os
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from syncnorm.train.config_file import load_config
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
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoint.pt", "exit.json"}
    assert load_config(str(run / "config.yaml")) == load_config("digits", SHORT)
    assert json.loads((run / "exit.json").read_text()) == {
        "status": "done",
        "reason": "all epochs done",
        "step": 12,
        "exit_code": 0,
    }
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == len(events(run, "step")) == 12


def test_both_workers_have_the_same_running_statistics(local):
    _, done = local
    first, second = digests(done)
    assert first == second
    assert len(first) == 64
    assert "running statistics: equal on all 2 workers" in done.stdout


def test_torchrun_gives_the_same_run(local, tmp_path):
    command = [*commands.TORCHRUN, str(ROOT / "launch" / "torchrun.py"), str(ROOT / "configs" / "digits.yaml"), *SHORT]
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


def test_a_failing_worker_is_named_once_with_its_own_cause(tmp_path):
    # Read by Python at its start: worker 1 fails in its first step, worker 0 then loses its peer.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    def step(self, closure=None):\n"
        "        raise RuntimeError('no step on rank ' + os.environ['RANK'])\n"
        "    torch.optim.SGD.step = step\n"
    )
    command = [*commands.SYNCNORM, "train", "digits", *SHORT]
    done = commands.run(command, tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    message, traceback = done.stderr.splitlines()
    assert message == "syncnorm: worker 1 failed: RuntimeError: no step on rank 1"
    assert "in training_step" in (tmp_path / traceback).read_text()
    exit_note = json.loads((tmp_path / traceback).with_name("exit.json").read_text())
    assert exit_note == {
        "status": "failed",
        "reason": "worker 1 failed: RuntimeError: no step on rank 1",
        "step": 0,
        "exit_code": 1,
    }


ENDLESS = [*commands.SYNCNORM, "train", "digits", "train.epochs=100000"]


def wait_for_first_epoch(process) -> None:
    assert process.stderr.readline().startswith("epoch 1/")


def test_control_c_ends_the_run(tmp_path):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        process.send_signal(signal.SIGINT)
        # The pipes close when the last worker is gone.
        _, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 1
    message, folder = err.splitlines()[-2:]
    assert message == "syncnorm: stopped by SIGINT"
    assert json.loads((tmp_path / folder / "exit.json").read_text())["step"] >= 23


def test_workers_do_not_outlive_a_killed_launcher(tmp_path):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        process.kill()
        process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_worker_is_named(tmp_path):
    with commands.started(ENDLESS, tmp_path) as process:
        wait_for_first_epoch(process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
    assert process.returncode == 1
    assert "syncnorm: worker 0 was killed by SIGKILL" in err
