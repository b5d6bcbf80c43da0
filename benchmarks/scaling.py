"""Messages of a training step by number of workers: counted, timed, and reckoned up to 1,024.

    python -m benchmarks.scaling [rounds]

1. Counts what a step sends on 1 to 16 workers of this machine, beside what `explain` says.
2. Times single messages on 2 to 4 workers, fits `benchmarks.cost_model` to them, prints what it
   predicts for 8 and 16, then measures these and prints the error. Once over whatever carries
   messages here, once with SYNCNORM_SHARED_MEMORY=0, and all-gathers.
3. The same for whole steps.
4. Reckons the messages of a step of ResNet-50 on up to 1,024 workers: bytes, and times.
5. Runs `benchmarks.slow_messages`: steps whose messages arrive late.

At its end it draws docs/scaling.svg and puts all that it has printed under docs/scaling.md's last
heading.

Workers have one thread each. More of them than cores take turns: what is measured then is this
machine's scheduler as much as the messages, and says nothing about as many machines.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import cost_model, paired, scaling_plot, slow_messages
from benchmarks.cost_model import Link, Timing, Traffic
from benchmarks.scaling_rank import (
    SIZES,
    SYNCS,
    Norm,
    counted,
    layer,
    network,
    times_of_messages,
    times_of_steps,
    workers,
)
from syncnorm import explain
from syncnorm.train.models import MODELS

GLOO = "sum, SYNCNORM_SHARED_MEMORY=0"
FITTED, CHECKED = (2, 3, 4), (8, 16)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# A network is assumed, not measured: 10 Gbit/s, and 20 microseconds from host to host.
WIRE_SECONDS, WIRE_PER_BYTE = 20e-6, 8 / 10e9
WORKERS_OF_A_HOST = 8
RECKONED = (8, 16, 32, 64, 128, 256, 512, 1024)
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PICTURE = PAGE.with_suffix(".svg")
HEADING = "## Figures\n"


def rounds_for(count: int, rounds: int) -> int:
    """Fewer rounds where each takes longer; the same on all workers."""
    return max(5, 2 * rounds // max(2, count))


def short(number: float) -> str:
    """Three digits.

    >>> short(0.01234), short(1696)
    ('0.0123', '1,696')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(seconds: float) -> str:
    return short(1e3 * seconds)


def print_counts() -> None:
    print("\n| workers | sync | messages of a step | bytes from each worker | `explain` says |")
    print("|---|---|---|---|---|")
    for count in (1, 2, 4, *CHECKED):
        with workers(count) as pool:
            (found, *_) = pool.run(counted)
        for sync, (said, made) in found.items():
            print(f"| {count} | {sync} | {made.messages} | {made.bytes} | {tuple(said)} |")


class Fitted(NamedTuple):
    """A kind of message, and what was found about it."""

    words: str
    way: str
    link: Link
    timings: list[Timing]


def _measure(
    counts: Sequence[int], rounds: int, setting: str | None
) -> dict[str, dict[tuple[int, int], float]]:
    """Seconds by kind ("sum", "gather"), then by workers and numbers."""
    found: dict[str, dict[tuple[int, int], float]] = {"sum": {}, "gather": {}}
    for count in counts:
        with workers(count, setting) as pool:
            (times, *_) = pool.run(times_of_messages, rounds_for(count, rounds))
        for (kind, size), took in times.items():
            found[kind][count, size] = took
    return found


def _timings(found: Mapping[tuple[int, int], float]) -> list[Timing]:
    return [Timing(count, 8 * size, took) for (count, size), took in found.items()]


