"""The Markdown table of what the parts have found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

LARGE_BYTES = 64 * 2**20
PRIMITIVES = ("moments", "normalize", "backward_sums", "backward_input")
CASES = ("dtype", "layout")


def render(found: Row) -> str:
    """All tables. `found` has "parts", how each ended, and "rows", what each has written."""
    rows = found["rows"]
    sections = [
        _heading(found),
        _tests(rows.get("tests", [])),
        _step(rows.get("step", [])),
        _primitives(rows.get("primitives", [])),
        _layers(rows.get("layers", [])),
        _each_shape(rows.get("primitives", [])),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def latest(rows: Iterable[Row], *names: str) -> list[Row]:
    """The last row of each key: the values under these names, as far as it has them."""
    kept = {str([row.get(name) for name in names]): row for row in rows}
    return list(kept.values())


def _heading(found: Row) -> str:
    machine = next(iter(found["rows"].get("machine", [])), {})
    words = [f"{name} {machine[name]}" for name in machine if name not in ("card", "part")]
    ends = [f"{name}: {end}" for name, end in found["parts"].items() if end != "done"]
    lines = [f"# {machine.get('card', 'unknown card')}"]
    if words:
        lines += ["", ", ".join(words) + "."]
    if ends:
        lines += ["", f"Not done: {'; '.join(ends)}."]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bad_tests(rows: list[Row]) -> list[Row]:
    """The tests that have failed, or have ended with their process."""
    tests = latest((row for row in rows if "test" in row), "test")
    return [row for row in tests if row["outcome"] in ("failed", "not finished")]


def _tests(rows: list[Row]) -> str:
    tests = latest((row for row in rows if "test" in row), "test")
    if not rows:
        return ""
    collected = sum(row["collected"] for row in latest(rows, "by") if "collected" in row)
    counts = Counter(row["outcome"] for row in tests)
    counts["not begun"] = max(0, collected - len(tests))
    said = [f"{number} {outcome}" for outcome, number in counts.items() if number]
    lines = [f"- `{row['test']}` {row['outcome']}: {row.get('why', '')}" for row in bad_tests(rows)]
    skips = Counter(row["why"] for row in tests if row["outcome"] == "skipped")
    lines += [f"- {number} skipped: {why}" for why, number in skips.items()]
    return "\n".join(["## Tests", "", ", ".join(said) + ".", "", *lines]).rstrip()


def _errors(rows: Iterable[Row], *names: str) -> str:
    """The rows without figures, in a list, each error once."""
    at: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            at.setdefault(row["error"], []).append(
                " ".join(str(row[name]) for name in names if name in row)
            )
    return "\n".join(f"- no figure for {', '.join(where)}: {why}" for why, where in at.items())


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def _step(rows: list[Row]) -> str:
    if not rows:
        return ""
    rows = latest(rows, "layer")
    first = rows[0]
    table = []
    for row in rows:
        if "error" in row:
            continue
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["to_local"]) if "to_local" in row else ""
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        cells = [row["layer"], ratio, _in(row, 1e3, 2), peak, row["repetitions"]]
        table.append(cells)
    head = ["normalisation", "step time / local, median [95 % interval]"]
    head += ["ms, median [quartiles]", "peak memory, GiB", "rounds"]
    ranks = (
        f"one process; messages go to a second rank that is nobody (backend {first['backend']})"
        if first["backend"] == "fake"
        else f"{first['ranks']} ranks, backend {first['backend']}, DistributedDataParallel"
    )
    about = f"Bfloat16 by autocast, channels last, batch {first['batch']} on each rank; {ranks}."
    return _section("A step of ResNet-50", about, _table(head, table), _errors(rows, "layer"))


def _in(row: Row, factor: float, digits: int) -> str:
    values = (factor * row[name] for name in ("median", "low", "high"))
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


def _primitives(rows: list[Row]) -> str:
    if not rows:
        return ""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "primitive" in row and "error" not in row:
            key = tuple(row[name] for name in ("primitive", "kernels", *CASES))
            groups.setdefault(key, []).append(row)
    table = []
    for (primitive, kernels, *case), some in groups.items():
        large = [row for row in some if row["bytes"] > LARGE_BYTES]
        worst = min(large, key=lambda row: row["share"], default=None)
        mean = math.exp(sum(math.log(row["share"]) for row in large) / max(1, len(large)))
        cells = [primitive, kernels, *case, f"{mean:.2f}" if large else ""]
        cells += [f"{worst['share']:.2f} {_shape(worst)}" if worst else ""]
        cells += [f"{_milliseconds(some):.2f}", f"{len(some)} of {_number_of_shapes(rows)}"]
        table.append(cells)
    totals: dict[tuple[str, ...], list[list[Row]]] = {}
    for (_, *key), some in groups.items():
        totals.setdefault(tuple(key), []).append(some)
    for key, parts in totals.items():
        total = sum(map(_milliseconds, parts))
        table.append(["all", *key, "", "", f"{total:.2f}", f"{len(parts)} primitives"])
    head = ["primitive", "kernels", *CASES, "share of copy bandwidth, geometric mean", "worst"]
    head += ["ms of all 53 layers", "shapes"]
    about = (
        "Batch 256. Shares over shapes above 64 MiB; times over all shapes measured, "
        "each as often as ResNet-50 has it. Medians, from an empty second-level cache."
    )
    names = ("kernels", "primitive", *CASES, "shape")
    return _section("Primitives", about, _table(head, table), _errors(rows, *names))


def _milliseconds(rows: list[Row]) -> float:
    """Of all layers with these shapes."""
    return 1e3 * sum(row["layers"] * row["median"] for row in rows)


def _number_of_shapes(rows: list[Row]) -> int:
    return len({str(row["shape"]) for row in rows})


def _shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def _each_shape(rows: list[Row]) -> str:
    """Each shape's shares, and the copy that they are shares of."""
    table = []
    for copy in rows:
        if copy.get("kernels") != "copy":
            continue
        cells = [*(copy[name] for name in CASES), _shape(copy), f"{copy['bandwidth'] / 1e9:.0f}"]
        here = {
            (row["kernels"], row["primitive"]): row
            for row in rows
            if "primitive" in row and all(row[n] == copy[n] for n in (*CASES, "shape"))
        }
        for kernels in dict.fromkeys(row[0] for row in here):
            shares = [here.get((kernels, primitive), {}).get("share") for primitive in PRIMITIVES]
            text = " ".join("-" if share is None else f"{share:.2f}" for share in shares)
            cells.append(f"{kernels}: {text}")
        table.append(cells + [""] * (7 - len(cells)))
    if not table:
        return ""
    head = [*CASES, "shape", "copy, GB/s", f"shares of {', '.join(PRIMITIVES)}", "", ""]
    return _section("Each shape", _table(head, table))


def _layers(rows: list[Row]) -> str:
    if not rows:
        return ""
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        at = cells.setdefault((row["layer"], row["way"]), {})
        if "median" in row:
            at[_shape(row)] = _in(row, 1e6, 1)
        if row.get("launches") is not None:
            at["launches"] = row["launches"]
    columns = [*shapes, "launches"]
    table = [[*key, *(at.get(each, "") for each in columns)] for key, at in cells.items() if at]
    count = next(
        (f"{r['repetitions']} rounds of {r['calls']} calls" for r in rows if "calls" in r), ""
    )
    about = (
        f"Microseconds of a forward and a backward pass, launches included: median [quartiles] of "
        f"{count}. Messages go to a second rank that is nobody."
    )
    errors = _errors(rows, "layer", "way", "shape")
    return _section("Small layers", about, _table(["layer", "way", *columns], table), errors)
