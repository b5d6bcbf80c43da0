"""`syncnorm verify`: on our layers, on somebody else's, on those that hang; its output and its exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from syncnorm.cli import main
from syncnorm.verify import LocalCrew, Report, ours, subject_of, verify
from syncnorm.verify.check import all_checks
from tests.launch import commands

# A launched process finds the tests' layers there.
HERE = {"PYTHONPATH": str(Path(__file__).parents[2])}


def _by_check(report: Report) -> dict[str, tuple[str, str]]:
    return {result.check: (result.status, result.reason) for result in report.results}


def _verified(layer: str, workers: int = 2, seconds: float = 60.0, only: Collection[str] = ()) -> Report:
    with LocalCrew(workers, seconds) as crew:
        return verify(crew, [subject_of(layer)], only=only)


@pytest.mark.parametrize("workers", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_our_layers_pass_all_that_they_claim(workers):
    with LocalCrew(workers, 60.0) as crew:
        report = verify(crew, ours())
    assert report.exit_status == 0, [r for r in report.results if r.status not in ("passed", "not offered")]
    for subject in ours():
        status = {r.check: r.status for r in report.results if r.layer == subject.reference}
        assert status.keys() == all_checks().keys()
        for check in (check for check in all_checks().values() if status[check.name] == "not offered"):
            assert check.workers > workers or subject.lacks(check.needs)
        assert sum(s == "passed" for s in status.values()) >= (75 if workers == 1 else 90)


# Check -> what it says of a layer with every classic mistake.
NAIVE = {
    "equal-shards": r"step 1: input gradient of rank 0 is \S+ off, allowed \S+ \(got \S+, should be \S+\)",
    "ragged-shards": r"step 1: input gradient of rank 0 is \S+ off",
    "one-sample-each": r"step 1: input gradient of rank 0 is \S+ off",
    "last-empty": r"step 1: running_var of rank 0 is \S+ off",
    "first-empty": r"step 1: running_var of rank 0 is \S+ off",
    "all-but-one-empty": r"step 1: running_var of rank 0 is \S+ off",
    "all-empty": "running_mean of rank 0, after an empty batch, is nan off, allowed 0",
    "single-value": r"running_var of rank 0 is 1.0e-01 off, allowed \S+ \(got 0.9, should be 1\)",
    "two-values": r"input gradient of rank 0 is \S+ off",
    "constant-channel": r"input gradient of rank 0 is \S+ off",
    "float32": r"input gradient of rank 0 is \S+ off",
    "bfloat16": r"output of rank 0 is \S+ off, allowed \S+, twice torch's own",
    "float16": r"output of rank 0 is \S+ off, allowed \S+, twice torch's own",
    "float16-large": r"output of rank 0 is inf off, allowed \S+, twice torch's own",
    "float16-many": "running_mean of rank 0 is nan, should be",
    "float64-large-mean": r"input gradient of rank 0 is \S+ off",
    "float32-large-mean": r"running_var of rank 0 is a share of \S+ off, allowed 5.0e-05",
    "float32-small-variance": r"running_var of rank 0 is a share of \S+ off, allowed 1.0e-04",
    "momentum-none": "ranks 0, 1 raised TypeError: unsupported operand type",
    "input-without-gradient": r"running_var of rank 0 is \S+ off",
    "gradients-accumulate": r"input gradient, twice, of rank 0 is \S+ off",
    "checkpoint": r"input gradient of rank 0 is \S+ off",
    "no-grad": r"running_var of rank 0 is \S+ off",
    "global-count": r"running_var is \S+ off",
    "reset": "ranks 0, 1 raised AttributeError: 'Naive' object has no attribute 'reset_running_stats'",
    "evaluation-silent": r"rank 0 made 1 exchange\(s\) in evaluation",
    "ddp": r"0.weight of rank 0 after three steps is \S+ off",
}
# What that layer gets right even so.
RIGHT = {
    "runs", "permuted-ranks", "differs-from-local", "same-bits-again", "buffers-equal", "counted-once",
    "evaluation", "evaluation-one-sample", "state-dict-keys", "pickle", "nan-is-seen", "wrong-channels",
}  # fmt: skip
# Checks of it at which workers wait for each other; see test_mutants.py.
WAITING = {"gradient-needed-on-some", "gradient-needed-on-some-only", "evaluation-alone"}


def test_a_layer_with_every_classic_mistake_fails_with_reasons():
    report = _verified("tests.verify.naive:Naive", only=all_checks().keys() - WAITING)
    assert report.exit_status == 1
    found = _by_check(report)
    for check, pattern in NAIVE.items():
        status, reason = found[check]
        assert status == "failed", check
        assert re.search(pattern, reason), (check, reason)
    assert {found[check] for check in RIGHT} == {("passed", "")}
    assert {status for status, _ in found.values()} == {"passed", "failed", "not offered"}
    assert found["mask-weights"] == ("not offered", "Naive does not claim mask")
    assert found["subgroups"] == ("not offered", "Naive does not claim process_group")


def test_a_layer_that_hangs_or_dies_ends_neither_the_run_nor_the_others():
    checks = ["equal-shards", "last-empty", "float32"]
    report = _verified("tests.verify.mutants:SkipsEmpty", seconds=5.0, only=checks)
    found = _by_check(report)
    assert found["last-empty"] == ("hangs", "no answer from rank 0 within 5 s")
    assert [found[check] for check in ("equal-shards", "float32")] == [("passed", "")] * 2
    found = _by_check(_verified("tests.verify.mutants:Dies", seconds=5.0, only=checks))
    assert found["last-empty"] == ("failed", "rank 1: the process died, exit code 77")
    assert found["float32"] == ("passed", "")


def test_torch_sync_batch_norm_refuses_the_cpu_and_nothing_hangs():
    found = _by_check(_verified("torch.nn:SyncBatchNorm"))
    status, reason = found.pop("runs")
    assert status == "failed"
    assert re.search("ranks 0, 1 raised ValueError: SyncBatchNorm expected input tensor to be on GPU", reason)
    assert set(found.values()) == {("not offered", f"runs: {reason}")}


def test_torch_batch_norm_in_one_process_fails_where_it_is_known_to():
    """The checks judge somebody else's layer fairly: all else that it offers passes."""
    report = _verified("tests.verify.layers:OneProcess", workers=1)
    failed = {check: reason for check, (status, reason) in _by_check(report).items() if status == "failed"}
    assert failed.keys() == {"all-empty", "single-value", "checkpoint", "checkpoint-reentrant"}
    assert re.search("Expected more than 1 value per channel", failed["single-value"])
    assert sum(status == "passed" for status, _ in _by_check(report).values()) >= 45


