"""A sweep: a configuration, and the values that each of its trials has instead."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from syncnorm.errors import ConfigError
from syncnorm.run.ray.job import Job, absolute, check_id, id_of, job_of
from syncnorm.run.ray.space import Space, read_space, split_grids
from syncnorm.train.config.callables import check_callables
from syncnorm.train.config.file import Written, check, read, set_values
from syncnorm.train.config.schema import MATHEMATICS, Config
from syncnorm.train.config.section import is_url
from syncnorm.train.data.builtin import DATASETS
from syncnorm.train.files import write_text_whole
from syncnorm.train.metrics import json_value

RECORD = "sweep.json"
# Keys whose values are paths, which the cluster's machines read from another folder.
_PATHS = ("data.root", "model.weights")
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Sweep:
    """Trials that differ in a few keys; plain data without secrets.

    Args:
        submission_id: Ray's name of the job, and the name of the sweep's folder.
        name: of the configuration.
        folder: of the sweep, absolute, the same on all machines.
        base: the configuration as it is written, with absolute paths.
        trials: for each, values by dotted key.
        allowed: packages whose callables the configuration may name.
        is_asha: True if trials that fall behind end early.
        concurrent: most trials at once; None: as many as there is room for.
    """

    submission_id: str
    name: str
    folder: str
    base: dict[str, Any]
    trials: Annotated[list[dict[str, Any]], Field(min_length=1)]
    allowed: tuple[str, ...] = ()
    is_asha: bool = False
    concurrent: int | None = None

    def to_json(self) -> str:
        """Serialise to JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Sweep":
        """Parse the output of `to_json`.

        Raises:
            ConfigError: the text is something else.
        """
        try:
            return _SWEEP.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"a sweep must be JSON as `syncnorm sweep` makes it: {place}: {first['msg']}"
            ) from None

    @property
    def keys(self) -> list[str]:
        """The keys that vary."""
        return list(self.trials[0])

    def names(self) -> list[str]:
        """Name each trial, and its folder, by its number and by what varies."""
        width = len(str(len(self.trials) - 1))
        return [
            _trial_name(f"trial-{number:0{max(2, width)}}", values)
            for number, values in enumerate(self.trials)
        ]

    def config(self, number: int) -> Config:
        """Build the configuration of a trial.

        Raises:
            ConfigError: a value does not fit its key.
        """
        written = Written(
            Path(f"{self.name}, trial {number}"), "", copy.deepcopy(self.base), frozenset()
        )
        set_values(written, self.trials[number])
        return check(written)

    def job(self, number: int) -> Job:
        """Describe a trial as a training run."""
        name = self.names()[number]
        return job_of(name, self.name, Path(self.folder) / name, self.config(number), self.allowed)


_SWEEP = TypeAdapter(Sweep)


def choose_sweep(
    source: str | None, arguments: Sequence[str], *, resume: Path | None, **options: Any
) -> Sweep:
    """Make a sweep, or read the one of the folder to go on with; arguments as of `make_sweep`.

    Raises:
        ConfigError: there is neither.
    """
    if source is not None:
        return make_sweep(source, arguments, resume=resume, **options)
    if resume is None:
        raise ConfigError(
            "a sweep must be given a configuration and values to try, such as: syncnorm sweep "
            "digits train.lr=0.05,0.1; with `--resume FOLDER` of an earlier one it has its own"
        )
    recorded = read_sweep(resume)
    if recorded is None:
        raise ConfigError(
            f"`--resume` must name a sweep's folder, got {str(resume)!r}, which has no readable "
            f"{RECORD}. One that only the cluster sees needs its configuration and values again."
        )
    # The folder may have been moved.
    folder = str(resume.absolute())
    base = {**recorded.base, "run_dir": str(resume.absolute().parent)}
    # What another was allowed does not count: the folder may be somebody else's.
    found = replace(
        recorded,
        folder=folder,
        base=base,
        allowed=tuple(options["allowed"]),
        concurrent=options["concurrent"],
    )
    _check_trials(found)
    return found


