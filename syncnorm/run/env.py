"""The one place where the environment is read and written.

torchrun, our own launcher and Ray all say the same way which worker a process is: RANK, WORLD_SIZE,
LOCAL_RANK and LOCAL_WORLD_SIZE, with MASTER_ADDR and MASTER_PORT for torch.distributed itself.
"""

import os
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

# DDP's C++ code warns of `find_unused_parameters`, which the trainer has a reason for (see
# train/setup.py).
_WORKER = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Launched:
    """What a launcher told this process.

    Args:
        rank: number of this worker among all.
        world_size: how many there are.
        local_rank: number of this worker on its machine.
        local_world_size: how many are on its machine.
        run_folder: the run's folder, if our own launcher made it.
        launcher_pid: our own launcher, if that is what started this process.
        launch_id: what torchrun calls this launch, the same when it starts its workers again; None
            if it has no name.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    run_folder: Path | None = None
    launcher_pid: int | None = None
    launch_id: str | None = None


def read_launched() -> Launched | None:
    """Say which worker this process is; None if it is not one.

    Raises:
        ConfigError: the environment says so only in part.
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
    """torchrun's --rdzv-id; without one the address at which the workers meet."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def read_host() -> str:
    """Say where the worker of rank 0 is, as a launcher has told all its workers.

    Raises:
        ConfigError: no launcher has.
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
    """What the environment says about the speed and the safety of workers.

    Args:
        missing_malloc: variables of glibc's that are not set, with the values that CPU workers
            want.
        is_under_torchrun: whether torchrun started this process.
        shares_store: whether workers that are started again would meet in the store of those before
            them.
    """

    missing_malloc: dict[str, str]
    is_under_torchrun: bool
    shares_store: bool


def read_tuning() -> Tuning:
    """Read what decides how fast and how safely workers run."""
    return Tuning(
        missing_malloc={name: value for name, value in _MALLOC.items() if name not in os.environ},
        is_under_torchrun="TORCHELASTIC_RUN_ID" in os.environ,
        shares_store=os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1",
    )


# What Ray Train's driver hands on to its controller. All but the last may be set to something else
# by the user.
_RAY_DRIVER = {
    # A worker that is lost is seen after half a second instead of two, a node that is to be taken
    # away after one instead of five.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # How long a group of workers waits for its place before the cluster is looked at again: after a
    # node is lost Ray still believes in it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A print in a worker would be told twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths mean the same in workers as in the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def set_for_ray_driver() -> None:
    """Set what Ray Train shall find in the environment of the process that calls it."""
    for name, value in _RAY_DRIVER.items():
        os.environ.setdefault(name, value)


def for_ray_workers() -> dict[str, str]:
    """What Ray shall set in the environment of a worker, before it is started."""
    return {**_WORKER, **_MALLOC}


@dataclass(frozen=True)
class Cluster:
    """What the environment says about a Ray cluster that jobs are sent to. The token itself is for
    Ray alone.

    Args:
        address: of its dashboard, as given.
        has_token: whether there is one: in a variable, which goes before a file, or in a file.
        token_path: the file that is said to hold it.
    """

    address: str | None
    has_token: bool
    token_path: Path | None


def read_cluster() -> Cluster:
    """Read which Ray cluster is meant, and whether there is a token for it.

    Raises:
        ConfigError: the file that is to hold the token does not exist.
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
    """Have Ray send the token, if there is one.

    To be called before Ray is imported: it looks once.
    """
    if read_cluster().has_token:
        os.environ["RAY_AUTH_MODE"] = "token"


def set_for_ray_client(address: str) -> None:
    """Have Ray's client send jobs to this address; what is set here goes before the one that it is
    given.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address


def of_launched(rank: int, world_size: int, host: str, port: int, has_gpu: bool) -> dict[str, str]:
    """The environment of a process that is to be this worker, the only one that this launcher has
    on its machine.

    Args:
        rank, world_size: of the worker.
        host, port: where rank 0 is, and where the workers meet.
        has_gpu: whether a GPU is set aside for it; otherwise it sees none, for others may have it.
    """
    hidden = {} if has_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    told = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    words = {name: str(value) for name, value in told.items()}
    return {**_WORKER, **_MALLOC, **os.environ, **words, **hidden, "MASTER_ADDR": host}


def set_for_children() -> None:
    """Set what makes workers on a CPU fast and quiet, for those that this process starts; what is
    set already stays.
    """
    for name, value in {**_WORKER, **_MALLOC}.items():
        os.environ.setdefault(name, value)


def set_for_workers(run_folder: Path) -> None:
    """Set what the workers that this process starts shall find in their environment.

    What is set already stays, except for what must be so.
    """
    set_for_children()
    # With gloo, workers that are started again would otherwise find the addresses of their
    # predecessors.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[_RUN_FOLDER] = str(run_folder)
    os.environ[_LAUNCHER] = str(os.getpid())
    # Without SIGINT, which is the launcher's own (see run/interrupt.py); torch's agent would take
    # it.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGHUP,SIGQUIT"


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"environment variable {name} must be a number where RANK is set, got {text!r}. "
            "Start workers with torchrun, or unset RANK."
        )
    return int(text)
