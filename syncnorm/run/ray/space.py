"""The trials of a sweep: values of configuration keys, from a grid and from random draws."""

import itertools
import math
import random
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncnorm.errors import ConfigError
from syncnorm.train.config import strict_yaml
from syncnorm.train.config.schema import MATHEMATICS

_MOST_TRIALS = 1000
# Digits of a number that is drawn: it names the trial's folder.
_DIGITS = 4


@dataclass(frozen=True)
class Space:
    """Values of each key that a sweep varies.

    Args:
        grids: by key, values that are all tried.
        draws: by key, the distribution, such as `{"loguniform": [0.001, 1]}`.
        samples: how many draws for each point of the grid.
        seed: of the draws.
    """

    grids: Mapping[str, list[Any]]
    draws: Mapping[str, Mapping[str, Any]]
    samples: int = 1
    seed: int = 0

    @property
    def keys(self) -> list[str]:
        """The keys that vary."""
        return [*self.grids, *self.draws]

    def trials(self) -> list[dict[str, Any]]:
        """Return the values of each trial; the same for the same space.

        Raises:
            ConfigError: there are none, or too many, or a value is there twice.
        """
        count = math.prod(map(len, self.grids.values())) * self.samples
        if not self.keys or count > _MOST_TRIALS:
            raise ConfigError(
                f"a sweep must have 1 to {_MOST_TRIALS} trials, got {count if self.keys else 0}. "
                "Give values to try, such as train.lr=0.1,0.2, or --space FILE."
            )
        for key, values in self.grids.items():
            if len(set(map(repr, values))) < len(values):
                raise ConfigError(
                    f"`{key}` must have each value once in a sweep, got {values!r:.200}"
                )
        generator = random.Random(self.seed)
        points = [
            dict(zip(self.grids, values)) for values in itertools.product(*self.grids.values())
        ]
        return [
            _sections_first(
                {**point, **{key: _draw(generator, one) for key, one in self.draws.items()}}
            )
            for _ in range(self.samples)
            for point in points
        ]


def _sections_first(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put a section before the keys in it: as a whole it would replace them."""
    ordered: dict[str, Any] = {}
    for key in values:
        sections = (each for each in sorted(values, key=len) if key.startswith(f"{each}."))
        ordered |= {each: values[each] for each in sections}
        ordered[key] = values[key]
    return ordered


def split_grids(
    arguments: Sequence[str], varied: Iterable[str] = ()
) -> tuple[list[str], dict[str, list[Any]]]:
    """Separate KEY=VALUE,VALUE... from overrides with a single value.

    A single value of a key within a section that varies as a whole counts as varied, too: each
    trial's section would replace it.

    Args:
        arguments: as on the command line.
        varied: keys that vary besides.

    Returns:
        The overrides that are the same for all trials, and the values of each key that varies.

    Raises:
        ConfigError: the values are no list in YAML's terms, or the key is not one to vary.
    """
    single: dict[str, list[Any]] = {}
    fixed, grids = [], {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        values = strict_yaml.parse(f"[{text}]", f"override {reprlib.repr(argument)}")
        if equals and len(values) > 1:
            _check_key(key)
            grids[key] = values
        else:
            single[argument] = values
    sections = tuple(f"{key}." for key in (*grids, *varied))
    for argument, values in single.items():
        if not argument.startswith(sections):
            fixed.append(argument)
            continue
        key = argument.partition("=")[0]
        if len(grids.get(key, ())) > 1:
            raise ConfigError(f"`{key}` must be given once, and is given as values, too")
        grids[key] = values or [None]
    return fixed, grids


def read_space(path: Path) -> Space:
    """Read a search space from a YAML file.

    It has `sweep`, a mapping from keys to lists of values, `{choice: [...]}`, `{uniform: [low,
    high]}`, `{loguniform: [low, high]}` or `{randint: [low, high]}`; and, for what is drawn,
    `samples` and `seed`.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = strict_yaml.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`--space` must be a YAML file, got {str(path)!r}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sweep"), dict):
        raise ConfigError(f"{path}: must have a section `sweep` with keys and their values")
    unknown = sorted(set(content) - {"sweep", "samples", "seed"})
    if unknown:
        raise ConfigError(f"{path}: must have sweep, samples and seed, got {', '.join(unknown)}")
    samples, seed = content.get("samples", 1), content.get("seed", 0)
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{path}: `{name}` must be a number from {least} on, got {value!r}")
    grids: dict[str, list[Any]] = {}
    draws: dict[str, dict[str, Any]] = {}
    for key, values in content["sweep"].items():
        _check_key(key)
        if isinstance(values, list) and values:
            grids[key] = values
        else:
            draws[key] = _check_draw(f"{path}: `{key}`", values)
    if samples > 1 and not draws:
        raise ConfigError(f"{path}: `samples` must be 1 where nothing is drawn, got {samples}")
    return Space(grids, draws, samples, seed)


def _check_key(key: str) -> None:
    if key.partition(".")[0] not in MATHEMATICS or "." not in key:
        raise ConfigError(
            f"a sweep must vary keys of {', '.join(MATHEMATICS)}, got {key!r}: only they change a "
            "result. Of other keys give one value."
        )


def _uniform(generator: random.Random, low: float, high: float) -> float:
    return _rounded(generator.uniform(low, high), low, high)


def _loguniform(generator: random.Random, low: float, high: float) -> float:
    drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
    return _rounded(drawn, low, high)


_RANGES: dict[str, Callable[[random.Random, Any, Any], Any]] = {
    "uniform": _uniform,
    "loguniform": _loguniform,
    "randint": random.Random.randint,
}


def _check_draw(where: str, values: Any) -> dict[str, Any]:
    kind, bounds = next(iter(values.items())) if isinstance(values, dict) and values else ("", None)
    if isinstance(bounds, list) and bounds and len(values) == 1:
        if kind == "choice":
            return {kind: bounds}
        types = (int,) if kind == "randint" else (int, float)
        least = 0 if kind == "loguniform" else -math.inf
        are_numbers = len(bounds) == 2 and all(
            type(bound) in types and abs(bound) <= sys.float_info.max for bound in bounds
        )
        if kind in _RANGES and are_numbers and least < bounds[0] <= bounds[1]:
            return {kind: bounds}
    raise ConfigError(
        f"{where} must be a list of values, {{choice: [...]}}, or {{uniform: [low, high]}}, "
        f"loguniform (from above 0) or randint (whole numbers), got {reprlib.repr(values)}"
    )


def _draw(generator: random.Random, draw: Mapping[str, Any]) -> Any:
    ((kind, bounds),) = draw.items()
    return generator.choice(bounds) if kind == "choice" else _RANGES[kind](generator, *bounds)


def _rounded(value: float, low: float, high: float) -> float:
    """Round to as few digits as stay between the bounds."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(_DIGITS, 18))
    return next((each for each in rounded if low <= each <= high), low)