def print_messages(rounds: int) -> dict[str, Fitted]:
    """Fit on few workers, print the prediction for many, measure, print the error."""
    ways = {
        "sum": ["all-reduce, ring", "all-gather, ring"],
        "gather": ["all-gather, ring"],
    }
    fits: dict[str, Fitted] = {}
    for words, setting, kinds in (
        ("sum", None, ["sum"]),
        (GLOO, "0", ["sum", "gather"]),
    ):
        few = _measure(FITTED, rounds, setting)
        for kind in kinds:
            way, link, error = cost_model.fit_best(_timings(few[kind]), ways[kind], CORES)
            name = words if kind == "sum" else "all-gather"
            fits[name] = Fitted(name, way, link, _timings(few[kind]))
            print(
                f"\n{name}, fitted on {FITTED} workers as {way}: {1e6 * link.call:.1f} us a call, "
                f"{1e6 * link.latency:.1f} us a round, {_bandwidth(link)}; "
                f"relative error there {100 * error:.0f} %"
            )
            for count in CHECKED:
                predicted = [_predicted(fits[name], count, size) for size in SIZES]
                print(f"predicted on {count}: {_list(predicted)} ms for {SIZES} numbers")
        sys.stdout.flush()
        many = _measure(CHECKED, rounds, setting)
        print("\n| message | workers | numbers | predicted ms | measured ms | error |")
        print("|---|---|---|---|---|---|")
        for kind in kinds:
            name = words if kind == "sum" else "all-gather"
            fits[name].timings.extend(_timings(many[kind]))
            for (count, size), took in many[kind].items():
                guess = _predicted(fits[name], count, size)
                print(
                    f"| {name} | {count} | {size} | {milliseconds(guess)} | {milliseconds(took)} "
                    f"| {100 * (guess / took - 1):+.0f} % |"
                )
        sys.stdout.flush()
    return fits


def _predicted(of: Fitted, count: int, size: int) -> float:
    return cost_model.seconds(of.link, of.way, Traffic(1, 8 * size), count, CORES)


def _bandwidth(link: Link) -> str:
    return f"{1e-9 / link.per_byte:.2f} GB/s" if link.per_byte else "no limit of bandwidth seen"


def _list(seconds: Sequence[float]) -> str:
    return ", ".join(milliseconds(s) for s in seconds)


def print_steps(rounds: int, of: Fitted) -> None:
    """Whole steps. What a mode adds without messages is taken from one worker."""
    alone = _print_steps((1, 2, 4), rounds, {}).get(1, {})
    predictions: dict[int, dict[str, float]] = {}
    for count in CHECKED:
        predictions[count] = {}
        for sync in SYNCS:
            messages = 0.0
            if sync == "batch":  # the others wait for none
                said = explain(network(layer(sync)), world_size=count)
                sent = Traffic(said.messages, said.bytes)
                messages = cost_model.seconds(of.link, of.way, sent, count, CORES)
            predictions[count][sync] = cost_model.shortage(count, CORES) * alone[sync] + messages
        print(f"predicted on {count}: {_list(list(predictions[count].values()))} ms for {SYNCS}")
    _print_steps(CHECKED, rounds, predictions)


def _print_steps(
    counts: Sequence[int], rounds: int, predictions: Mapping[int, Mapping[str, float]]
) -> dict[int, dict[str, float]]:
    """Measure steps; returns seconds over local, by workers and `sync`."""
    found: dict[int, dict[str, float]] = {}
    print("\n| workers | sync | predicted ms over local | measured | local ms | / local |")
    print("|---|---|---|---|---|---|", flush=True)
    for count in counts:
        with workers(count) as pool:
            (taken, *_) = pool.run(times_of_steps, rounds_for(count, rounds))
        local = taken["local"]
        found[count] = {
            sync: statistics.median(a - b for a, b in zip(taken[sync], local, strict=True))
            for sync in SYNCS
        }
        for sync, over in found[count].items():
            guess = milliseconds(predictions[count][sync]) if predictions else ""
            print(
                f"| {count} | {sync} | {guess} | {milliseconds(over)} "
                f"| {milliseconds(statistics.median(local))} | {paired.ratio(taken[sync], local)} |"
            )
    print(flush=True)
    return found


def between_hosts(gloo: Link) -> Link:
    """The link of gloo over an assumed network: what it costs on this machine, and the wire."""
    return Link(gloo.call, gloo.latency + WIRE_SECONDS, max(gloo.per_byte, WIRE_PER_BYTE))


def resnet50() -> tuple[dict[str, Traffic], dict[str, nn.Module]]:
    """What torch's layers send in a step of ResNet-50, and the network with ours, by `sync`."""
    channels: list[int] = []

    def noting(count: int) -> nn.Module:
        channels.append(count)
        return nn.BatchNorm2d(count)

    def build(norm: Norm) -> nn.Module:
        with torch.device("meta"):
            return MODELS["resnet50_imagenet"](in_channels=3, num_classes=10, norm_layer=norm)

    build(noting)
    return cost_model.of_torchs_layers(channels), {s: build(layer(s)) for s in SYNCS[1:]}


