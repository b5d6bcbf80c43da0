"""The command's answer to bad input: one message, exit status 2, no traceback, nothing started."""

import contextlib
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from syncnorm.cli import main
from syncnorm.errors import ConfigError
from syncnorm.run import entering, machine
from syncnorm.run.entering import open_run_folder
from syncnorm.run.env import Launched
from syncnorm.run.folder import write_config
from syncnorm.run.machine import check_free_memory, core_warning
from syncnorm.run.request import RunRequest
from syncnorm.run.worker import train_in
from syncnorm.system import resident_memory
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import LaunchSection
from tests.launch import commands
from tests.train.runs import Free, workers


def test_modules_of_the_working_folder_are_for_what_was_allowed(tmp_path, monkeypatch):
    """In a folder of somebody else's a file could take the place of a package."""
    found: list[bool] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.setattr(
        "syncnorm.run.local.run_local", lambda request: found.append(str(tmp_path) in sys.path)
    )
    for more in ([], ["--allow", "mine"]):
        with pytest.raises(SystemExit):
            main(["train", "digits", *more])
    assert found == [False, True]


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "no configuration 'missing.yaml'. Packed ones, by name: "),
        (
            ["digits", "train.epoch=1"],
            "`train.epoch` is not a key. The nearest key is `train.epochs`.",
        ),
        (["digits", "train.epochs=many"], "`train.epochs` must be a valid integer"),
        (
            ["digits", "run_dir=taken"],
            "`run_dir` must be a folder that can be written to, got 'taken'",
        ),
        (
            ["digits", "launch.device=cuda", "launch.workers=99"],
            "`launch.device` must be auto or cpu where 99 workers",
        ),
        (["digits", "launch.memory_gib=0.01"], "`launch.memory_gib` must be more than "),
        (
            ["digits", "run_dir=nowhere://bucket/runs"],
            "`run_dir` cannot be used: nowhere://bucket/runs/digits-",
        ),
        (
            ["digits", "run_dir=file:///tmp"],
            "`run_dir` must be a path on a file system of this machine, got 'file",
        ),
        (
            ["digits", "run_dir=s3://me:secret@bucket/runs"],
            "`run_dir` must hold no name and no password, got s3://...@...",
        ),
        (
            ["digits", "run_dir=s3://bucket/../runs"],
            "`run_dir` must be a path or an address such as s3://bucket/runs, got 's3://bucket/..",
        ),
        (
            ["digits", "name=a/b"],
            "`name` must be at most 100 letters, digits, '.', '_' and '-' and begin with a letter",
        ),
        (["digits", "tags=['']"], "`tags.0` must be a word or a few, at most 64 characters, got "),
        (
            ["digits", "follow.loggers.wanbd={}"],
            "must be one of tensorboard, wandb, mlflow, trackio, or package.module:callable",
        ),
        (["--resume", "nowhere"], "`--resume` must name a run's folder, got 'nowhere'"),
        (["digits", "model.partial=true"], "partial must be false without weights"),
        (
            ["digits", "data.root=file:///tmp"],
            "`data.root` must be a path on a file system of this machine, got 'file",
        ),
    ],
)
def test_bad_input(arguments, message, in_empty_folder, capsys):
    (in_empty_folder / "taken").write_text("a file")
    called = commands.call(capsys, "train", *arguments)
    assert called.status == 2
    _, out, err = called
    assert out == ""
    assert err.startswith("syncnorm: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in in_empty_folder.iterdir()] == ["taken"]


def test_a_path_may_have_colons_and_slashes():
    for path in ("s3:/bucket", "a//b", "/runs/x:y", "3://x"):
        assert load_config("digits", [f"run_dir={path}"]).run_dir == path


def test_more_workers_than_fit_are_refused_with_numbers():
    check_free_memory(40, 256 * 2**20, 10 * 2**30)
    message = (
        "`launch.workers` must be at most 40 on this machine, got 41: a worker takes 256.00 MiB "
        "and more before it has "
        "data and a model, and 10.00 GiB are free. Take fewer."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_free_memory(41, 256 * 2**20, 10 * 2**30)


@pytest.mark.parametrize("memory_gib", [None, 4.0])
def test_a_limit_for_each_worker_makes_no_room_for_more(monkeypatch, memory_gib):
    monkeypatch.setattr(machine, "free_memory", lambda: 100 * resident_memory())
    launch = LaunchSection(workers=200, memory_gib=memory_gib)
    with pytest.raises(ConfigError, match=r"`launch.workers` must be at most [0-9]+ .* got 200: "):
        machine.check_capacity(launch, torch.device("cpu"))


def test_more_workers_than_cores_are_told():
    assert core_warning(2, 2.0) is None
    assert (
        core_warning(3, 2.0)
        == "3 workers share 2 core(s): a step takes longer than with 2 worker(s)"
    )
    assert (
        core_warning(1, 0.5)
        == "1 workers share 0.5 core(s): a step takes longer than with 1 worker(s)"
    )


@pytest.fixture
def code_here(in_empty_folder, monkeypatch):
    """Modules in the working folder, which an installed command has not on its path."""
    here = {"", str(Path.cwd())}
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in here])
    Path("lying_here.py").write_text("def load(root):\n    return root.parent\nLIMIT = 3\n")
    Path("mine.yaml").write_text(
        "model: {name: digits_resnet}\ndata: {name: 'lying_here:load'}\ntrain: {epochs: 1, "
        "global_batch: 8, lr: 0.1}\n"
    )
    yield Path.cwd()
    sys.modules.pop("lying_here", None)


