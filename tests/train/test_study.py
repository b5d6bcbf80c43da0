"""Studies of small trainings: what stands for live workers, what is kept, what is compared."""

from __future__ import annotations

import json

import pytest

from benchmarks import regimes, regimes_page, steps_to_accuracy, study
from benchmarks.regimes import COLUMNS, NETWORKS, ROWS, TARGET, Plan
from benchmarks.study import Job, Study
from syncnorm.train.config.file import load_config

PLAN = Plan("nowhere", "digits", 192, 2, 2, NETWORKS)
OPENED = ["norm.renorm.warmup_steps=0", "norm.renorm.r_steps=1", "norm.renorm.d_steps=1"]


def job(network: str, options: tuple[str, ...], workers: int, *more: str) -> Job:
    """A run on digits, each part of whose steps has labels of its own."""
    base = PLAN.base(network, 0, 0.05)
    if network != "convolutional":
        base = (*base, "model.options.side=8")
    shards = COLUMNS["sharded labels, 4 workers"].options
    return Job((*base, "train.dtype=float64", "data.root=null", *shards, *options, *more), workers)


def train(pool, a_job: Job) -> study.Result:
    result = pool(a_job.workers).run(study.train, a_job)[0]
    assert result["step"] == 6
    return result


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("row", "live"),
    [
        (TARGET, ROWS["batch norm, pooled"].options),
        ("batch norm, lagged", ROWS["batch norm, lagged"].options),
        ("batch norm, local", ("norm.name=batch_norm", "norm.sync=none", "norm.momentum=0.1")),
        ("renorm, local", ("norm.name=sync_batch_renorm", "norm.sync=none", "norm.momentum=0.1")),
        ("renorm, pooled", ROWS["renorm, pooled"].options),
        (
            "renorm, running",
            ("norm.name=sync_batch_renorm", "norm.sync=running", "norm.momentum=0.1"),
        ),
        ("l1 batch norm", ROWS["l1 batch norm"].options),
    ],
)
def test_one_process_stands_for_four_workers(pool, row, live, network):
    """In losses and, by the running statistics, in the evaluation."""
    opened = OPENED if row.startswith("renorm") else []
    alone = [option.format(part=16, workers=4) for option in ROWS[row].options]
    one = train(pool, job(network, tuple(alone), 1, *opened))
    many = train(pool, job(network, live, 4, *opened))
    assert many["losses"] == one["losses"]
    for split in ("accuracy", "validation"):
        assert many[split] == pytest.approx(one[split], rel=1e-12)


def test_local_statistics_are_another_training(pool):
    losses = []
    for row in ("batch norm, local", "batch norm, pooled"):
        options = [option.format(part=16, workers=4) for option in ROWS[row].options]
        losses.append(train(pool, job("convolutional", tuple(options), 1))["losses"])
    assert losses[0] != losses[1]


def test_each_worker_is_judged_by_its_own_statistics(pool):
    options = [option.format(workers=4) for option in ROWS["batch norm, local"].options]
    own = train(pool, job("convolutional", tuple(options), 1))
    options = (*ROWS[TARGET].options, "train.norm_batch=16")
    pooled = train(pool, job("convolutional", options, 1))
    assert own["losses"] == pooled["losses"]
    assert own["accuracy"] != pooled["accuracy"]


def test_corrections_have_a_part_in_what_is_compared(pool):
    alone = [option.format(part=16, workers=4) for option in ROWS["renorm, running"].options]
    opened, closed = (
        train(pool, job("convolutional", tuple(alone), 1, *more)) for more in (OPENED, [])
    )
    assert opened["losses"] != closed["losses"]


def test_a_run_that_has_a_result_is_not_made_again(tmp_path, monkeypatch):
    made = []

    class Pool:
        def run(self, function, a_job):
            made.append(a_job)
            return [{"accuracy": 0.5}]

    monkeypatch.setattr(Study, "_pool", lambda self, workers: Pool())
    jobs = [Job(("a=1",)), Job(("a=2",)), Job(("a=1",))]
    with Study(tmp_path, minutes=1) as first:
        assert first.run(jobs[:1])
    with (tmp_path / study.RESULTS).open("a") as file:
        file.write('{"key": "torn')
    with Study(tmp_path, minutes=1) as second:
        assert second.run(jobs)
    with Study(tmp_path, minutes=0) as third:
        assert third.run(jobs)
        assert not third.run([Job(("a=3",))])
    assert made == jobs[:2]
    assert len((tmp_path / study.RESULTS).read_text().splitlines()) == 3