def make_sweep(
    source: str,
    arguments: Sequence[str],
    *,
    space: Path | None = None,
    allowed: Sequence[str] = (),
    is_asha: bool = False,
    concurrent: int | None = None,
    resume: Path | None = None,
    is_dated: bool = True,
) -> Sweep:
    """Make a sweep, and check the configuration of each trial, without starting anything.

    Args:
        source: a YAML file, or the name of a packed configuration.
        arguments: KEY=VALUE for all trials, KEY=VALUE,VALUE... for what varies.
        space: a file with further keys to vary.
        allowed: packages whose callables the configuration may name.
        is_asha, concurrent: see `Sweep`.
        resume: the folder of a sweep to go on with; None for a new one.
        is_dated: True to name a new sweep's folder by the time, False by its trials.

    Raises:
        ConfigError: a trial's configuration is invalid; or the folder is that of other trials.
    """
    read_from = Space({}, {}) if space is None else read_space(space)
    fixed, grids = split_grids(arguments, read_from.keys)
    twice = sorted(set(grids) & set(read_from.keys))
    if twice:
        raise ConfigError(f"{space}: `{twice[0]}` must be given once, and is given as values, too")
    trials = Space(
        {**read_from.grids, **grids}, read_from.draws, read_from.samples, read_from.seed
    ).trials()
    trials = [_from_here(values) for values in trials]
    written = read(source, fixed)
    # The first trial's, as the file may leave out what is varied.
    set_values(written, trials[0])
    config = absolute(check(written))
    base = written.values
    base["run_dir"] = config.run_dir
    if config.data.root is not None:
        base["data"]["root"] = config.data.root
    if config.model.weights is not None:
        base["model"]["weights"] = config.model.weights
    name = config.name or Path(source).stem
    stem = f"{id_of(name)}-sweep"
    if resume is not None:
        folder = resume.absolute()
    else:
        end = f"{datetime.now():%Y%m%d-%H%M%S}" if is_dated else _hash(base, trials)
        folder = Path(config.run_dir) / f"{stem}-{end}"
    check_id(folder.name, "--resume")
    sweep = Sweep(folder.name, name, str(folder), base, trials, tuple(allowed), is_asha, concurrent)
    _check_trials(sweep)
    if (recorded := read_sweep(folder)) is not None:
        _check_same(sweep, recorded)
    return sweep


def _from_here(values: dict[str, Any]) -> dict[str, Any]:
    """Make paths among a trial's values start at the current folder, as `absolute` does."""
    return {
        key: str(Path(value).absolute())
        if key in _PATHS and isinstance(value, str) and value and not is_url(value)
        else value
        for key, value in values.items()
    }


def read_sweep(folder: Path) -> Sweep | None:
    """Read the sweep of a folder; None if it is not visible from here, or is no sweep's.

    Raises:
        ConfigError: its record is damaged.
    """
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
        return Sweep.from_json(json.dumps(json.loads(text)["sweep"]))
    except OSError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / RECORD}: must be a sweep's record: {error}") from None


def write_record(sweep: Sweep, results: Sequence[Mapping[str, Any]], best: str | None) -> None:
    """Write `sweep.json`: what was asked for, and what came of it so far."""
    record = json_value({"sweep": asdict(sweep), "trials": list(results), "best": best})
    text = json.dumps(record, indent=1, allow_nan=False)
    write_text_whole(Path(sweep.folder) / RECORD, text + "\n")


def _check_trials(sweep: Sweep) -> None:
    for number in range(len(sweep.trials)):
        config = sweep.config(number)
        check_callables(config, sweep.allowed)
        if sweep.is_asha and config.data.name in DATASETS and not config.data.validation:
            raise ConfigError(
                "`--asha` must have a validation set to choose by, and data.validation is 0. Set "
                "data.validation=0.1, or leave --asha out."
            )


def _check_same(sweep: Sweep, recorded: Sweep) -> None:
    mine, theirs = (
        ([each.base.get(key) for key in MATHEMATICS], each.trials) for each in (sweep, recorded)
    )
    if mine != theirs:
        raise ConfigError(
            f"`--resume` must name the folder of the same sweep, got {sweep.folder!r}, whose "
            f"trials are others. `syncnorm sweep --resume {sweep.folder}` alone goes on with those."
        )


def _trial_name(begin: str, values: Mapping[str, Any]) -> str:
    lasts = [key.rpartition(".")[2] for key in values]
    parts = [
        f"{last if lasts.count(last) == 1 else key}={value}"
        for last, (key, value) in zip(lasts, values.items())
    ]
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join([begin, *parts]))[:_LONGEST_NAME].rstrip(
        "-."
    )


def _hash(base: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([base, trials], sort_keys=True).encode()).hexdigest()[:8]
