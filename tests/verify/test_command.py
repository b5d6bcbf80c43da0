"""The command `syncnorm verify`: what it prints, its exit status, and its workers."""

from __future__ import annotations

import json
import re

import pytest

from syncnorm.verify.checks import all_checks
from tests.launch import commands
from tests.launch.commands import call

# What torchrun says to the first of two workers; nobody is there.
LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_the_command_prints_lines_and_says_by_its_status_what_came_of_it(capfd):
    status, out, err = call(
        capfd, "verify", "--workers", "1", "--layer", "tests.verify.layers:OneProcess"
    )
    assert status == 1
    lines = [line.rstrip() for line in out.splitlines()]
    assert any(re.fullmatch(r"passed +equal-shards +outputs, .*", line) for line in lines)
    assert any(
        re.fullmatch(r"failed +all-empty +a batch without a sample .*", line) for line in lines
    )
    assert any(
        re.fullmatch(r" +-> num_batches_tracked of rank 0, after .*, is 1.0e\+00 off, .*", line)
        for line in lines
    )
    assert any(
        re.fullmatch(r"not offered mask-weights +OneProcess does not claim mask", line)
        for line in lines
    )
    assert re.fullmatch(
        r"tests.verify.layers:OneProcess on 1 worker\(s\), gloo, cpu: \d+ passed, 4 failed, \d+ "
        r"not offered",
        lines[-1],
    )
    assert err == ""


def test_json_is_one_object_on_standard_output(capfd):
    status, out, err = call(
        capfd, "verify", "--workers", "1", "--json", "--layer", "syncnorm:SyncBatchNorm"
    )
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["workers"], found["backend"], found["device"], found["exit_status"]) == (
        1,
        "gloo",
        "cpu",
        0,
    )
    first = found["results"][0]
    assert first.pop("seconds") > 0
    assert first == {
        "layer": "syncnorm:SyncBatchNorm",
        "theme": "shards",
        "check": "runs",
        "meaning": "a training step on equal shards raises nothing",
        "status": "passed",
        "reason": "",
    }
    assert [result["check"] for result in found["results"]] == list(all_checks())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--layer", "SyncBatchNorm"],
            "`--layer` must be package.module:Class, got 'SyncBatchNorm'",
        ),
        (
            ["--layer", "torch.nn:Missing"],
            "`--layer` must name what can be imported, got 'torch.nn:Missing'",
        ),
        (
            ["--layer", "torch:zeros"],
            "`--layer` must name a class of torch.nn.Module, got 'torch:zeros'",
        ),
        (["--workers", "0"], "--workers"),
        (["--deadline", "0"], "--deadline"),
    ],
    ids=str,
)
def test_bad_arguments_are_status_2(capfd, arguments, message):
    status, out, err = call(capfd, "verify", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_under_torchrun_its_workers_are_those_that_verify(tmp_path):
    command = [
        *commands.TORCHRUN,
        "-m",
        "syncnorm",
        "verify",
        "--json",
        "--layer",
        "syncnorm:SyncBatchRenorm",
    ]
    done = commands.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["workers"], found["exit_status"]) == (2, 0)
    assert sum(result["status"] == "passed" for result in found["results"]) >= 90


@pytest.mark.slow
def test_under_torchrun_a_check_that_hangs_is_the_last(tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "verify", "--json", "--deadline", "10"]
    done = commands.run([*command, "--layer", "tests.verify.mutants:SkipsEmpty"], tmp_path)
    assert done.returncode == 1
    results = {
        result["check"]: (result["status"], result["reason"])
        for result in json.loads(done.stdout)["results"]
    }
    assert results["ragged-shards"] == ("passed", "")
    assert results["last-empty"] == ("hangs", "rank 0 did not come back within 10 s")
    assert list(results)[-1] == "last-empty"


@pytest.mark.slow
def test_under_torchrun_what_the_other_rank_does_not_answer_is_told(tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "verify", "--deadline", "10"]
    done = commands.run(
        [*command, "--layer", "tests.verify.mutants:SkipsEmptyOnRankZero"], tmp_path
    )
    assert done.returncode == 1
    assert re.search(r"hangs +first-empty .*\n +-> no answer from rank 1 within 10 s", done.stdout)
    assert re.search(r"not run +all-but-one-empty +an earlier check hangs", done.stdout)


def test_under_a_launcher_the_number_of_workers_is_the_launchers(capfd, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    status, out, err = call(capfd, "verify", "--workers", "2")
    assert (status, out) == (2, "")
    assert "`--workers` must be left to the launcher, which started 2, got 2" in err
