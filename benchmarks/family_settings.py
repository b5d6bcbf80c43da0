"""Accuracy of the family's averaging methods by setting and learning rate, and by their formulas.

    python -m benchmarks.family_settings DATA_FOLDER OUT [--minutes 30] [--seeds 1]

For methods that lose accuracy in `benchmarks.regimes`: whether it is the method or our layer. A row
"by the formula" trains the same network on the oracle of the method, in float64, in one process: a
fault of the layer would show as a difference. The other rows have settings of the papers: what the
layer stands behind, the length of the warm-up. The data, networks and schedule are those of
`benchmarks.regimes`, iid; results are kept as there. Writes OUT/table.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import small_nets
from benchmarks.regimes import NETWORKS, TARGET, Plan, begin
from benchmarks.regimes import ROWS as REGIME_ROWS
from benchmarks.regimes_page import cell
from benchmarks.study import Job, Study
from syncnorm.family import METHODS
from syncnorm.train.models import NormLayer
from tests.distributed import family_reference as reference

RATES = {"convolutional": (0.5, 0.1), "fully_connected": (0.02, 0.005)}
CENTRED = "norm.weights=centred"
STANDARDIZED = "norm.weights=standardized"
WARM_UP = "norm.options.warmup=100"


def _formula(method: str) -> tuple[str, ...]:
    name = "model.name=benchmarks.family_settings:by_formula"
    return (name, f"model.options.method={method}", "norm.name=none", "norm.sync=none")


def _ours(name: str, *more: str) -> tuple[str, ...]:
    return (f"norm.name={name}", *more)


ROWS: dict[str, tuple[str, ...]] = {
    TARGET: REGIME_ROWS[TARGET].options,
    "division by the batch's root mean square, its derivative": _formula("batch_rms"),
    "power norm": _ours("power_norm"),
    "power norm, by the formula": _formula("power_norm"),
    "power norm, warm-up 100": _ours("power_norm", WARM_UP),
    "power norm, centred weights": _ours("power_norm", CENTRED),
    "unified norm": _ours("unified_norm"),
    "unified norm, by the formula": _formula("unified_norm"),
    "unified norm, warm-up 100": _ours("unified_norm", WARM_UP),
    "unified norm, centred weights": _ours("unified_norm", CENTRED),
    "mabn": _ours("mabn"),
    "mabn, by the formula": _formula("mabn"),
    "mabn, centred weights": _ours("mabn", CENTRED),
    "estimated batch norm": _ours("estimated_batch_norm"),
    "estimated batch norm, by the formula": _formula("estimated_batch_norm"),
    "estimated batch norm, standardized weights": _ours("estimated_batch_norm", STANDARDIZED),
    "batch channel norm of estimates": _ours("batch_channel_norm", "norm.options.estimate=true"),
    "batch channel norm of estimates, standardized weights": _ours(
        "batch_channel_norm", "norm.options.estimate=true", STANDARDIZED
    ),
}
# A convolutional network's weights; and what it has shown to matter little.
_OF_CONVOLUTIONS = (CENTRED, STANDARDIZED, WARM_UP)


class ByFormula(nn.Module):
    """A method's oracle in the place of its layer, with the layer's defaults.

    Args:
        channels: of the input.
        method: "batch_rms", or a name of `syncnorm.family.METHODS`.
    """

    def __init__(self, channels: int, method: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        layer = METHODS["power_norm" if method == "batch_rms" else method](channels).double()
        self.state = {name: value.clone() for name, value in layer.state_dict().items()}
        self.oracle = ORACLES[method]
        self.evaluates_scaled = method == "power_norm"

    def forward(self, x: Tensor) -> Tensor:
        own = {"weight": self.weight.double(), "bias": self.bias.double()}
        self.state |= own
        y = self.oracle(x.double(), self.state) if self.training else self._evaluate(x.double())
        self.state |= {name: value.detach() for name, value in own.items()}
        return y.to(x.dtype)

    def _evaluate(self, x: Tensor) -> Tensor:
        state, shape = self.state, (1, -1, *[1] * (x.ndim - 2))
        if self.evaluates_scaled:
            x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        var = state["running_square"] if "running_square" in state else state["running_var"]
        mean = state.get("running_mean", torch.zeros_like(var))
        z = (x - mean.view(shape)) / (var + 1e-5).sqrt().view(shape)
        return z * state["weight"].view(shape) + state["bias"].view(shape)


def _batch_rms(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    square = x.transpose(0, 1).flatten(1).square().mean(1)
    state["running_square"] = state["running_square"].lerp(square.detach(), 0.1)
    shape = (1, -1, *[1] * (x.ndim - 2))
    z = x / (square + 1e-5).sqrt().view(shape)
    return z * state["weight"].view(shape) + state["bias"].view(shape)


ORACLES: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "batch_rms": _batch_rms,
    "power_norm": lambda x, state: reference.power_norm(x, None, state, warmup=10000),
    "unified_norm": lambda x, state: reference.unified_norm(
        x, None, state, warmup=4000, renorm_after=1000, outlier_filtration=False, lagged=False
    ),
    "mabn": lambda x, state: reference.mabn(
        x, None, state, warmup=100, renorm_after=1000, lagged=False
    ),
    "estimated_batch_norm": lambda x, state: reference.estimated_batch_norm(x, state, 1e-5, 0.1),
}


def by_formula(
    in_channels: int, num_classes: int, norm_layer: NormLayer, method: str, side: int = 0
) -> nn.Sequential:
    """A network of the study on a method's oracle; the fully connected one if `side` is given."""
    norm = partial(ByFormula, method=method)
    if side:
        return small_nets.fully_connected(in_channels, num_classes, norm, side)
    return small_nets.convolutional(in_channels, num_classes, norm)


def jobs(plan: Plan, seed: int) -> Iterator[tuple[str, str, float, Job]]:
    """Yield row, network, learning rate and run of a seed."""
    for network in plan.networks:
        for row, options in ROWS.items():
            if network != "convolutional" and any(each in options for each in _OF_CONVOLUTIONS):
                continue
            for rate in RATES[network]:
                yield row, network, rate, Job((*plan.base(network, seed, rate), *options))


def table(study: Study, plan: Plan, network: str) -> list[str]:
    """The lines of a network's table in Markdown."""
    found: dict[str, dict[float, dict[int, float | None]]] = {}
    for seed in range(plan.seeds):
        for row, of, rate, job in jobs(plan, seed):
            result = study.result(job)
            if of == network and result is not None:
                found.setdefault(row, {}).setdefault(rate, {})[seed] = result["accuracy"]
    lines = [f"| {network.replace('_', ' ')} | {' | '.join(map(str, RATES[network]))} |"]
    lines.append("|---" * (1 + len(RATES[network])) + "|")
    for row, cells in found.items():
        texts = [cell(cells[rate]) if rate in cells else "" for rate in RATES[network]]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def main() -> None:
    parser = begin(__doc__, minutes=30.0)
    parser.set_defaults(seeds=1)
    given = parser.parse_args()
    plan = Plan(given.root, given.data, given.samples, 4, given.seeds, NETWORKS)
    with Study(given.out, given.minutes) as study:
        is_whole = study.run(job for seed in range(plan.seeds) for *_, job in jobs(plan, seed))
    text = "\n\n".join("\n".join(table(study, plan, network)) for network in NETWORKS)
    (given.out / "table.md").write_text(text + "\n")
    print(text)
    print("\nall runs made" if is_whole else "\npartial: call it again to go on")


if __name__ == "__main__":
    main()
