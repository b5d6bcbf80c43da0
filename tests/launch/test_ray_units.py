"""What of the Ray side needs no cluster."""

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")

from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails
from ray.train.v2._internal.execution.context import TrainContext, set_train_context
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2.api.preemption import PreemptionInfo

from syncnorm.errors import ConfigError
from syncnorm.run import env
from syncnorm.run.ending import Exit
from syncnorm.run.ray import cli, cluster, submit
from syncnorm.run.ray.client import ClusterError, check_address, translated_errors
from syncnorm.run.ray.cluster import capacity_of, check_capacity
from syncnorm.run.ray.environment import (
    exclude_patterns,
    make_runtime_env,
    read_resources,
    read_runtime_env,
)
from syncnorm.run.ray.job import STOP, Job, check_folder, make_job, prepare_folder
from syncnorm.run.ray.resize import SaveBeforeResize
from syncnorm.run.ray.worker import RESIZE, RayWatch
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tests.launch.ray_cluster import free_port, wait_until

SMALL = {"CPU": 2.0, "memory": 1e9}
WITH_GPUS = {"CPU": 8.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "device", "fewest", "workers", "is_gpu"),
    [
        ([SMALL, SMALL], "auto", 2, 4, False),
        ([SMALL, {"CPU": 1.5}], "cpu", 1, 3, False),
        ([{"CPU": 0.5}, {"CPU": 0.5}], "auto", 1, 0, False),
        ([SMALL, WITH_GPUS], "auto", 4, 4, True),
        ([SMALL, WITH_GPUS], "auto", 5, 10, False),
        ([SMALL, WITH_GPUS], "cpu", 1, 10, False),
        ([SMALL], "cuda", 1, 0, True),
        # A GPU without a CPU beside it is of no use.
        ([{"GPU": 4.0}, {"CPU": 1.0, "GPU": 2.0}], "cuda", 1, 1, True),
    ],
)
def test_how_many_workers_fit(nodes, device, fewest, workers, is_gpu):
    capacity = capacity_of(nodes, device, fewest)
    assert (capacity.workers, capacity.is_gpu) == (workers, is_gpu)
    assert ("GPU" in capacity.per_worker) == is_gpu


def test_what_never_fits_is_refused_with_the_numbers():
    config = load_config("digits", ["launch.workers=[3, 9]", "launch.device=cuda"])
    capacity = capacity_of([SMALL, {"CPU": 8, "GPU": 2}], "cuda", 3)
    message = (
        "`launch.workers` must be at most 2 on this cluster, which has 10 CPUs and 2 GPUs on 2 "
        "node(s), got 3: "
        "each takes 1 CPU and 1 GPU of one node."
    )
    with pytest.raises(ConfigError) as caught:
        check_capacity(config, capacity)
    assert message in str(caught.value)
    check_capacity(load_config("digits", ["launch.workers=[2, 9]"]), capacity)


def test_the_drivers_own_share_is_none_for_workers(monkeypatch):
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in ("a", "b")]
    here = SimpleNamespace(get_node_id=lambda: "b")
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(cluster._state, "get_max_resources_from_cluster_config", lambda: None)
    config = load_config("digits", ["launch.workers=2"])
    check_capacity(config, cluster.read_capacity(config, {}))
    with pytest.raises(ConfigError, match="at most 1 on this cluster, which has 1 CPUs and 0 GPUs"):
        check_capacity(config, cluster.read_capacity(config, {"CPU": 1.0}))


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "http://127.8.9.1:1", "https://localhost:8265", "http://[::1]:8265"],
)
def test_this_machine_needs_no_token(address):
    check_address(address, has_token=False, insecure=False)


@pytest.mark.parametrize(
    "address", ["http://10.0.0.7:8265", "https://ray.example:443", "http://localhost.example:1"]
)
def test_another_machine_needs_a_token(address):
    with pytest.raises(
        ConfigError, match="must be of this machine where there is no token"
    ) as caught:
        check_address(address, has_token=False, insecure=False)
    assert repr(address) in str(caught.value)
    assert "RAY_AUTH_TOKEN_PATH" in str(caught.value)
    assert "--insecure" in str(caught.value)
    check_address(address, has_token=True, insecure=False)
    check_address(address, has_token=False, insecure=True)


