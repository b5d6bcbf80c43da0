"""The comparison of a run with the record that it is to go on from: mathematics and data."""

import contextlib
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.config import strict_yaml
from syncnorm.train.config.schema import MATHEMATICS, WHEREABOUTS, Config
from syncnorm.train.config.section import leaves
from syncnorm.train.metrics import from_json_value, json_value
from syncnorm.train.setup import Setup


def check_same(config: Config, snapshot: Snapshot) -> None:
    """Raise ConfigError unless the snapshot is of a run with the same mathematics."""
    differences = describe_differences(config, snapshot.facts.get("config"))
    if differences:
        raise ConfigError(
            f"the checkpoint of step {snapshot.step} is of another configuration: {differences}"
        )


def check_same_data(setup: Setup, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the data are those that the run began with, as far as it can be seen.

    Figures that were measured elsewhere may differ in rounding.
    """
    found, before = _flat_data_facts(data_facts(setup)), _flat_data_facts(facts)
    for name, was in before.items():
        now = found.get(name)
        if was is not None and now is not None and not _is_same(now, was):
            values = f"{name} {reprlib.repr(now)}, not {reprlib.repr(was)}"
            raise ConfigError(
                "a run must go on with the data that it began with, got "
                f"{'other labels' if name == 'labels' else values}. Bring them back, or begin a new "
                "run with model.weights=RUN."
            )


def data_facts(setup: Setup) -> dict[str, Any]:
    """List what a checkpoint records of the data."""
    return {
        "signature": setup.signature.model_dump(mode="json"),
        "samples": setup.samples,
        "labels": setup.labels_checksum,
    }


def _flat_data_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    # Labels last: of other classes or samples they are others, too.
    signature = facts.get("signature") or {}
    return {"samples": facts.get("samples"), **signature, "labels": facts.get("labels")}


def _is_same(now: Any, was: Any) -> bool:
    if not isinstance(now, dict) or not isinstance(was, dict):
        return now == was
    # Of the inputs. A mean is measured as exactly as the spread about it.
    figures = [
        [*zip(each.get("mean") or (), each.get("std") or (), strict=True)] for each in (now, was)
    ]
    are_like = {**now, "mean": 0, "std": 0} == {**was, "mean": 0, "std": 0}
    return (
        are_like
        and len(figures[0]) == len(figures[1])
        and all(
            abs(mean - mean_was) <= 1e-6 * std_was + 1e-12 * abs(mean_was)
            and math.isclose(std, std_was, rel_tol=1e-6)
            for (mean, std), (mean_was, std_was) in zip(*figures, strict=True)
        )
    )


def describe_differences(config: Config, recorded: Any) -> str:
    """Describe what keeps a configuration from going on with a run; empty if nothing does.

    Those are the keys that fix the result, with both values. `train.epochs` may be larger.

    Args:
        config: to go on with.
        recorded: the run's configuration as a dict.
    """
    if not isinstance(recorded, dict):
        return "the recorded one is no mapping"
    mine, theirs = (
        # A record has words in place of NaN and the infinities, which equals nothing either.
        _flatten(json_value(sections))
        for sections in (config.mathematics(), _mathematics(recorded))
    )
    keys = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    if epochs_of(recorded) < config.train.epochs:
        keys.discard("train.epochs")
    write = strict_yaml.dump_line
    return ", ".join(
        f"{key}: {write(theirs.get(key))} there, {write(mine.get(key))} here"
        for key in sorted(keys)
    )


def _mathematics(recorded: dict[str, Any]) -> dict[str, Any]:
    """The sections that fix the result, with today's defaults for keys that are newer."""
    for values in (recorded, from_json_value(recorded)):
        with contextlib.suppress(ValidationError):
            return Config.model_validate(values).mathematics()
    sections = {name: recorded[name] for name in MATHEMATICS if name in recorded}
    data = sections.get("data")
    if isinstance(data, dict):
        sections["data"] = {k: v for k, v in data.items() if k not in WHEREABOUTS}
    return sections


def epochs_of(recorded: dict[str, Any]) -> float:
    """Read the length of a recorded run; infinite if it says none."""
    train = recorded.get("train")
    epochs = train.get("epochs") if isinstance(train, dict) else None
    return epochs if isinstance(epochs, int) else math.inf


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    # An empty mapping says as much as a missing one.
    return {".".join(map(str, key)): value for key, value in leaves(values) if value != {}}
