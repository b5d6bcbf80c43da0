"""Jobs on a real Ray cluster of two nodes."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")

from ray.job_submission import JobSubmissionClient

from syncnorm.run.folder import write_config
from syncnorm.train.config.file import load_config
from tests.launch import commands, record
from tests.launch.commands import Called
from tests.launch.ray_cluster import PATIENCE_SECONDS, wait_until
from tests.train.runs import events

pytestmark = pytest.mark.timeout(5000)

SHORT = ["digits", "train.epochs=1", "train.global_batch=128"]
# Long enough to be disturbed on the way.
LONGER = ["digits", "train.epochs=8", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, CompletedProcess[str]]:
    """LONGER on two workers of this machine, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = commands.run([*commands.SYNCNORM, "train", *LONGER], folder)
    return record.run_folder(folder, done), done


@pytest.fixture
def call(cluster, tmp_path, monkeypatch, capfd) -> Callable[..., Called]:
    """call(*arguments): run a command of syncnorm's in an empty folder and in this process, which
    has Ray already.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Called:
        for name in (
            "RAY_ADDRESS",
            "RAY_API_SERVER_ADDRESS",
            "RAY_AUTH_TOKEN",
            "RAY_AUTH_TOKEN_PATH",
            "RAY_AUTH_MODE",
        ):
            monkeypatch.setenv(name, "")  # so that it is put back whatever the command does
            monkeypatch.delenv(name)
        return commands.call(capfd, *arguments, "--address", cluster.address)

    return run


def curve(run: Path) -> dict[int, float]:
    """The loss of each step as it was last taken."""
    return {event["step"]: event["loss"] for event in events(run, "step")}


def last_step(run: Path) -> int:
    return (
        max((event["step"] for event in events(run, "step")), default=0)
        if (run / "metrics.jsonl").exists()
        else 0
    )


def jobs(call) -> dict[str, dict]:
    listed = call("list", "--json")
    assert listed.status == 0, listed.err
    return {job["submission_id"]: job for job in json.loads(listed.out)}


BREAKS = """
import os
import torch
from syncnorm.train.models import MODELS