@pytest.mark.parametrize(
    "address", ["auto", "127.0.0.1:6379", "ray://127.0.0.1:10001", "http://", "file:///etc"]
)
def test_what_is_no_address_of_a_dashboard(address):
    with pytest.raises(ConfigError, match="must be http://HOST:PORT of a Ray dashboard") as caught:
        check_address(address, has_token=True, insecure=True)
    assert repr(address) in str(caught.value)


def test_an_address_holds_no_password():
    with pytest.raises(ConfigError, match="must hold no name and no password") as caught:
        check_address("http://me:s3cret@127.0.0.1:8265", has_token=True, insecure=False)
    assert "s3cret" not in str(caught.value)


@pytest.fixture
def clean(monkeypatch):
    """An environment that says nothing of Ray; put back afterwards."""
    for name in (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_cluster_whose_agent_did_not_come_up(clean):
    """Words of Ray 2.60's dashboard, as its client raises them."""
    words = "Request failed with status code 500: No available agent to submit job, please try again later.."
    with pytest.raises(ClusterError, match="--dashboard-agent-listen-port below 32768") as caught:
        with translated_errors("http://127.0.0.1:8265"):
            raise RuntimeError(words)
    assert "http://127.0.0.1:8265" in str(caught.value)
    assert "dashboard_agent.log" in str(caught.value)


def test_nobody_answers(clean, capsys):
    address = f"http://127.0.0.1:{free_port()}"
    called = commands.call(capsys, "list", "--address", address)
    assert called.status == 1
    assert called.err.startswith(f"syncnorm: no Ray cluster answers at {address} (")


def test_the_environment_gives_address_and_token(clean, tmp_path):
    clean.setenv("HOME", str(tmp_path))
    assert env.read_cluster() == env.Cluster(None, False, None)
    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text("x")
    assert not env.read_cluster().has_token
    clean.setenv("RAY_AUTH_MODE", "token")
    assert env.read_cluster() == env.Cluster(None, True, default)
    clean.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    clean.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    # A variable goes before a file, which need not be there then.
    clean.setenv("RAY_AUTH_TOKEN", "x")
    assert env.read_cluster() == env.Cluster("http://127.0.0.1:1", True, tmp_path / "token")


def test_a_token_file_that_is_not_there(clean, tmp_path, capsys):
    clean.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    called = commands.call(capsys, "list")
    assert called.status == 2
    message = f"syncnorm: RAY_AUTH_TOKEN_PATH must name a file, got {str(tmp_path / 'token')!r}\n"
    assert called.err == message


def test_the_same_training_is_the_same_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = make_job("digits", ["data.root=images"], ())
    assert job.submission_id.startswith("digits-")
    assert job.folder == str(tmp_path / "runs" / job.submission_id)
    assert job.config["data"]["root"] == str(tmp_path / "images")
    same = make_job(
        "digits",
        [
            *("data.root=images", "launch.workers=[2, 8]"),
            *("checkpoint.every=7", "run_dir=/elsewhere"),
        ],
        (),
    )
    assert same.submission_id == job.submission_id
    assert same.folder == f"/elsewhere/{job.submission_id}"
    for other in (["train.lr=0.2", "data.root=images"], ["data.root=others"], []):
        assert make_job("digits", other, ()).submission_id != job.submission_id


def test_a_name_that_ray_would_not_take(tmp_path):
    path = tmp_path / "my run (2).yaml"
    path.write_text(
        "model: {name: digits_resnet}\ndata: {name: digits}\ntrain: {epochs: 1, global_batch: 8, "
        "lr: 1}\n"
    )
    assert make_job(str(path), [], ()).submission_id.startswith("my-run--2--")


def test_a_job_is_the_same_after_its_journey():
    overrides = [
        "train.optimizer.nesterov=true",
        "launch.workers=[1, 3]",
        "train.clip=1",
        "norm.rules.a.b=group_norm",
    ]
    job = make_job("digits", overrides, ("one", "two.three"))
    arrived = Job.from_json(job.to_json())
    assert arrived == job
    task = arrived.request()
    assert task.allowed == ("one", "two.three")
    assert task.config.mathematics() == load_config("digits", overrides).mathematics()
    assert task.config.launch.workers == [1, 3]


@pytest.mark.parametrize("text", ["{}", "{", "[1]", '{"submission_id": 1, "allowed": []}'])
def test_what_is_no_job(text):
    with pytest.raises(ConfigError, match="a job must be JSON as `syncnorm submit` makes it"):
        Job.from_json(text)


def test_a_job_of_a_bad_configuration():
    values = json.loads(make_job("digits", [], ()).to_json())
    values["config"]["train"]["lr"] = -1
    with pytest.raises(ConfigError, match="greater than 0"):
        Job.from_json(json.dumps(values))


def test_a_run_is_entered_again_and_by_nobody_else(tmp_path):
    place = f"run_dir={tmp_path}"
    job = make_job("digits", [place], (), "mine")
    assert prepare_folder(job) == tmp_path / "mine"
    assert load_config(str(tmp_path / "mine" / "config.yaml")) == job.request().config
    assert (
        prepare_folder(make_job("digits", [place, "launch.workers=4"], (), "mine"))
        == tmp_path / "mine"
    )
    other = make_job("digits", [place, "train.lr=0.3"], (), "mine")
    for check in (check_folder, prepare_folder):
        with pytest.raises(ConfigError, match=r"train\.lr") as caught:
            check(other)
        assert str(caught.value).startswith("`--id` must be a new name, or that of a run of the")
        assert "got 'mine': which differs" in str(caught.value).replace(
            "'mine': differs", "'mine': which differs"
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="`run_dir` must be a folder that all machines share"
    ) as caught:
        prepare_folder(make_job("digits", [f"run_dir={tmp_path / 'file'}"], (), "mine"))
    assert repr(str(tmp_path / "file")) in str(caught.value)


@pytest.fixture
def preemption() -> PreemptionContext:
    """What Ray has told this process, as a worker of its own."""
    context = PreemptionContext()
    parts = dict.fromkeys(
        [
            "train_run_context",
            "distributed_context",
            "execution_context",
            "storage_context",
            "controller_actor",
        ]
    )
    set_train_context(
        TrainContext(**parts, preemption_context=context, dataset_shard_provider=None)
    )
    return context


@pytest.fixture
def watch(tmp_path, preemption):
    (tmp_path / "logs").mkdir()
    watch = RayWatch(60, tmp_path, 0)
    yield watch
    watch.close()
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_job_has_the_name_of_the_configuration_and_no_address():
    job = make_job("digits", ["name=mine", "tags=[a]"], ())
    assert job.name == "mine"
    assert job.submission_id.startswith("mine-")
    assert job.submission_id[5:] == make_job("digits", [], ()).submission_id[7:]
    with pytest.raises(ConfigError, match="`run_dir` must be a folder that all machines share"):
        make_job("digits", ["run_dir=s3://bucket/runs"], ())


@pytest.mark.parametrize(
    ("name", "reason"), [(STOP, "syncnorm stop"), (RESIZE, "Ray, to change the number")]
)
def test_a_file_asks_to_stop(watch, tmp_path, name, reason):
    assert watch.stop is None
    (tmp_path / name).touch()
    wait_until(lambda: watch.stop is not None)
    assert watch.stop.startswith(reason)
    # Said once is said.
    (tmp_path / name).unlink()
    assert watch.stop.startswith(reason)


def test_a_node_that_is_to_be_lost_asks_to_stop(watch, preemption):
    assert watch.stop is None
    preemption.preemption_info = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [1]})
    wait_until(lambda: watch.stop is not None)
    assert watch.stop == "Ray, which is to lose a node"