def test_a_dry_run_finds_code_here_and_tells_a_bug_in_a_line(code_here, capsys):
    called = commands.call(capsys, "train", "mine.yaml", "--dry-run", "--allow", "lying_here")
    assert called.status == 1
    assert called.err == (
        "syncnorm: worker 0 failed: AttributeError: 'NoneType' object has no attribute 'parent' "
        f"({code_here / 'lying_here.py'}, line 2, in load)\n"
    )


def test_verify_finds_code_here(code_here, capsys):
    called = commands.call(capsys, "verify", "--layer", "lying_here:LIMIT")
    assert called.status == 2
    assert (
        "`--layer` must name a class of torch.nn.Module, got 'lying_here:LIMIT': 3." in called.err
    )


def test_a_folder_is_removed_where_the_run_was_refused_before_it_began(pool, in_empty_folder):
    pool(2).run(refuse_in_folder, str(in_empty_folder / "runs"), False)
    assert not list((in_empty_folder / "runs").iterdir())
    pool(2).run(refuse_in_folder, str(in_empty_folder / "runs"), True)
    (run,) = (in_empty_folder / "runs").iterdir()
    assert (run / "metrics.jsonl").exists(), "what happened later is kept"


def refuse_in_folder(run_dir: str, has_begun: bool) -> None:
    """Refuse a configuration as a worker of torchrun."""
    rank = dist.get_rank()
    task = RunRequest(load_config("digits", [f"run_dir={run_dir}"]), "digits")
    with contextlib.suppress(ConfigError):
        with open_run_folder(task, Launched(rank, 2, rank, 2)) as folder:
            assert (folder / "config.yaml").exists()
            # Nobody looks for what the first worker has removed.
            dist.barrier()
            if has_begun and rank == 0:
                (folder / "metrics.jsonl").touch()
            raise ConfigError("no")


def test_workers_with_other_configurations_leave_a_run_as_it_was(pool, in_empty_folder):
    runs = in_empty_folder / "runs"
    for error in pool(2).run(refuse_different, str(runs), None):
        assert error == "configuration 'digits' of workers [1] differs from that of worker 0"
    assert not runs.exists() or not list(runs.iterdir())
    run = runs / "mine"
    run.mkdir(parents=True)
    write_config(load_config("digits", [f"run_dir={runs}"]), run)
    (run / "metrics.jsonl").touch()
    (run / "exit.json").write_text("{}")
    before = (run / "config.yaml").read_text()
    pool(2).run(refuse_different, str(runs), str(run))
    assert (run / "config.yaml").read_text() == before
    assert (run / "exit.json").exists()


def refuse_different(run_dir: str, resume: str | None) -> str:
    """Open a run's folder with more epochs, and on the second worker with still more."""
    rank = dist.get_rank()
    config = load_config("digits", [f"run_dir={run_dir}", f"train.epochs={90 + rank}"])
    request = RunRequest(config, "digits", None if resume is None else Path(resume))
    try:
        with open_run_folder(request, Launched(rank, 2, rank, 2)):
            return "it was opened"
    except ConfigError as error:
        return str(error)