class Breaks(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 5 and os.environ["RANK"] == "1":
            raise RuntimeError("no forward on rank 1")
        return self.net(x)

def net(**kwargs):
    return Breaks(MODELS["digits_resnet"](**kwargs))
"""


def test_two_jobs_at_once_of_which_one_fails(cluster, call, tmp_path):
    (tmp_path / "mine.py").write_text(BREAKS)
    fails = ["model.name=mine:net", "--allow", "mine"]
    submitted = call("submit", *SHORT, "launch.workers=2", "--id", "one", "--no-wait", "--json")
    assert submitted.status == 0, submitted.err
    assert json.loads(submitted.out)["folder"] == str(tmp_path / "runs" / "one")
    failed = call("submit", *SHORT, *fails, "launch.workers=2", "--id", "mine")
    done = call("logs", "--follow", "one")
    one, mine = ((job.start_time, job.end_time) for job in by_id(cluster, "one", "mine"))
    assert max(one[0], mine[0]) < min(one[1], mine[1]), "they did not run at once"
    check_as_on_one_machine(done, tmp_path)
    check_failure(failed, tmp_path / "runs" / "mine")

    seen = json.loads(call("status", "one", "--json").out)
    assert seen["status"] == "SUCCEEDED"
    assert (seen["exit_code"], seen["step"], seen["config"]) == (0, 12, "digits")
    assert "test accuracy" in call("logs", "one").out
    # What is done stays done, and what it said before is not said again.
    again = call("submit", *SHORT, "launch.workers=2", "--id", "one")
    assert again.status == 0
    begin, *_, accuracy, folder = again.out.splitlines()
    assert begin == "done already, after step 12; --id NEW runs it again"
    assert re.fullmatch(r"test accuracy \d\d\.\d\d %", accuracy)
    assert folder == str(tmp_path / "runs" / "one")
    assert len(events(tmp_path / "runs" / "one", "start")) == 1


def check_as_on_one_machine(done: Called, folder: Path) -> None:
    """The job `one` is the run that two workers of one machine make."""
    alone = commands.run([*commands.SYNCNORM, "train", *SHORT], folder)
    run = folder / "runs" / "one"
    assert done.status == 0, done.err
    *_, accuracy, last = done.out.splitlines()
    assert re.fullmatch(r"test accuracy \d\d\.\d\d %", accuracy)
    assert last == str(run)
    assert re.search(r"^epoch 1/1  step 12  loss ", done.err, re.MULTILINE)
    (start,) = events(run, "start")
    assert start["world_size"] == 2
    assert record.digests(done.out) == record.digests(alone.stdout)
    assert len(set(record.digests(done.out))) == 1
    assert curve(run) == curve(record.run_folder(folder, alone))


def check_failure(done: Called, run: Path) -> None:
    """It is told once, by the worker that failed, and not tried again: it would fail again."""
    assert (done.status, done.out) == (1, "")
    assert (
        done.err.splitlines()[-1]
        == f"syncnorm: worker 1 failed: RuntimeError: no forward on rank 1; {run}/traceback.txt"
    )
    assert done.err.count("no forward on rank 1") == 1, done.err
    assert "in forward" in (run / "traceback.txt").read_text()
    note = json.loads((run / "exit.json").read_text())
    assert note["reason"] == "worker 1 failed: RuntimeError: no forward on rank 1"
    assert len(events(run, "start")) == 1


def test_a_sweep_of_two_trials_names_the_best(call, tmp_path):
    done = call("sweep", *SHORT, "data.validation=0.2", "train.lr=0.05,1e-6")
    assert done.status == 0, done.err
    folder = Path(done.out.splitlines()[-1])
    assert folder.parent == tmp_path / "runs"
    record = json.loads((folder / "sweep.json").read_text())
    assert record["best"] == "trial-00-lr=0.05"
    assert [trial["status"] for trial in record["trials"]] == ["done", "done"]
    best, other = (trial["best"] for trial in record["trials"])
    assert best > other
    assert re.search(
        r"^best trial: trial-00-lr=0.05, validation accuracy \d", done.out, re.MULTILINE
    )
    assert "syncnorm: trial-01-lr=1e-06 done after step " in done.err
    for name in ("trial-00-lr=0.05", "trial-01-lr=1e-06"):
        assert len(events(folder / name, "start")) == 1


def by_id(cluster, *ids):
    found = {job.submission_id: job for job in JobSubmissionClient(cluster.address).list_jobs()}
    return [found[name] for name in ids]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["digits", "train.epoch=1"],
            "`train.epoch` is not a key. The nearest key is `train.epochs`.",
        ),
        (["digits", "model.name=mine:net"], "To run its code, add --allow mine."),
        (
            ["digits", "--id", "a b"],
            "`--id` must be letters, digits, '.', '_' and '-', at most 121, got 'a b'.",
        ),
    ],
)
def test_a_bad_configuration_starts_nothing(call, tmp_path, arguments, message):
    before = jobs(call)
    done = call("submit", *arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("syncnorm: ")
    assert message in done.err
    assert jobs(call) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_an_unknown_job_is_named(call, command):
    done = call(command, "nobody")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("syncnorm: no job 'nobody' on this cluster.")


def test_too_many_workers_are_refused_with_the_numbers(call):
    # The driver takes one of the four.
    crowd = [*SHORT, "launch.workers=4", "--entrypoint-num-cpus", "1", "--id", "crowd"]
    done = call("submit", *crowd)
    assert (done.status, done.out) == (2, "")
    message = (
        "syncnorm: `launch.workers` must be at most 3 on this cluster, which has 3 CPUs and 0 GPUs "
        "on 2 node(s) besides the driver's, "
        "got 4: each takes 1 CPU of one node."
    )
    assert message in done.err
    assert jobs(call)["crowd"]["exit_code"] == 2


def test_another_configuration_of_the_same_name_is_not_sent(call, tmp_path):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    write_config(load_config("digits", []), run)
    before = jobs(call)
    done = call("submit", "digits", "train.lr=0.3", "--id", "mine")
    assert (done.status, done.out) == (2, "")
    message = "`--id` must be a new name, or that of a run of the same configuration, got 'mine': "
    assert message in done.err
    assert "train.lr" in done.err
    assert jobs(call) == before


def test_killed_stopped_and_gone_on_with_the_run_is_the_same(cluster, call, tmp_path, undisturbed):
    submit = ["submit", *LONGER, "launch.workers=2", "--id", "disturbed"]
    run = tmp_path / "runs" / "disturbed"
    assert call(*submit, "--no-wait").status == 0
    with (
        cluster.started(*submit, folder=tmp_path) as detached,
        cluster.started(*submit, folder=tmp_path) as follower,
    ):
        for process in (detached, follower):
            assert process.stderr.readline().startswith("syncnorm: disturbed is running already")
        # Ctrl-C where nobody can be asked leaves the job alone.
        detached.send_signal(signal.SIGINT)
        wait_until(lambda: last_step(run) >= 25)
        os.kill(commands.holder(run / "logs" / "rank-1.log"), signal.SIGKILL)
        wait_until(lambda: len(events(run, "start")) == 2)
        stopped = call("stop", "disturbed")
        _, err = follower.communicate(timeout=PATIENCE_SECONDS)
        _, detached_err = detached.communicate(timeout=PATIENCE_SECONDS)
    note = json.loads((run / "exit.json").read_text())
    assert (note["status"], note["exit_code"]) == ("stopped", 75)
    assert note["step"] < 184
    assert stopped.status == 0
    assert f"stopped after step {note['step']}, saved." in stopped.err
    assert follower.returncode == 75, err
    assert detached.returncode == 0
    assert "To stop it: syncnorm stop disturbed" in detached_err
    assert jobs(call)["disturbed"]["exit_code"] == 75

    done = call(*submit)
    assert done.status == 0, done.err
    first, again, last = (event["step"] for event in events(run, "start"))
    assert first == 0 < 10 <= again <= last == note["step"]
    assert curve(run) == curve(undisturbed[0])
    assert record.digests(done.out) == record.digests(undisturbed[1].stdout)