class ResizingState:
    """Named as Ray's."""


class RunningState:
    """Named as Ray's."""


def test_workers_save_before_their_number_changes(tmp_path):
    callback = SaveBeforeResize(tmp_path, 0.3)
    callback.after_controller_state_update(ResizingState(), RunningState())
    assert list(tmp_path.iterdir()) == []
    seen = []

    class Folder(type(tmp_path)):
        def __truediv__(self, name):
            seen.append(name)
            return Path(self).__truediv__(name)

    SaveBeforeResize(Folder(tmp_path), 0.3).after_controller_state_update(
        RunningState(), ResizingState()
    )
    assert RESIZE in seen
    assert not (tmp_path / RESIZE).exists()
    Exit("stopped", "saved", 3, 75).write(tmp_path)
    SaveBeforeResize(tmp_path, 1000).after_controller_state_update(RunningState(), ResizingState())


@pytest.mark.parametrize(
    ("status", "driver", "noted", "expected"),
    [
        ("RUNNING", None, 75, None),
        ("PENDING", None, None, None),
        ("SUCCEEDED", 0, 0, 0),
        ("STOPPED", None, 75, 75),
        ("STOPPED", None, 0, 0),
        ("STOPPED", None, None, 75),
        ("FAILED", 2, None, 2),
        ("FAILED", 75, 75, 75),
        ("FAILED", 1, None, 1),
        ("FAILED", -9, None, 1),
        ("FAILED", None, None, 1),
    ],
)
def test_exit_status(status, driver, noted, expected):
    assert submit._exit_code(status, driver, noted) == expected


