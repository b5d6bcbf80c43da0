"""The only reader and writer of environment variables in the application.

torchrun, our own launcher and Ray set the same variables for a worker: RANK, WORLD_SIZE, LOCAL_RANK
and LOCAL_WORLD_SIZE, with MASTER_ADDR and MASTER_PORT for torch.distributed itself.
"""

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from syncnorm.errors import ConfigError

_RUN_FOLDER = "SYNCNORM_RUN_FOLDER"
_LAUNCHER = "SYNCNORM_LAUNCHER_PID"

# glibc hands blocks above 32 MiB back to the system and gets them zeroed again at each call, which
# is most of the time of a CPU operator on outputs of that size. It reads these when a process
# starts, so only a launcher can set them.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}

# ERROR hides warnings of torch's C++ code, such as of a store whose host has ended.
_WORKER = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Launched:
    """Rank and surroundings of a worker, as its launcher set them.

    Args:
        rank: of this worker.
        world_size: number of workers.
        local_rank: number of this worker on its machine.
        local_world_size: number of workers on its machine.
        run_folder: the run's folder, if our own launcher made it.
        launcher_pid: process id of our own launcher, if it started this process.
        launch_id: torchrun's name of this launch, kept when it restarts workers; None without one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    run_folder: Path | None = None
    launcher_pid: int | None = None
    launch_id: str | None = None


def read_launched() -> Launched | None:
    """Read the rank of this process from the environment; None if it is not a worker.

    Raises:
        ConfigError: some of the variables are missing or malformed.
    """
    if "RANK" not in os.environ:
        return None
    folder = os.environ.get(_RUN_FOLDER)
    return Launched(
        rank=_number("RANK"),
        world_size=_number("WORLD_SIZE"),
        local_rank=_number("LOCAL_RANK"),
        local_world_size=_number("LOCAL_WORLD_SIZE"),
        run_folder=Path(folder) if folder else None,
        launcher_pid=_number(_LAUNCHER) if _LAUNCHER in os.environ else None,
        launch_id=_launch_id(),
    )


def _launch_id() -> str | None:
    """Return torchrun's --rdzv-id; without one the address of the rendezvous."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def read_host() -> str:
    """Read the host of rank 0, which a launcher gives to all its workers.

    Raises:
        ConfigError: no launcher has set it.
    """
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise ConfigError(
            "environment variable MASTER_ADDR must name a host where RANK is set, got nothing. Use "
            "torchrun."
        )
    return host


@dataclass(frozen=True)
class Tuning:
    """Environment variables that decide how fast and how safely workers run.

    Args:
        missing_malloc: glibc's variables that are not set, with the values for CPU workers.
        is_under_torchrun: torchrun started this process.
        shares_store: restarted workers would use the store of those before them.
    """

    missing_malloc: dict[str, str]
    is_under_torchrun: bool
    shares_store: bool


def read_tuning() -> Tuning:
    """Read the variables of `Tuning`."""
    return Tuning(
        missing_malloc={name: value for name, value in _MALLOC.items() if name not in os.environ},
        is_under_torchrun="TORCHELASTIC_RUN_ID" in os.environ,
        shares_store=os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1",
    )