@pytest.mark.parametrize(("layer", "status"), [("OneProcess", "passed"), ("Breaks", "failed")])
def test_checks_that_need_a_claim_can_pass_and_fail(layer, status):
    subject = subject_of(f"tests.verify.layers:{layer}")
    claiming = replace(subject, claims=subject.claims | {"double backward", "compile"})
    with LocalCrew(1, 60.0) as crew:
        found = _by_check(verify(crew, [claiming], only=["double-backward", "compile"]))
        unclaimed = _by_check(verify(crew, [subject], only=["double-backward", "compile"]))
    assert [found[check][0] for check in ("double-backward", "compile")] == [status] * 2, found
    assert {s for s, _ in unclaimed.values()} == {"not offered"}


def _called(capfd, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["verify", *arguments])
    return int(caught.value.code or 0), *capfd.readouterr()


def test_the_command_prints_lines_and_says_by_its_status_what_came_of_it(capfd):
    status, out, err = _called(capfd, "--workers", "1", "--layer", "tests.verify.layers:OneProcess")
    assert status == 1
    lines = [line.rstrip() for line in out.splitlines()]
    assert any(re.fullmatch(r"passed +equal-shards +outputs, .*", line) for line in lines)
    assert any(re.fullmatch(r"failed +all-empty +a batch without a sample .*", line) for line in lines)
    assert any(
        re.fullmatch(r" +-> num_batches_tracked of rank 0, after .*, is 1.0e\+00 off, .*", line) for line in lines
    )
    assert any(re.fullmatch(r"not offered mask-weights +OneProcess does not claim mask", line) for line in lines)
    assert re.fullmatch(
        r"tests.verify.layers:OneProcess on 1 worker\(s\), gloo, cpu: \d+ passed, 4 failed, \d+ not offered", lines[-1]
    )
    assert err == ""


def test_json_is_one_object_on_standard_output(capfd):
    status, out, err = _called(capfd, "--workers", "1", "--json", "--layer", "syncnorm:SyncBatchNorm")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["workers"], found["backend"], found["device"], found["exit_status"]) == (1, "gloo", "cpu", 0)
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
        (["--layer", "SyncBatchNorm"], "`--layer` must be package.module:Class, got 'SyncBatchNorm'"),
        (["--layer", "torch.nn:Missing"], "`--layer` must name what can be imported, got 'torch.nn:Missing'"),
        (["--layer", "torch:zeros"], "`--layer` must name a class of torch.nn.Module, got 'torch:zeros'"),
        (["--workers", "0"], "--workers"),
        (["--deadline", "0"], "--deadline"),
    ],
    ids=str,
)
def test_bad_arguments_are_status_2(capfd, arguments, message):
    status, out, err = _called(capfd, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_under_torchrun_its_workers_are_those_that_verify(tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "verify", "--json", "--layer", "syncnorm:SyncBatchRenorm"]
    done = commands.run(command, tmp_path, HERE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["workers"], found["exit_status"]) == (2, 0)
    assert sum(result["status"] == "passed" for result in found["results"]) >= 90


@pytest.mark.slow
def test_under_torchrun_a_check_that_hangs_is_the_last(tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "verify", "--json", "--deadline", "10"]
    done = commands.run([*command, "--layer", "tests.verify.mutants:SkipsEmpty"], tmp_path, HERE)
    assert done.returncode == 1
    results = {result["check"]: (result["status"], result["reason"]) for result in json.loads(done.stdout)["results"]}
    assert results["ragged-shards"] == ("passed", "")
    assert results["last-empty"] == ("hangs", "rank 0 did not come back within 10 s")
    assert list(results)[-1] == "last-empty"


@pytest.mark.slow
def test_under_torchrun_what_the_other_rank_does_not_answer_is_told(tmp_path):
    command = [*commands.TORCHRUN, "-m", "syncnorm", "verify", "--deadline", "10"]
    done = commands.run([*command, "--layer", "tests.verify.mutants:SkipsEmptyOnRankZero"], tmp_path, HERE)
    assert done.returncode == 1
    assert re.search(r"hangs +first-empty .*\n +-> no answer from rank 1 within 10 s", done.stdout)
    assert re.search(r"not run +all-but-one-empty +an earlier check hangs", done.stdout)


def test_under_torchrun_bad_arguments_are_told_once(tmp_path):
    done = commands.run([*commands.TORCHRUN, "-m", "syncnorm", "verify", "--workers", "2"], tmp_path, HERE)
    assert done.returncode != 0
    assert done.stderr.count("`--workers` must be left to the launcher, which started 2, got 2") == 1
