"""Sentences from the numbers of a diagnosis: what stands out, and what helps.

A rule is a function of all measures that yields sentences, with the figures that it judges by. It
is silent where a measure is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Measures = Mapping[str, Mapping[str, Any]]
Rule = Callable[[Measures], Iterator[str]]

# Shares of the variance beyond what chance leaves between workers.
_BETWEEN = 0.15
# Of running statistics, in standard deviations, and of the logarithm of these.
_LAG, _FROZEN_GAP = 0.05, 0.5
# What wrong statistics must cost to be worth a word: a share of the loss, and at least so much.
_LOSS_SHARE, _LOSS = 0.25, 0.02
# With 4 samples per statistic ImageNet loses 4 points against 32 (Ioffe 2017, section 4.2).
_FEW_SAMPLES = 4
_NOISE, _FLAT, _RATIO, _COSINE = 0.05, 0.1, 100.0, 0.05
_EARLIER = "Diagnose an earlier checkpoint (--checkpoint)."
# Of a worker's mean, in standard deviations.
_OUTLIER = 0.5


@dataclass(frozen=True)
class Advice:
    """One sentence.

    Args:
        rule: its name in `RULES`.
        text: what stands out, with its figures, and what helps.
    """

    rule: str
    text: str


def advise(measures: Measures) -> list[Advice]:
    """Collect what the rules have to say about the measures of a `Diagnosis`."""
    return [Advice(name, text) for name, rule in RULES.items() for text in rule(measures)]


def _not_finite(measures: Measures) -> Iterator[str]:
    loss = measures.get("statistics", {}).get("loss", {})
    if "population" in loss and loss["population"] is None:
        yield (
            "the loss is NaN or infinite by the data's own statistics: weights or samples are, or "
            f"activations overflow. {_EARLIER} Look at the samples; lower train.lr, or set "
            "train.clip."
        )


def _between_workers(measures: Measures) -> Iterator[str]:
    excess = {
        name: (each["between_share"] - each["chance_share"]) / (1 - each["chance_share"])
        for name, each in _layers(measures).items()
        if not each["is_pooled"]
        and not each["is_frozen"]
        and each["between_share"] is not None
        and each["chance_share"] is not None
        and each["chance_share"] < 1
    }
    if found := _worst(excess, _BETWEEN):
        worst, _, more = found
        each = _layers(measures)[worst]
        yield (
            f"{_percent(each['between_share'])} of {worst}'s variance lies between workers, where "
            f"samples shared out at random would leave {_percent(each['chance_share'])}"
            f"{more}: pool it (norm.sync: batch), or let every worker see all data."
        )


def _running_lag(measures: Measures) -> Iterator[str]:
    loss = measures.get("statistics", {}).get("loss", {})
    now, then = loss.get("evaluation"), loss.get("population")
    if then is None:
        return
    if now is None:
        # Other methods' statistics are left by `recalibrate`.
        recalibrates = any(each["recalibrates"] for each in _layers(measures).values())
        yield (
            "evaluation has a loss of NaN or infinity by the running statistics, and of "
            f"{then:.3g} by the data's. "
            + ("Recalibrate (syncnorm recalibrate RUN)." if recalibrates else _EARLIER)
        )
        return
    if now - then <= max(_LOSS, _LOSS_SHARE * abs(then)):
        return
    gaps = {name: _gap(e) for name, e in _layers(measures).items() if not e["is_frozen"]}
    if found := _worst(gaps, _LAG):
        worst, gap, more = found
        ways = ["recalibrate (syncnorm recalibrate RUN)"] * _layers(measures)[worst]["recalibrates"]
        text = ", or ".join([*ways, _way_to_follow(measures, _layers(measures)[worst])])
        yield (
            f"running statistics are not those of the data: {worst}'s are {gap:.2g} "
            f"standard deviations off{more}, and evaluation has a loss of {now:.3g}, with "
            f"the data's {then:.3g}. {text[0].upper()}{text[1:]}."
        )


def _way_to_follow(measures: Measures, layer: Mapping[str, Any]) -> str:
    """What keeps running statistics at the data's."""
    if not layer["pools_running"] and measures["statistics"]["parts"] > 1:
        return "pool them (norm.sync: running, or batch): each worker's follow its own data"
    momentum = layer["momentum"]
    return f"train with a larger momentum{'' if momentum is None else f' than {momentum:g}'}"


def _frozen_far_off(measures: Measures) -> Iterator[str]:
    gaps = {name: _gap(e) for name, e in _layers(measures).items() if e["is_frozen"]}
    if found := _worst(gaps, _FROZEN_GAP):
        worst, gap, more = found
        yield (
            f"{worst} is frozen, and its running statistics are {gap:.2g} standard "
            f"deviations from the data's{more}: recalibrate before it is frozen, or train "
            "it, too."
        )


def _few_samples(measures: Measures) -> Iterator[str]:
    samples = measures.get("statistics", {}).get("samples")
    names = [name for name, each in _layers(measures).items() if not each["is_frozen"]]
    if names and samples is not None and samples <= _FEW_SAMPLES:
        yield (
            f"each statistic is over {samples} sample{'s' if samples != 1 else ''}: too few to "
            "stand for the data. Pool over more workers, take a larger train.norm_batch, or use "
            "batch renormalisation or group normalisation."
        )


