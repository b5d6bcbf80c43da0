"""Steps to a given accuracy, with batch norm and without, at 1, 5 and 30 times the learning rate.

    python -m benchmarks.steps_to_accuracy DATA_FOLDER OUT [--minutes 30] [--seeds 3]

The claim of Ioffe and Szegedy 2015, arXiv:1502.03167, section 4.2.2 and figure 3, for this data: the
accuracy is the best that the network without normalisation reaches on validation samples within
2,048 steps, at the rate of six that is best for it. Then the same network is trained with and
without batch norm at that rate, 5 and 30 times of it, until it has reached the same accuracy. The
rate is constant, and there is no weight decay; accuracy is looked at every 32 steps. The sigmoid
network is that of the paper's first experiment, with layers of 128 for its 100.

Results are kept as by `benchmarks.regimes`, seed by seed; writes OUT/table.md.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.regimes import CHOOSING_SEED, Plan, begin
from benchmarks.study import Job, Result, Study, spread

NETWORKS = ("convolutional", "sigmoid")
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
FACTORS = (1, 5, 30)
EVERY, EPOCHS = 32, 16
NORMS = {
    "none": ("norm.name=none", "norm.sync=none"),
    "batch norm": ("norm.name=sync_batch_norm", "norm.sync=batch", "norm.momentum=0.1"),
}


class Found(NamedTuple):
    """What a network's runs gave.

    Args:
        rate: that is best without normalisation.
        wanted: of each seed, the accuracy to be reached.
        steps: by norm, factor and seed, the steps to it; None where it was not reached.
        fails: norms, factors and seeds whose loss was not finite.
    """

    rate: float
    wanted: dict[int, float]
    steps: dict[tuple[str, int], dict[int, int | None]]
    fails: set[tuple[str, int, int]]


def job(plan: Plan, network: str, norm: str, seed: int, rate: float, until: float = 2.0) -> Job:
    """A run at a constant rate."""
    constant = ("train.schedule.name=constant", "train.schedule.warmup=0")
    options = (*plan.base(network, seed, rate), *constant, "train.optimizer.weight_decay=0")
    return Job((*options, *NORMS[norm]), 1, EVERY, until)


def choose(study: Study, plan: Plan) -> dict[str, float]:
    """Choose the rate of each network that there is time for: the best one without a norm."""
    rates = {}
    for network in plan.networks:
        choices = {rate: job(plan, network, "none", CHOOSING_SEED, rate) for rate in RATES}
        if not study.run(choices.values()):
            break
        best = {
            rate: max(study.results[each.key]["seen"], default=0) for rate, each in choices.items()
        }
        rates[network] = max(best, key=lambda rate: best[rate])
    return rates


def make(study: Study, plan: Plan, network: str, rate: float, seed: int) -> bool:
    """Make the runs of a seed; False if the budget ends before."""
    first = job(plan, network, "none", seed, rate)
    if not study.run([first]):
        return False
    others = jobs(plan, network, rate, seed, max(study.results[first.key]["seen"]))
    return study.run(others.values())


def jobs(
    plan: Plan, network: str, rate: float, seed: int, wanted: float
) -> dict[tuple[str, int], Job]:
    """The runs of a seed, by norm and factor; the first goes on beyond the accuracy wanted."""
    first = {("none", 1): job(plan, network, "none", seed, rate)}
    cells = [(norm, factor) for norm in NORMS for factor in FACTORS]
    return first | {
        (norm, factor): job(plan, network, norm, seed, rate * factor, wanted)
        for norm, factor in cells[1:]
    }


def collect(study: Study, plan: Plan, network: str, rate: float) -> Found:
    """Collect the results of all seeds whose runs have all been made."""
    found = Found(rate, {}, {}, set())
    for seed in range(plan.seeds):
        first = study.result(job(plan, network, "none", seed, rate))
        if first is None:
            continue
        wanted = max(first["seen"])
        results = {
            cell: study.result(each)
            for cell, each in jobs(plan, network, rate, seed, wanted).items()
        }
        if None in results.values():
            continue
        found.wanted[seed] = wanted
        for cell, result in results.items():
            assert result is not None
            found.steps.setdefault(cell, {})[seed] = steps_to(result, wanted)
            if result["accuracy"] is None:
                found.fails.add((*cell, seed))
    return found


def steps_to(result: Result, wanted: float) -> int | None:
    """The first step at which an accuracy was seen; None if it was not."""
    reached = (n for n, seen in enumerate(result["seen"], start=1) if seen >= wanted)
    first = next(reached, None)
    return None if first is None else EVERY * first


def table(network: str, found: Found) -> list[str]:
    """The lines of a network's table."""
    whole = list(found.wanted)
    if not whole:
        return [f"{network}: no seed is complete yet"]
    middle, half = spread(found.wanted)
    lines = [
        f"{network.capitalize()} network, rate {found.rate:g}, to {100 * middle:.1f} % "
        f"±{100 * half:.1f}, n {len(whole)}:",
        "",
        "| normalisation | rate | steps, each seed | fewer than without at the base rate |",
        "|---|---|---|---|",
    ]
    for (norm, factor), by_seed in found.steps.items():
        texts = [
            "not finite" if (norm, factor, s) in found.fails else f"{n or 'not reached'}"
            for s, n in by_seed.items()
        ]
        base, known = found.steps["none", 1], [n for n in by_seed.values() if n]
        ratio = (
            ""
            if len(known) < len(whole)
            else f"{sum(base[s] or 0 for s in whole) / sum(known):.1f}"
        )
        lines.append(f"| {norm} | {factor} x | {', '.join(texts)} | {ratio} |")
    return lines


def main() -> None:
    given = begin(__doc__, minutes=30.0).parse_args()
    plan = Plan(given.root, given.data, given.samples, EPOCHS, given.seeds, NETWORKS)
    lines = [
        f"{given.data}, {given.samples} training samples, steps of 64, accuracy every {EVERY}."
    ]
    with Study(given.out, given.minutes) as study:
        rates = choose(study, plan)
        seeds = ((seed, network) for seed in range(plan.seeds) for network in rates)
        is_whole = len(rates) == len(NETWORKS) and all(
            make(study, plan, network, rates[network], seed) for seed, network in seeds
        )
        for network, rate in rates.items():
            lines += ["", *table(network, collect(study, plan, network, rate))]
    lines += [] if is_whole else ["", "partial: call it again to go on"]
    text = "\n".join(lines)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