# Settings that Ray Train's driver passes on to its controller. The user's own go before them.
_RAY_DRIVER = {
    # Notice a lost worker after half a second instead of two, a node to be preempted after one
    # instead of five.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Time to place a group of workers before the cluster is counted anew: after the loss of a node
    # Ray still counts on it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise a worker's print appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths mean the same in workers as in the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def set_for_ray_driver() -> None:
    """Set the variables for Ray Train in this process, which is to call it."""
    for name, value in _RAY_DRIVER.items():
        os.environ.setdefault(name, value)


# Settings of Ray Tune, besides.
_RAY_SWEEP = {
    # The command itself handles Ctrl-C.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Each trial has a record of its own.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial reports each evaluation, and last its exit status alone.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Otherwise Tune writes to standard output, which belongs to the result.
    "RAY_AIR_NEW_OUTPUT": "0",
}


def set_for_ray_of_own() -> None:
    """Give a Ray that this process starts for itself a token that nobody else has.

    Call it before Ray is imported. Its ports listen on all interfaces.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Each would make it another cluster's, or nobody's.
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)


def set_for_ray_sweep() -> None:
    """Set the variables for Ray Tune and Ray Train in this process, which is to call them."""
    for name, value in ray_sweep_environment().items():
        os.environ.setdefault(name, value)


def ray_sweep_environment() -> dict[str, str]:
    """Return the variables that the processes of trials need; the user's own go before them."""
    return {
        name: os.environ.get(name, value) for name, value in {**_RAY_DRIVER, **_RAY_SWEEP}.items()
    }


def trial_environment(*, has_code: bool) -> dict[str, str]:
    """Return the environment of a trial's launcher, which a process of Ray's starts.

    Args:
        has_code: True if modules of the working folder may be imported.
    """
    # Not resolved: the package may be a link in the working folder.
    here, tree = str(Path.cwd()), str(Path(__file__).parents[2])
    # Ray sets OMP_NUM_THREADS to the number of CPUs, and the path of modules in `sys.path` alone.
    places = [place for place in sys.path if place and (place != here or here == tree)]
    if has_code and here != tree:
        places.append(here)  # last: a module there may have the name of one that we import
    return {**os.environ, **_WORKER, **_MALLOC, "PYTHONPATH": os.pathsep.join(places)}


def ray_worker_environment() -> dict[str, str]:
    """Return the variables that Ray is to set for each worker before it starts."""
    return {**_WORKER, **_MALLOC}


@dataclass(frozen=True)
class Cluster:
    """Address and token of a Ray cluster. Only Ray reads the token itself.

    Args:
        address: of its dashboard, as given.
        has_token: there is a token in a variable, which goes before a file, or in a file.
        token_path: the file that holds it.
    """

    address: str | None
    has_token: bool
    token_path: Path | None


def read_cluster() -> Cluster:
    """Read the address of the Ray cluster, and look for a token.

    Raises:
        ConfigError: the file for the token does not exist.
    """
    is_given, path = bool(os.environ.get("RAY_AUTH_TOKEN")), os.environ.get("RAY_AUTH_TOKEN_PATH")
    token_path = Path(path) if path else None
    default = Path.home() / ".ray" / "auth_token"
    if token_path is None and os.environ.get("RAY_AUTH_MODE") == "token" and default.is_file():
        token_path = default
    if not (is_given or token_path is None or token_path.is_file()):
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH must name a file, got {str(token_path)!r}")
    return Cluster(os.environ.get("RAY_ADDRESS"), is_given or token_path is not None, token_path)


def set_for_ray() -> None:
    """Make Ray send the token, if there is one.

    Call it before Ray is imported, which reads the variable once.
    """
    if read_cluster().has_token:
        os.environ["RAY_AUTH_MODE"] = "token"


def set_for_ray_client(address: str) -> None:
    """Make Ray's client send jobs to this address: the variable overrides its argument."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address


def worker_environment(
    rank: int, world_size: int, host: str, port: int, has_gpu: bool
) -> dict[str, str]:
    """Return the environment of a worker that is its launcher's only one on this machine.

    Args:
        rank, world_size: of the worker.
        host, port: address of rank 0, for the rendezvous.
        has_gpu: a GPU is reserved for the worker; otherwise it sees none, since others may use it.
    """
    hidden = {} if has_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    texts = {name: str(value) for name, value in values.items()}
    return {**_WORKER, **_MALLOC, **os.environ, **texts, **hidden, "MASTER_ADDR": host}


def set_for_children() -> None:
    """Set the variables that make CPU workers fast and quiet, unless they are set already."""
    for name, value in {**_WORKER, **_MALLOC}.items():
        os.environ.setdefault(name, value)


def set_for_profiler() -> None:
    """Keep torch's profiler in children from writing a line on its every start and stop."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def set_for_nccl() -> None:
    """Have NCCL launch in the order of this process's calls; the user's own setting stays.

    Statistics and gradients have a communicator each, and their sums overlap in a backward pass.
    NCCL (2.26 and later) reads the variable at its first launch.
    """
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


def set_for_launcher(arguments: Sequence[str]) -> None:
    """Set what torch reads as it is imported, if this command starts workers that inherit it."""
    if arguments[:1] == ["train"] and "RANK" not in os.environ:
        for name, value in _WORKER.items():
            os.environ.setdefault(name, value)


@contextmanager
def for_workers(run_folder: Path | None = None) -> Iterator[None]:
    """Set the variables for the workers that are started inside; the user's own stay."""
    before = dict(os.environ)
    set_for_children()
    if run_folder is not None:
        os.environ[_RUN_FOLDER] = str(run_folder)
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Place:
    """The place of a worker that our own launcher starts on this machine.

    Args:
        rank, world_size: of the worker.
        port: where the workers meet.
        error_file: for the exception that the worker ends by.
    """

    rank: int
    world_size: int
    port: int
    error_file: Path


def set_place(place: Place) -> None:
    """Set the variables of a worker in this process, which is one from now on."""
    values = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.rank,
        "LOCAL_WORLD_SIZE": place.world_size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": place.port,
        "TORCHELASTIC_ERROR_FILE": place.error_file,
    }
    os.environ.update({name: str(value) for name, value in values.items()})


def writes_report() -> bool:
    """Return False if SYNCNORM_REPORT=0: a run that is done leaves no page in its folder."""
    return os.environ.get("SYNCNORM_REPORT", "1") != "0"


def read_threads() -> int:
    """Read how many threads a worker computes with; 1 if the variable holds no number."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(text)) if text.isdecimal() else 1


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"environment variable {name} must be a number where RANK is set, got {text!r}. "
            "Start workers with torchrun, or unset RANK."
        )
    return int(text)