SUPERVISOR = "Job supervisor actor died:\n\tclass_name: JobSupervisor\nThe actor died."
KILLED = "Job entrypoint command failed with exit code -9, last available logs (truncated to 20,000 chars):\nx"


@pytest.mark.parametrize(
    ("status", "driver", "message", "noted", "expected"),
    [
        ("FAILED", None, SUPERVISOR, 0, "Job supervisor actor died: class_name: JobSupervisor The"),
        ("FAILED", -9, KILLED, None, "Job entrypoint command failed with exit code -9"),
        # The driver has said why, in the log.
        ("FAILED", 2, "Job entrypoint command failed", 75, None),
        ("FAILED", 1, "Job entrypoint command failed", None, None),
        ("FAILED", 1, "Job entrypoint command failed", 1, "noted"),
        ("STOPPED", None, "Job was intentionally stopped.", 75, "noted"),
        ("PENDING", None, "Job has not started yet.", 75, "Job has not started yet."),
        ("RUNNING", None, "Job is currently running.", 75, None),
    ],
)
def test_why_a_job_waits_or_has_ended(tmp_path, status, driver, message, noted, expected):
    if noted is not None:
        Exit("stopped", "noted", 3, noted).write(tmp_path)
    folder = {"syncnorm_folder": str(tmp_path)}
    facts = {"driver_exit_code": driver, "message": message, "metadata": folder}
    reason = submit._to_status(job_details(status, **facts)).reason
    is_lost = status == "FAILED" and driver not in (1, 2)
    assert (reason or "").startswith(submit.LOST) == is_lost
    said = (reason or "").removeprefix(f"{submit.LOST}: ")
    assert said.startswith(expected or "")
    assert bool(said) == bool(expected)
    assert "last available logs" not in said


LOG = """\
2026-11-20 10:30:03,569\tINFO job_manager.py:581 -- Runtime env is setting up.
Running entrypoint for job a: exec python -m syncnorm.run.ray.driver '{}'
\x1b[36m(TrainController pid=1)\x1b[0m [2026-11-20 10:30:39,520 E 3528 3559] core_worker.cc:2465: Actor with class name
\x1b[36m(RayTrainWorker pid=3, ip=127.0.0.3)\x1b[0m epoch 1/2  step 23
(RayTrainWorker pid=3) resumed
syncnorm: waiting
test accuracy 96.67 %
/runs/a
[2026-11-20 10:31:07,101 W 3401 3409] gcs_client.cc:180: slow
"""