def test_rows_are_compared_over_the_same_seeds(tmp_path):
    rates: dict[str, float] = dict.fromkeys(NETWORKS, 0.1)
    study_of = Study(tmp_path, minutes=0)
    blocks = list(PLAN.blocks(rates))
    # Of the second seed one run of the last block is missing.
    cut = blocks.index((1, "sharded labels, 4 workers", "convolutional"))
    for seed, column, network in blocks[: cut + 1]:
        for row, each in PLAN.block(seed, column, network, 0.1).items():
            if (seed, column, network) != blocks[cut] or row != "none":
                accuracy = None if row == "none" else 0.8 + 0.01 * seed
                study_of.results[each.key] = {"accuracy": accuracy}
    cells = regimes.collect(study_of, PLAN, rates)
    local = cells["convolutional"]["batch norm, local"]
    assert local["label groups, 4 workers"] == {0: 0.8, 1: 0.81}
    assert local["sharded labels, 4 workers"] == {0: 0.8}
    text = regimes_page.write(tmp_path, cells, PLAN, rates)
    line = next(line for line in text.splitlines() if line.startswith("| batch norm, local"))
    assert line.split(" | ")[1:4] == ["80.5 ±0.5", "80.5 ±0.5", "80.0"]
    assert "| none | 10.0* ±0.0 |" in text
    assert text in (tmp_path / "table.md").read_text()
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_lowest_rate_that_is_about_best_is_chosen(tmp_path):
    study_of = Study(tmp_path, minutes=1)
    for network, best in zip(NETWORKS, (0.5, 0.02)):
        for rate, each in PLAN.choices(network).items():
            accuracy = None if rate == 1.0 else 0.85 - 0.03 * (rate != best)
            study_of.results[each.key] = {"validation": accuracy}
    higher = PLAN.choices("fully_connected")[0.05].key
    study_of.results[higher] = {"validation": 0.859}
    assert regimes.choose(study_of, PLAN) == {"convolutional": 0.5, "fully_connected": 0.02}


def test_what_does_not_depend_on_the_workers_is_trained_once():
    def made(row: str, column: str) -> Job | None:
        return PLAN.job("convolutional", row, column, 0, 0.1)

    assert made(TARGET, "iid, 2 workers") == made(TARGET, "4 samples")
    assert made("batch norm, local", "iid, 2 workers") != made(
        "batch norm, local", "iid, 4 workers"
    )
    few = made("batch norm, local", "4 samples")
    assert few is not None
    assert "train.norm_batch=4" in few.options
    assert few.workers == 1
    assert made("batch norm, pooled", "4 samples") is None


def test_every_cell_is_a_configuration():
    plan = PLAN._replace(data="fashion_mnist", seeds=1)
    jobs: set[Job] = set()
    for seed, column, network in plan.blocks(dict.fromkeys(NETWORKS, 0.1)):
        jobs.update(plan.block(seed, column, network, 0.1).values())
    for each in jobs:
        load_config("digits", each.options)
        assert json.loads(each.key)[1] in (1, 2, 4)
    # Those that need them alone are made on live workers.
    assert sum(each.workers > 1 for each in jobs) == 7 * len(NETWORKS)


def test_steps_are_those_at_which_an_accuracy_was_seen_first(tmp_path, monkeypatch):
    """Without a norm the best is 0.7, at the fourth look; with it that is seen at the second."""
    made: list[Job] = []

    def run(self, jobs):
        for each in jobs:
            made.append(each)
            seen = [0.1, 0.4, 0.6, 0.7, 0.65]
            if "norm.name=sync_batch_norm" in each.options:
                seen = [0.5, 0.72]
            self.results[each.key] = {"seen": seen, "accuracy": seen[-1]}
        return True

    monkeypatch.setattr(Study, "run", run)
    plan = PLAN._replace(data="fashion_mnist", networks=("sigmoid",))
    study_of = Study(tmp_path, 1)
    rates = steps_to_accuracy.choose(study_of, plan)
    for seed in (0, 1):
        assert steps_to_accuracy.make(study_of, plan, "sigmoid", rates["sigmoid"], seed)
    found = steps_to_accuracy.collect(study_of, plan, "sigmoid", rates["sigmoid"])
    assert found.wanted == {0: 0.7, 1: 0.7}
    # All rates are as good here, so the first is taken.
    assert found.rate == steps_to_accuracy.RATES[0]
    assert found.steps["none", 1] == {0: 128, 1: 128}
    assert found.steps["batch norm", 5] == {0: 64, 1: 64}
    lines = steps_to_accuracy.table("sigmoid", found)
    assert "| batch norm | 30 x | 64, 64 | 2.0 |" in lines
    assert {each.until for each in made} == {2.0, 0.7}
    # A seed counts once all its runs are made.
    del study_of.results[made[-1].key]
    found = steps_to_accuracy.collect(study_of, plan, "sigmoid", rates["sigmoid"])
    assert list(found.wanted) == [0]


def test_what_is_not_reached_and_what_fails_are_said():
    steps: dict[tuple[str, int], dict[int, int | None]]
    steps = {(norm, n): {0: 64} for norm in ("none", "batch norm") for n in (1, 5, 30)}
    steps["none", 30] = {0: None}
    steps["none", 5] = {0: None}
    found = steps_to_accuracy.Found(0.1, {0: 0.8}, steps, {("none", 30, 0)})
    lines = steps_to_accuracy.table("sigmoid", found)
    assert "| none | 30 x | not finite |  |" in lines
    assert "| none | 5 x | not reached |  |" in lines
