"""Layers of other people's: wrong ones, right ones, ones that hang, die or refuse."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import pytest

from syncnorm.verify import LocalRunner, Report, layer_under_test, verify
from syncnorm.verify.checks import all_checks


def _by_check(report: Report) -> dict[str, tuple[str, str]]:
    return {result.check: (result.status, result.reason) for result in report.results}


def _verified(
    layer: str, workers: int = 2, seconds: float = 60.0, only: Collection[str] = ()
) -> Report:
    with LocalRunner(workers, seconds) as runner:
        return verify(runner, [layer_under_test(layer)], only=only)


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
    assert re.search(
        "ranks 0, 1 raised ValueError: SyncBatchNorm expected input tensor to be on GPU", reason
    )
    assert set(found.values()) == {("not offered", "it does not pass runs")}


def test_torch_batch_norm_in_one_process_fails_where_it_is_known_to():
    """The checks judge somebody else's layer fairly: all else that it offers passes."""
    report = _verified("tests.verify.layers:OneProcess", workers=1)
    failed = {
        check: reason for check, (status, reason) in _by_check(report).items() if status == "failed"
    }
    assert failed.keys() == {"all-empty", "single-value", "checkpoint", "checkpoint-reentrant"}
    assert re.search("Expected more than 1 value per channel", failed["single-value"])
    assert sum(status == "passed" for status, _ in _by_check(report).values()) >= 45


@pytest.mark.parametrize(
    ("layer", "taken", "most", "lacking"),
    [
        ("BatchNorm1d", "2-D and 3-D", "3-D", {"shape-nchw", "shape-ncdhw"}),
        ("BatchNorm2d", "4-D", "4-D", {"shape-nc", "shape-ncl", "shape-ncdhw"}),
        ("BatchNorm3d", "5-D", "5-D", {"shape-nc", "shape-ncl", "shape-nchw"}),
    ],
)
def test_a_layer_that_takes_some_dimensions_only_is_checked_in_those_and_that_is_said_once(
    layer, taken, most, lacking
):
    """A layer with one fault, for which a hundred checks were once not offered."""
    report = _verified(
        f"torch.nn:{layer}", workers=1, only=all_checks().keys() - {"ddp", "subgroups"}
    )
    found = _by_check(report)
    failed = {check: reason for check, (status, reason) in found.items() if status == "failed"}
    assert failed.keys() == {"all-empty", "single-value", "checkpoint", "checkpoint-reentrant"}, (
        failed
    )
    said = f"{layer} takes {taken} inputs only; the checks give it others as {most}"
    assert [reason for status, reason in found.values() if status == "passed" and reason] == [said]
    shapes = {name: found[name] for name in ("shape-nc", "shape-ncl", "shape-nchw", "shape-ncdhw")}
    assert {name for name, (status, _) in shapes.items() if status == "not offered"} == lacking
    assert {status for name, (status, _) in shapes.items() if name not in lacking} == {"passed"}


def test_checks_that_need_a_claim_can_pass_and_fail():
    names = ["double-backward", "compile"]
    with LocalRunner(1, 60.0) as runner:
        for layer, status in (("OneProcess", "passed"), ("Breaks", "failed")):
            under_test = layer_under_test(f"tests.verify.layers:{layer}")
            claiming = replace(
                under_test, claims=under_test.claims | {"double backward", "compile"}
            )
            found = _by_check(verify(runner, [claiming], only=names))
            assert [found[check][0] for check in names] == [status] * 2, found
            unclaimed = _by_check(verify(runner, [under_test], only=names))
            assert {s for s, _ in unclaimed.values()} == {"not offered"}


def test_a_pooling_layer_of_another_make_passes_the_double_backward_check():
    under_test = layer_under_test("tests.verify.layers:Pooled")
    claiming = replace(under_test, claims=under_test.claims | {"double backward"})
    with LocalRunner(3, 60.0) as runner:
        report = verify(runner, [claiming], only=["double-backward"])
    assert _by_check(report) == {"double-backward": ("passed", "")}