def _noise_in_front(measures: Measures) -> Iterator[str]:
    ratios = {n: e["noise_ratio"] for n, e in _layers(measures).items() if e["noise_ratio"]}
    if found := _worst(ratios, 1 + _NOISE):
        worst, ratio, more = found
        yield (
            f"dropout makes the variance in front of {worst} {ratio:.2f} times as large in "
            f"training as in evaluation{more}: put it behind the last normalisation."
        )


def _flat_channels(measures: Measures) -> Iterator[str]:
    shares = {name: each["flat_share"] or 0.0 for name, each in _layers(measures).items()}
    if found := _worst(shares, _FLAT):
        worst, share, more = found
        yield (
            f"{_percent(share)} of the channels in front of {worst} are the same for all "
            f"samples{more}: they are dead. A lower learning rate or another "
            "initialisation keeps them alive; what stays dead may be pruned."
        )


def _gradient_by_depth(measures: Measures) -> Iterator[str]:
    found = measures.get("gradients", {})
    ratio, count = found.get("ratio"), len(found.get("layers", {}))
    if ratio is None or count < 3 or 1 / _RATIO <= ratio <= _RATIO:
        return
    norms = _layers(measures)
    helps = (
        "normalise the layers, or scale their initial weights"
        if not norms
        else ("lower the learning rate, clip the gradient, or add residual connections")
    )
    way = "grows" if ratio > 1 else "vanishes"
    yield (
        f"the gradient {way} towards the input: the first layer's is {ratio:.2g} times the last "
        f"one's, over {count} layers (slope {found['slope']:+.2g} in log2 per layer): {helps}."
    )


def _rate_too_large(measures: Measures) -> Iterator[str]:
    found = measures.get("smoothness", {})
    if not found or 1.0 not in found["steps"]:
        return
    before, after = found["loss"], found["losses"][found["steps"].index(1.0)]
    if after is None:
        after = float("inf")
    if before is not None and after > before + 1e-6 * abs(before):
        smoothness = found["smoothness"]
        bound = f" (2 / smoothness is {2 / smoothness:.2g})" if smoothness else ""
        yield (
            f"a step of the learning rate along the gradient raises the loss of its own batch from "
            f"{before:.3g} to {after:.3g}: lower train.lr{bound}."
        )


def _odd_worker(measures: Measures) -> Iterator[str]:
    for name, each in _layers(measures).items():
        gaps = each["part_gaps"]
        if len(gaps) < 3 or None in gaps:
            continue
        worst = max(range(len(gaps)), key=lambda part: gaps[part])
        others = max(gaps[:worst] + gaps[worst + 1 :])
        # The odd one pulls the mean away from the others, each by its share.
        pulled = gaps[worst] / (len(gaps) - 1) + (each["chance_share"] or 0.0) ** 0.5
        if gaps[worst] > _OUTLIER and others <= pulled and others < gaps[worst] / 1.5:
            yield (
                f"worker {worst}'s data differ from the others': in front of {name} its mean is "
                f"{gaps[worst]:.2g} standard deviations off, theirs at most {others:.2g}. Look at "
                "what it reads."
            )
            return


def _not_invariant(measures: Measures) -> Iterator[str]:
    cosines = {
        name: abs(each["cosine"])
        for name, each in measures.get("gradients", {}).get("layers", {}).items()
        if each["is_invariant"] and each["cosine"] is not None
    }
    if found := _worst(cosines, _COSINE):
        worst, cosine, more = found
        yield (
            f"{worst} is followed by a normalisation, and its gradient should be orthogonal to its "
            f"weights, but their cosine is {cosine:.2g}{more}: that normalisation's "
            "gradient leaves out its statistics, or they are not those of the batch."
        )


RULES: dict[str, Rule] = {
    "not finite": _not_finite,
    "between workers": _between_workers,
    "odd worker": _odd_worker,
    "running statistics": _running_lag,
    "frozen statistics": _frozen_far_off,
    "few samples": _few_samples,
    "dropout": _noise_in_front,
    "dead channels": _flat_channels,
    "gradient by depth": _gradient_by_depth,
    "learning rate": _rate_too_large,
    "invariance": _not_invariant,
}
"""The advisers by name, in the order in which they speak."""


def _layers(measures: Measures) -> Mapping[str, Any]:
    return measures.get("statistics", {}).get("layers", {})


def _gap(layer: Mapping[str, Any]) -> float:
    return max(layer["mean_gap"] or 0.0, layer["var_gap"] or 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _worst(values: Mapping[str, float], bound: float) -> tuple[str, float, str] | None:
    """Find the layer with the largest value, if that is above a bound.

    Returns:
        Its name, its value, and a clause about the others above the bound.
    """
    above = {name: value for name, value in values.items() if value > bound}
    if not above:
        return None
    worst, more = max(above, key=lambda name: above[name]), len(above) - 1
    others = f" (and so for {more} other layer{'s' if more > 1 else ''})" if more else ""
    return worst, above[worst], others