def test_a_log_is_told_without_rays_own_words(capsys):
    lines = submit.LogLines(sys.stdout)
    lines.feed(LOG[:400])
    lines.feed(LOG[400:-3])
    # The connection broke: all comes again.
    lines.restart()
    for start in range(0, len(LOG), 50):
        lines.feed(LOG[start : start + 50])
    lines.flush()
    out, err = capsys.readouterr()
    assert out == "test accuracy 96.67 %\n/runs/a\n"
    assert err.splitlines() == [
        "epoch 1/2  step 23",
        "resumed",
        "syncnorm: waiting",
        LOG.splitlines()[-1],
    ]


def test_a_log_of_before_is_not_told_again(capsys):
    lines = submit.LogLines(sys.stdout, LOG.splitlines())
    lines.restart()
    lines.feed(LOG + "new\n")
    assert capsys.readouterr() == ("new\n", "")


def test_a_log_on_another_node_is_told_from_its_beginning(capsys):
    lines = submit.LogLines(sys.stdout, LOG.splitlines())
    for _ in range(2):
        lines.restart()
        lines.feed("other\ntest accuracy 96.67 %\n")
    assert capsys.readouterr() == ("other\ntest accuracy 96.67 %\n", "")


# Words of Ray 2.60's dashboard.
NODE_GONE = (
    "Request failed with status code 500: Traceback (most recent call last): ... "
    "aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 127.0.0.3:20365 ssl:default"
)


def job_details(status: str, **facts) -> JobDetails:
    return JobDetails(type="SUBMISSION", submission_id="a", status=status, entrypoint="", **facts)


class Jobs:
    """A client of a job server with one job, in these states one after the other.

    Its node is gone, and its log with it.
    """

    def __init__(self, *states, folder=""):
        self.states, self.folder = list(states), str(folder)
        self.calls: list[str] = []

    def get_address(self):
        return "http://127.0.0.1:8265"

    def get_job_info(self, submission_id):
        status = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        message, metadata = f"Ray says {status}.", {"syncnorm_folder": self.folder}
        return job_details(status, message=message, metadata=metadata, end_time=0)

    def get_job_logs(self, submission_id):
        raise RuntimeError(NODE_GONE)

    def delete_job(self, submission_id):
        self.calls.append(f"delete {submission_id}")

    def submit_job(self, *, submission_id, **_):
        self.calls.append(f"submit {submission_id}")

    def stop_job(self, submission_id):
        self.calls.append(f"stop {submission_id}")

    async def tail_job_logs(self, submission_id):
        yield "done\n"


def test_a_job_that_does_not_begin_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.0)
    jobs = Jobs("PENDING", "PENDING", "RUNNING", "SUCCEEDED")
    assert submit.follow(jobs, "a", submit.LogLines(sys.stdout)).status == "SUCCEEDED"
    assert capsys.readouterr() == ("done\n", "syncnorm: a waits: Ray says PENDING.\n")
    Exit("stopped", "no worker was running", 0, 75).write(tmp_path)
    cli._stop(Jobs("PENDING", "PENDING", "STOPPED", folder=tmp_path), "a", json=False)
    err = capsys.readouterr().err
    assert "stopping a: Ray ends it when it begins. Ray says PENDING.\n" in err
    assert "stopped before its first step. To go on: submit it again\n" in err


def test_a_job_whose_node_is_gone_is_submitted_again():
    jobs = Jobs("FAILED")
    assert submit.start(jobs, submit.Entry("a", "driver", "{}", "digits", "/runs/a", {})) == []
    assert jobs.calls == ["delete a", "submit a"]
    with pytest.raises(ClusterError, match="does not reach the node that had the job's driver"):
        submit.logs(jobs, "a")


