"""The size of each method of the family, and what the package has of it elsewhere.

    python -m benchmarks.family_sizes

Lines that hold code or text: of the file that the method is; of its oracle; and those elsewhere in
the package that name it, which is the diff that adding it needed besides its file. Planted defects
are those of `tests/distributed`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import syncnorm
from syncnorm import family
from syncnorm.family import METHODS, reference

_PACKAGE = Path(syncnorm.__file__).parent
_METHODS: dict[str, tuple[type, Callable[..., Any], str]] = {
    "BalancedBatchNorm": (family.BalancedBatchNorm, reference.balanced_batch_norm, "balanced"),
    "BatchChannelNorm": (
        family.BatchChannelNorm,
        reference.batch_channel_norm,
        "(batch|estimated)_channel",
    ),
    "EstimatedBatchNorm": (family.EstimatedBatchNorm, reference.estimated_batch_norm, "estimated"),
    "EvoNorm": (family.EvoNorm, reference.evo_norm, "evo.*"),
    "L1BatchNorm": (family.L1BatchNorm, reference.l1_batch_norm, "l1"),
    "MABN": (family.MABN, reference.mabn, "mabn.*"),
    "MembranePotentialBatchNorm": (
        family.MembranePotentialBatchNorm,
        reference.membrane_batch_norm,
        "membrane",
    ),
    "OnlineNorm": (family.OnlineNorm, reference.online_norm, "online.*"),
    "PowerNorm": (family.PowerNorm, reference.power_norm, "power.*"),
    "RegionNorm": (family.RegionNorm, reference.region_norm, "region"),
    "UnifiedNorm": (family.UnifiedNorm, reference.unified_norm, "unified.*"),
}


def lines(text: str) -> int:
    """Count the lines that are not empty."""
    return sum(1 for line in text.splitlines() if line.strip())


def elsewhere(cls: type) -> int:
    """Count the lines of the package, outside of the class's file, that name it or its key."""
    keys = [name for name, method in METHODS.items() if method is cls]
    named = re.compile("|".join(rf"\b{name}\b" for name in (cls.__name__, *keys)))
    own = Path(inspect.getfile(cls))
    return sum(
        bool(named.search(line))
        for path in _PACKAGE.rglob("*.py")
        if path not in (own, Path(reference.__file__))
        for line in path.read_text().splitlines()
    )


def main() -> None:
    from tests.distributed.test_family import DEFECTS

    print("| class | file, lines | oracle | elsewhere | planted defects |\n|---|---|---|---|---|")
    for name, (cls, oracle, kind) in _METHODS.items():
        path = Path(inspect.getfile(cls))
        cells = [
            f"{path.name}, {lines(path.read_text())}",
            str(lines(inspect.getsource(oracle))),
            str(elsewhere(cls)),
            str(sum(re.fullmatch(kind, case) is not None for case, _ in DEFECTS)),
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
