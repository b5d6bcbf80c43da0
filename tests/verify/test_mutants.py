"""Every check can fail: some defect planted in our layers makes it, and it says by how much."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from syncnorm.verify import LocalRunner, layer_under_test, verify
from syncnorm.verify.checks import all_checks

OFF = r"(output|input gradient|gradient|running_\w+).* is (a share of )?\d\.\de[+-]\d+ off"

# Defect -> the checks that must see it, and what all of them say.
MUTANTS: dict[str, tuple[str, str]] = {
    "Raises": ("runs", "ranks 0, 1 raised RuntimeError: cannot"),
    "Local": (
        "equal-shards ragged-shards one-sample-each last-empty first-empty all-but-one-empty "
        "exact-on-integers "
        "empty-then-full single-value two-values constant-channel mask-weights mask-removes "
        "mask-zero-on-one "
        "mask-on-one float32 bfloat16 float16 float64-large-mean float32-large-mean shape-nc "
        "shape-ncl shape-nchw "
        "shape-ncdhw channels-last channels-last-3d strided expanded-gradient large-eps no-affine "
        "used-twice "
        "two-forwards-then-backward no-grad buffers-equal differs-from-local ddp ddp-ragged "
        "gradient-needed-on-some gradient-needed-on-some-only",
        rf"{OFF}|(weight|bias) of rank \d after three steps is \S+ off|is that of its own shard "
        r"alone, to within",
    ),
    "LocalGradient": ("equal-shards ragged-shards checkpoint used-twice ddp", f"{OFF}|after three steps is"),
    "RankZero": ("permuted-ranks equal-shards", OFF),
    "Noisy": ("same-bits-again", r"output of rank 0, a second time, is \S+ off, allowed 0"),
    "FloatWire": ("equal-shards float64-large-mean float32-large-mean", OFF),
    "NarrowWire": ("float16-large float16-many", r"is (nan|inf)|off"),
    "Coarse": ("bfloat16 float16", r"output of rank 0 is \S+ off, allowed \S+, twice torch's own"),
    "CountsEmpty": ("all-empty mask-zero-everywhere", "num_batches_tracked of rank 0, .*, is 1.0e.00 off, allowed 0"),
    "CountsDouble": ("counted-once", "num_batches_tracked of rank 0 is 2 after 1 batches"),
    "InfiniteBessel": ("single-value", "running_var of rank 0 is (nan|inf), should be"),
    "Biased": ("global-count", r"running_var is 5.0e-01|running_var is \S+ off"),
    "InverseStd": ("float32-small-variance", r"running_var of rank 0 is a share of \S+ off, allowed 1.0e-04"),
    "IgnoresMask": (
        "mask-weights mask-removes mask-zero-on-one mask-zero-everywhere mask-on-one bad-mask",
        "off|a negative weight in a mask raises nothing",
    ),
    "MasksEvaluation": ("mask-in-evaluation", "output in evaluation, with a mask, is"),
    "Contiguous": ("layout-kept", r"of channels-last input has strides \(60, 15, 5, 1\), should be \(60, 1, 20, 4\)"),
    "RefusesStrides": ("strided channels-last channels-last-3d", "raised RuntimeError: view size is not compatible"),
    "AssumesLength": ("shape-nc shape-nchw shape-ncdhw", r"raised ValueError: expected 3D input \(got [245]D input\)"),
    "MomentumDefault": ("momentum-none momentum-one", r"step 2: running_mean|running_(mean|var) of rank 0 is \S+ off"),
    "DoubleEps": ("large-eps evaluation", OFF),
    "AlwaysAffine": ("no-affine no-running-stats", "is .* off|missing|raised"),
    "NeedsInputGradient": ("input-without-gradient", "gradient of weight is missing on rank"),
    "NeedsParameterGradients": ("frozen-parameters frozen-bias", "missing"),
    "PooledParameterGradients": ("local-parameter-sums", r"gradient of bias on rank 0 is \S+ off"),
    "Overwrites": ("gradients-accumulate", r"input gradient, twice, of rank 0 is \S+ off"),
    "RemembersOneForward": ("two-forwards-then-backward used-twice", OFF),
    "CountsRepetitions": ("checkpoint checkpoint-reentrant", "running_mean|num_batches_tracked of rank 0 is 1.0"),
    "LocalWithoutGrad": ("no-grad", OFF),
    "LocalSecond": ("double-backward", r"second derivative by the input of rank 0 is \S+ off, allowed"),
    "SevenfoldByInput": ("double-backward", r"second derivative by the input of rank 0 is \S+ off, allowed"),
    "SevenfoldByWeight": ("double-backward", r"second derivative by weight, summed over ranks, is \S+ off, allowed"),
    "SevenfoldByGradient": (
        "double-backward",
        r"second derivative by the output's gradient of rank 0 is \S+ off, allowed",
    ),
    "DetachesBiasGradient": ("double-backward", r"second derivative by the output's gradient of rank 0 is \S+ off"),
    "LocalCompiled": ("compile", OFF),
    "CompiledForgets": ("compile", r"step 1: running_mean of rank 0 is \S+ off"),
    "Drifts": ("buffers-equal", r"running_mean of rank 1, against rank 0, is \S+ off, allowed 0"),
    "CastsBuffers": ("buffers-keep-type", "running_mean is torch.bfloat16"),
    "HalvesBuffers": ("half-layer", r"running_mean is torch.float16 after .half\(\), should be torch.float32"),
    "WritesWeight": ("parameters-stay", "weight of rank 0 is 1.0e-03 off, allowed 0"),
    "WritesInput": ("input-stays", "input of rank 0 is 1.0e.00 off, allowed 0"),
    "NeverResets": ("reset", r"running_mean after a reset is \S+ off, allowed 0"),
    "EvaluatesBatch": ("evaluation evaluation-float32 evaluation-gradient evaluation-one-sample", r"is \S+ off|raised"),
    "EvaluationUpdates": ("evaluation-changes-nothing", r"running_mean of rank 0 after evaluation is \S+ off"),
    "EvaluatesTogether": ("evaluation-silent", r"rank 0 made 1 exchange\(s\) in evaluation \(\[\('broadcast', 4\)\]\)"),
    "EvaluatesNoEmpty": ("evaluation-empty", "ranks 0, 1 raised ValueError: batch is empty"),
    "IgnoresGroup": ("subgroups", r"output of rank 0 is \S+ off that of group \[0\], allowed 1e-10"),
    "ExtraBuffer": ("state-dict-keys loads-batch-norm", "extra"),
    "HiddenState": ("state-dict-round-trip", r"output of a layer with its state dict, on rank 0, is \S+ off"),
    "CopiesItself": ("deepcopy", r"of a deep copy, on rank 0, is \S+ off, allowed 0"),
    "PicklesNothing": ("pickle", "of a pickled copy"),
    "NeverCasts": ("moves-to-a-type", "weight is torch.float32 after .double.., should be torch.float64"),
    "TwoMessages": (
        "messages messages-empty messages-mask messages-half",
        r"rank 0 sends \[\('allreduce', 1\), \('allreduce', 10\)\] forward, should send one "
        r"all-reduce of 8 to 10",
    ),
    "GatedExchange": ("messages-no-gradient", r"rank 0 sends \[\] backward, should send one all-reduce of 8 to 10"),
    "AcceptsAnything": ("wrong-channels wrong-dimensions", "x of .* raises nothing"),
    "HidesNaN": ("nan-is-seen", "output of rank 0 hides that the input of rank 1 has a NaN"),
    "StuckAtBatchNorm": (
        "renorm-clipped renorm-partly-clipped renorm-unclipped renorm-trains-as-it-evaluates "
        "renorm-schedule "
        "renorm-ramp renorm-old-statistics renorm-std renorm-mask",
        OFF,
    ),
    "NeverClips": ("renorm-clipped renorm-partly-clipped renorm-is-batch-norm renorm-clock-stops", OFF),
    "VaryingCorrection": ("renorm-constant-r-and-d", OFF),
    "NewStatistics": ("renorm-old-statistics", OFF),
    "AveragesTheOther": ("renorm-std renorm-var", r"running_var of rank 0 is \S+ off"),
    "LateClock": ("renorm-schedule renorm-ramp", "step 3: output of rank 0 is"),
    "CountsEmptyRenorm": ("renorm-clock-stops all-empty", "output of the first batch with samples|num_batches_tracked"),
    "IgnoresMaskRenorm": ("renorm-mask", OFF),
}  # fmt: skip

# Of these a check that is run on live workers finds that they wait for each other.
HANGING: dict[str, tuple[str, str]] = {
    "GatedExchange": (
        "gradient-needed-on-some gradient-needed-on-some-only",
        "no answer from rank 1 within 3 s",
    ),
    "RaisesAlone": ("bad-mask", "no answer from rank 0 within 3 s"),
    "SkipsEmpty": (
        "last-empty ddp-empty",
        "no answer from ranks? [01](, 1)? within 3 s(; rank 0 raised .*)?",
    ),
    "EvaluatesTogether": ("evaluation-alone", "no answer from rank 0 within 3 s"),
}


@pytest.fixture(scope="module")
def runner() -> Iterator[LocalRunner]:
    with LocalRunner(2, 60.0) as runner:
        yield runner


def _results(runner: LocalRunner, mutant: str, checks: str) -> dict[str, tuple[str, str]]:
    report = verify(
        runner, [layer_under_test(f"tests.verify.mutants:{mutant}")], only=checks.split()
    )
    assert report.exit_status == 1
    return {result.check: (result.status, result.reason) for result in report.results}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_defect_is_seen(runner, mutant):
    checks, pattern = MUTANTS[mutant]
    results = _results(runner, mutant, checks)
    assert results.keys() == set(checks.split())
    for check, (status, reason) in results.items():
        assert status == "failed", (check, status, reason)
        assert re.search(pattern, reason), (check, reason)


@pytest.mark.slow  # for the pools that are started again
@pytest.mark.parametrize("mutant", HANGING)
def test_a_defect_that_makes_workers_wait_is_seen(mutant):
    checks, reason = HANGING[mutant]
    with LocalRunner(2, 3.0) as runner:
        results = _results(runner, mutant, checks)
    assert results.keys() == set(checks.split())
    for check, (status, got) in results.items():
        assert status == "hangs", (check, status, got)
        assert re.fullmatch(reason, got), (check, got)


def test_every_check_can_fail():
    seen = {
        check for checks, _ in [*MUTANTS.values(), *HANGING.values()] for check in checks.split()
    }
    assert seen == all_checks().keys()
