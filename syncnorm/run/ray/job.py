"""The description of a Ray job: plain data without secrets, as JSON on its command line."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncnorm.errors import ConfigError
from syncnorm.run.folder import check_resumable, write_config
from syncnorm.run.request import RunRequest
from syncnorm.train.config.callables import check_callables
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import is_url

# A file of this name in the run's folder stops the job.
STOP = "STOP"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", re.ASCII)


@dataclass(frozen=True)
class Job:
    """A training run as a Ray job.

    Args:
        submission_id: Ray's name of the job, and the name of the run's folder.
        name: of the configuration.
        folder: of the run, absolute, the same on all machines.
        config: the resolved configuration.
        allowed: packages whose callables the configuration may name.
    """

    submission_id: str
    name: str
    folder: str
    config: dict[str, Any]
    allowed: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Serialise to JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Job":
        """Parse the output of `to_json`.

        Raises:
            ConfigError: the text is something else.
        """
        try:
            values = json.loads(text)
            job = Job(**{**values, "allowed": tuple(values["allowed"])})
            job.request()
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"a job must be JSON as `syncnorm submit` makes it: {error}"
            ) from None
        return job

    def request(self) -> RunRequest:
        """Make the request for a worker."""
        return RunRequest(Config.model_validate(self.config), self.name, allowed=self.allowed)


def make_job(
    source: str, overrides: Sequence[str], allowed: Sequence[str], submission_id: str | None = None
) -> Job:
    """Make a job from a configuration, without starting it.

    The run's folder is `run_dir`/SUBMISSION_ID. Relative paths start at the current folder.

    Args:
        source: a YAML file, or the name of a packed configuration.
        overrides: `section.key=value`.
        allowed: packages whose callables the configuration may name.
        submission_id: None: NAME-HASH, of the keys that fix the result, so that the same training
            is the same job.

    Raises:
        ConfigError: the configuration or the submission id is invalid.
    """
    config = load_config(source, overrides)
    config = absolute(config)
    check_callables(config, allowed)
    name = config.name or Path(source).stem
    submission_id = submission_id or f"{id_of(name)}-{_hash(config)}"
    check_id(submission_id, "--id")
    return job_of(submission_id, name, Path(config.run_dir) / submission_id, config, allowed)


def job_of(
    submission_id: str, name: str, folder: Path, config: Config, allowed: Sequence[str]
) -> Job:
    """Make a job from a checked configuration with absolute paths."""
    values = json.loads(config.model_dump_json())
    return Job(submission_id, name, str(folder), values, tuple(allowed))


def id_of(name: str) -> str:
    """Return the name of a configuration as it may stand at the beginning of a submission id."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name).lstrip("-_") or "run"


def check_id(submission_id: str, option: str) -> None:
    """Refuse a submission id that Ray, or a file system, would not take.

    Raises:
        ConfigError: with the name of the option that gave it.
    """
    if not _ID.fullmatch(submission_id):
        raise ConfigError(
            f"`{option}` must be letters, digits, '.', '_' and '-', at most 121, got "
            f"{submission_id!r}. It names the run's folder too."
        )


def check_folder(job: Job) -> None:
    """Check that the run can begin or go on in its folder, as far as that is visible from here.

    Raises:
        ConfigError: it belongs to a run of another configuration.
    """
    folder = Path(job.folder)
    if not (folder / "config.yaml").exists():
        return
    try:
        check_resumable(job.request().config, folder)
    except ConfigError as error:
        raise ConfigError(
            f"`--id` must be a new name, or that of a run of the same configuration, got "
            f"{job.submission_id!r}: {str(error).partition(', which ')[2]}"
        ) from None


def prepare_folder(job: Job) -> Path:
    """Make the run's folder, or check that the run can resume in it.

    Raises:
        ConfigError: it cannot be made, or belongs to another run.
    """
    folder = Path(job.folder)
    config = job.request().config
    if (folder / "config.yaml").exists():
        check_folder(job)
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder)
    except OSError as error:
        raise ConfigError(
            "`run_dir` must be a folder that all machines share and can write to, got "
            f"{config.run_dir!r}: {error}"
        ) from None
    return folder


def _hash(config: Config) -> str:
    # Where the data lies, too: other data are another training.
    fixed = [config.mathematics(), config.data.root]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]


def absolute(config: Config) -> Config:
    """Make relative paths start at the current folder.

    Raises:
        ConfigError: `run_dir` is an address.
    """
    if is_url(config.run_dir):
        raise ConfigError(
            "`run_dir` must be a folder that all machines share where Ray runs it, got "
            f"{config.run_dir!r}. An address is for `syncnorm train` and torchrun."
        )

    def from_here(path: str | None) -> str | None:
        return None if path is None else str(Path(path).absolute())

    return config.model_copy(
        update={
            "run_dir": from_here(config.run_dir),
            "data": config.data.model_copy(update={"root": from_here(config.data.root)}),
            "model": config.model.model_copy(update={"weights": from_here(config.model.weights)}),
        }
    )