def test_a_folder_that_the_first_workers_machine_does_not_have(pool, tmp_path):
    """Ray's driver has made it, on a machine of its own."""
    for error in pool(2).run(enter_elsewhere, str(tmp_path / "runs" / "mine")):
        assert error.startswith(
            "`run_dir` must be a folder that all machines share, got "
            f"{str(tmp_path / 'runs' / 'mine')!r}, which workers [0] do not see."
        )


def enter_elsewhere(run: str) -> str:
    rank = dist.get_rank()
    launched = Launched(rank, 2, 0, 1, run_folder=Path(run))
    try:
        with open_run_folder(RunRequest(load_config("digits", []), "digits"), launched):
            return "it was opened"
    except ConfigError as error:
        return str(error)


def test_a_run_that_is_refused_before_it_goes_on_stays_as_it_was(pool, in_empty_folder):
    """The data are gone; a next resume would have the epochs of the one that was refused."""
    run = in_empty_folder / "runs" / "mine"
    run.mkdir(parents=True)
    arguments = ["data.name=npz", "data.root=gone.npz", f"run_dir={run.parent}", "train.epochs="]
    write_config(load_config("digits", [*arguments[:-1], "train.epochs=3"]), run)
    (run / "metrics.jsonl").touch()
    (run / "exit.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for error in pool(2).run(refuse_data, [*arguments[:-1], "train.epochs=9"], str(run)):
        assert "gone.npz" in error
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after == before | {"run.lock": b""}


def refuse_data(arguments: list[str], run: str) -> str:
    rank = dist.get_rank()
    request = RunRequest(load_config("digits", arguments), "digits", Path(run))
    try:
        with open_run_folder(request, Launched(rank, 2, rank, 2)) as folder:
            train_in(folder, request, workers(), Free())
    except ConfigError as error:
        return str(error)
    return "it was trained"


@pytest.mark.parametrize("is_a_copy", [False, True])
def test_workers_that_do_not_share_a_folder_are_told_so(pool, in_empty_folder, is_a_copy):
    """Nor are two copies of a run, each on a disk of its own, one folder."""
    for rank in range(2):
        run = in_empty_folder / str(rank) / "runs" / "mine"
        run.mkdir(parents=True)
        write_config(load_config("digits", ["run_dir=runs"]), run)
    resume = "runs/mine" if is_a_copy else None
    for error in pool(2).run(refuse_apart, str(in_empty_folder), resume):
        assert "`run_dir` must be a folder that all machines share, got" in error
        assert "which workers [1] do not see" in error
    assert [path.name for path in (in_empty_folder / "0" / "runs").iterdir()] == ["mine"]
    assert not list(in_empty_folder.rglob(".seen*"))


def refuse_apart(folder: str, resume: str | None) -> str:
    """Open a run's folder from another working folder on each worker, as machines have them."""
    rank = dist.get_rank()
    task = RunRequest(load_config("digits", ["run_dir=runs"]), "digits", resume)
    with contextlib.chdir(f"{folder}/{rank}"), mock.patch.object(entering, "_VISIBLE_SECONDS", 0.1):
        try:
            with open_run_folder(task, Launched(rank, 2, rank, 2)):
                return "it was opened"
        except ConfigError as error:
            return str(error)


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["train", "train.lr=1"], ["tarin", "digits"], ["train", "digits", "--epochs", "3"]],
)
def test_wrong_usage(arguments, capsys):
    called = commands.call(capsys, *arguments)
    assert called.status == 2
    assert "Usage" in called.err


def test_half_an_environment(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    called = commands.call(capsys, "train", "digits")
    assert called.status == 2
    assert (
        "environment variable WORLD_SIZE must be a number where RANK is set, got ''" in called.err
    )


def test_the_real_command(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {name: digits_resnet}\ntrian: {}\n")
    done = commands.run([*commands.SYNCNORM, "train", "mine.yaml"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "syncnorm: mine.yaml: 3 problems\n"
        "  `data` is missing\n"
        "  `train` is missing\n"
        "  `trian` is not a key. The nearest key is `train`.\n"
    )