def test_what_ray_cannot_pack_is_left_out(tmp_path, clean):
    """It would wait for a pipe, and fail on a name that is no text."""
    clean.chdir(tmp_path)
    for folder in ("sub", "runs"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "sub" / "a pipe")
    os.mkfifo(tmp_path / "runs" / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        (tmp_path / "code.py").write_text("")
        (tmp_path / "dangling").symlink_to("nothing")
        Path(os.fsdecode(b"bad\xff.txt")).write_text("")
        patterns = exclude_patterns(tmp_path, "runs")
        own = [each for each in patterns if not each.startswith("**/")]
        assert own == ["/bad?.txt", "/runs", "/socket", "/sub/a[ ]pipe"]
        package = tmp_path.parent / "package.zip"
        create_package(str(tmp_path), package, include_gitignore=True, excludes=patterns)
    with zipfile.ZipFile(package) as packed:
        assert {"code.py", "dangling"} >= {n for n in packed.namelist() if not n.endswith("/")}


def test_a_working_folder_that_is_too_large_is_one_line():
    said = "Request failed with status code 413: Maximum request body size 104857600 exceeded."
    with pytest.raises(ConfigError, match="Keep data elsewhere"):
        with translated_errors("http://127.0.0.1:8265"):
            raise RuntimeError(said)


@pytest.mark.parametrize(
    "token", ["token", "sub/../token", "a [1]*/!#token ", "link", "other/token", "link/token"]
)
def test_what_is_not_packed(tmp_path, clean, token):
    """By Ray's own packer."""
    here = tmp_path / "here"
    secret = here / token if token != "link" else tmp_path / "secret"
    clean.setenv("RAY_AUTH_TOKEN_PATH", token)
    for path in (
        "runs/one",
        "images/one",
        "sub/one",
        ".venv/one",
        "code.py",
        "other/one",
        ".ray/auth_token",
    ):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text("")
    if token.startswith("link"):
        (here / "link").symlink_to(secret if token == "link" else here / "sub")
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("secret")
    (here / "mine.yaml").write_text(
        "model: {name: 'mine:net'}\ndata: {name: digits, root: images}\ntrain: {epochs: 1, "
        "global_batch: 8, lr: 1}\n"
    )
    # A working folder may be known by another name, too.
    (tmp_path / "alias").symlink_to(here)
    clean.chdir(tmp_path / "alias")
    environment = make_runtime_env(make_job("mine.yaml", [], ["mine"]).request().config, {})
    package = tmp_path / "package.zip"
    create_package(
        environment["working_dir"],
        package,
        include_gitignore=True,
        excludes=environment["excludes"],
    )
    with zipfile.ZipFile(package) as packed:
        names = {name for name in packed.namelist() if not name.endswith("/")}
        assert b"secret" not in b"".join(packed.read(name) for name in names)
    assert {"code.py", "sub/one", "other/one", "mine.yaml"} <= names
    assert not [name for name in names if name.startswith(("runs/", "images/", ".venv/", ".ray/"))]
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120
    # Without code of the user's nothing is sent but the configuration.
    assert "working_dir" not in make_runtime_env(make_job("digits", [], []).request().config, {})


def test_a_runtime_environment_of_ones_own(tmp_path, clean):
    config = make_job("digits", [], []).request().config
    path = tmp_path / "env.yaml"
    path.write_text("pip: [einops]\nenv_vars: {A: b}\nexcludes: [big]\nworking_dir: code\n")
    clean.chdir(tmp_path)
    clean.setenv("RAY_AUTH_TOKEN_PATH", "code/token")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "token").write_text("x")
    made = make_runtime_env(config, read_runtime_env(path))
    assert (made["pip"], made["working_dir"]) == (["einops"], "code")
    assert made["env_vars"] == {"A": "b", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert made["excludes"][0] == "big"
    assert "/token" in made["excludes"]
    path.write_text("env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '3'}\n")
    with pytest.raises(ConfigError, match="must leave RAY_JOB_STOP_WAIT_TIME_S out"):
        make_runtime_env(config, read_runtime_env(path))
    for text in ("[1]", "env_vars: 3"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="`--runtime-env` must hold a mapping"):
            read_runtime_env(path)
    path.write_text("working_dir: .\nexcludes: null\nenv_vars: null\n")
    made = make_runtime_env(config, read_runtime_env(path))
    assert made["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert "/code/token" in made["excludes"]
    path.write_text("working_dir: null\n")
    assert "working_dir" not in make_runtime_env(config, read_runtime_env(path))
    with pytest.raises(ConfigError, match="nowhere"):
        read_runtime_env(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("env_vars: {OMP_NUM_THREADS: 1}", "the value 1 is of type"),
        ("pip: 3", "pip"),
        ("working_dir: .\nexcludes: '*.csv'", "excludes"),
        ("working_dir: nowhere", "nowhere is not a valid path"),
    ],
)
def test_what_is_no_runtime_environment_is_said_before_anything_is_sent(
    tmp_path, clean, text, said
):
    clean.chdir(tmp_path)
    Path("env.yaml").write_text(text)
    with pytest.raises(ConfigError, match="must hold what Ray's runtime_env takes") as caught:
        read_runtime_env(Path("env.yaml"))
    assert said in str(caught.value)


def test_resources_of_the_driver():
    assert read_resources(None, None, None, None) == {}
    assert read_resources(1, 0, 10, '{"spot": 1}') == {
        "entrypoint_num_cpus": 1,
        "entrypoint_num_gpus": 0,
        "entrypoint_memory": 10,
        "entrypoint_resources": {"spot": 1},
    }
    for text in ("spot", "[1]", '{"spot": "1"}'):
        with pytest.raises(ConfigError, match="--entrypoint-resources"):
            read_resources(None, None, None, text)


@pytest.mark.parametrize(
    ("answer", "choice"), [("s\n", "s"), ("Detach\n", "d"), ("\n", ""), ("what?\n", "w")]
)
def test_what_to_do_after_ctrl_c(monkeypatch, capsys, answer, choice):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert cli._ask() == choice
    out, err = capsys.readouterr()
    assert out == ""
    assert "detach or stop? [d/s]" in err


def test_train_does_not_wait_for_imports_of_ray_or_of_torchs_compiler():
    script = "import sys, syncnorm.cli, syncnorm.run.ray.cli; from syncnorm.train.config.file import load_config;"
    script += "load_config('digits'); sys.exit(bool({'ray', 'torch._dynamo'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(("token", "mode"), [({"RAY_AUTH_TOKEN": "x"}, "TOKEN"), ({}, "DISABLED")])
def test_ray_is_told_of_a_token_before_it_looks(token, mode):
    """Ray looks once, when it is imported. The drill with a token goes on from here."""
    script = "import syncnorm.run.ray.client, sys; from ray import _raylet as r; "
    script += f"sys.exit(r.get_authentication_mode() != r.AuthenticationMode.{mode})"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")
    }
    assert (
        subprocess.run(
            [sys.executable, "-c", script], env=inherited | token, check=False
        ).returncode
        == 0
    )


def test_what_the_user_has_set_for_ray_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", "")
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PRINT_PATCH")
    env.set_for_ray_driver()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] == "0"


@pytest.mark.parametrize(("ended", "seconds"), [(0.5, 2.5), (60, 0), (None, 0), (-60, 3)], ids=str)
def test_a_job_that_ended_just_now_is_outwaited(monkeypatch, ended, seconds):
    """By clocks that may differ: -60 is in the future."""
    slept: list[float] = []
    monkeypatch.setattr(submit.time, "sleep", slept.append)
    monkeypatch.setattr(submit.time, "time", lambda: 1000.0)
    end = None if ended is None else 1000 * (1000.0 - ended)
    submit._outwait_monitor(SimpleNamespace(end_time=end))
    assert slept == [pytest.approx(seconds)]