def reckon(within: Link, between: Link, way: str) -> dict[str, list[float]]:
    """Cost of the messages of a step of ResNet-50, one after the other, by number of workers.

    Args:
        within, between: the links of workers of one host, and of hosts.
        way: "ring" or "tree", between all workers (one level), or between hosts (two).
    """
    torchs, models = resnet50()
    rows: dict[str, list[float]] = {}

    def add(name: str, cost: float) -> None:
        rows.setdefault(name, []).append(cost)

    for count in RECKONED:
        hosts = count // WORKERS_OF_A_HOST
        link = between if hosts > 1 else within
        costs = [cost_model.seconds(link, f"{k}, {way}", sent, count) for k, sent in torchs.items()]
        add("torch: all-gather, all-reduce", sum(costs))
        for sync, model in models.items():
            said = explain(model, world_size=count)
            sent, kind = Traffic(said.messages, said.bytes), f"all-reduce, {way}"
            if sync == "batch":
                gathered = cost_model.seconds(link, f"all-gather, {way}", sent, count)
                add("batch, if it gathered", gathered)
            add(f"{sync}, one level", cost_model.seconds(link, kind, sent, count))
            two = cost_model.seconds_on_two_levels(within, between, kind, sent, count, hosts)
            add(f"{sync}, two levels", two)
    return rows


def print_reckoned(within: Fitted, gloo: Fitted) -> dict[str, dict[str, list[float]]]:
    # With links that cost nothing but bytes, or rounds, what is reckoned is these.
    for words, link, way in (
        ("MB that a worker moves in a step (the busiest, on two levels)", Link(0, 0, 1e-6), "tree"),
        ("rounds of a step, tree", Link(0, 1, 0), "tree"),
        ("rounds of a step, ring", Link(0, 1, 0), "ring"),
    ):
        _print_reckoned(words, reckon(link, link, way), short)
    between = between_hosts(gloo.link)
    print(
        f"\n{WORKERS_OF_A_HOST} workers a host, a core for each; within a host as fitted "
        f"({within.words}); between hosts {1e6 * between.call:.1f} us a call, "
        f"{1e6 * between.latency:.1f} us a round, of which {1e6 * WIRE_SECONDS:.0f} us are the "
        f"wire's, assumed, and {_bandwidth(between)}"
    )
    tables = {way: reckon(within.link, between, way) for way in ("ring", "tree")}
    for way, rows in tables.items():
        _print_reckoned(f"{way}: ms of messages in a step", rows, milliseconds)
    return tables


def _print_reckoned(
    words: str, rows: Mapping[str, Sequence[float]], text: Callable[[float], str]
) -> None:
    print(f"\n| {words} | {' | '.join(map(str, RECKONED))} |")
    print("|---" * (1 + len(RECKONED)) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(map(text, row))} |")


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def measure(rounds: int) -> None:
    """Print all tables, and draw the picture."""
    print(
        f"`python -m benchmarks.scaling {rounds}`: {CORES} cores, one thread a worker; torch "
        f"{torch.__version__}; {paired.settings()}. {_load()} at the start."
    )
    print("\n### Counted", flush=True)
    print_counts()
    print("\n### A message")
    fits = print_messages(rounds)
    print("\n### A whole step")
    print_steps(rounds, fits["sum"])
    print("### Reckoned: ResNet-50 on up to 1,024 workers")
    tables = print_reckoned(fits["sum"], fits[GLOO])
    scaling_plot.draw(PICTURE, fits.values(), CORES, RECKONED, tables["tree"])
    print(f"\n![Messages by number of workers]({PICTURE.name})\n\n### Late messages\n")
    slow_messages.measure(rounds)
    print(f"{_load()} at the end.")


def _load() -> str:
    return f"Processes that wanted a core in the last minute: {os.getloadavg()[0]:.1f}"


def main() -> None:
    paired.fix_allocator()
    tee = Tee()
    with contextlib.redirect_stdout(tee):
        measure(int(sys.argv[1]) if len(sys.argv) > 1 else 31)
    words, _, _ = PAGE.read_text().partition(HEADING)
    PAGE.write_text(words + HEADING + "\n" + tee.getvalue())


if __name__ == "__main__":
    main()
