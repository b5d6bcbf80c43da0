"""Connection to a Ray cluster's job server: its address, the token, and readable errors."""

import contextlib
import ipaddress
import logging
from collections.abc import Iterator
from urllib.parse import urlsplit

from syncnorm.errors import ConfigError, SyncnormError
from syncnorm.run.env import read_cluster, set_for_ray, set_for_ray_client

try:
    set_for_ray()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    from ray.runtime_env import RuntimeEnv as RuntimeEnv
    from requests.exceptions import RequestException
except ImportError:
    raise ConfigError("this command needs Ray: pip install 'syncnorm[ray]'") from None

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

# They log each package that they make and the end of each log that they read.
_CHATTY_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_GIVE_TOKEN = "export RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_TOKEN"


class ClusterError(SyncnormError):
    """A request to a cluster failed; the message is for the person who made it."""


def connect(address: str | None, insecure: bool) -> JobSubmissionClient:
    """Connect to a cluster's job server.

    Args:
        address: of the dashboard, http(s)://HOST:PORT; None: RAY_ADDRESS, else this machine's.
        insecure: send jobs to another machine although there is no token.

    Raises:
        ConfigError: the address is malformed, or the token is missing or refused.
        ClusterError: no cluster answers there.
    """
    cluster = read_cluster()
    address = (address or cluster.address or DEFAULT_ADDRESS).rstrip("/")
    check_address(address, cluster.has_token, insecure)
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    set_for_ray_client(address)
    with translated_errors(address):
        return JobSubmissionClient(address)


def check_address(address: str, has_token: bool, insecure: bool) -> None:
    """Raise ConfigError for a malformed address, or another machine's without a token."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"`--address` must be http://HOST:PORT of a Ray dashboard, got {address!r}. "
            f"Give --address, or set RAY_ADDRESS; on this machine it is {DEFAULT_ADDRESS}."
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"`--address` must hold no name and no password. To give a token: {_GIVE_TOKEN}."
        )
    if not (has_token or insecure or _is_loopback(parts.hostname)):
        raise ConfigError(
            f"`--address` must be of this machine where there is no token, got {address!r}: "
            "whoever reaches a job server runs code on its cluster. "
            f"{_GIVE_TOKEN}; or add --insecure on a network that you trust."
        )


@contextlib.contextmanager
def translated_errors(address: str) -> Iterator[None]:
    """Translate exceptions of Ray's client inside the block.

    Raises:
        ConfigError: the cluster refuses the token, or demands one; or the working folder is too large.
        ClusterError: anything else.
    """
    try:
        yield
    except AuthenticationError:
        what = "does not take this token" if read_cluster().has_token else "wants a token"
        raise ConfigError(f"the Ray cluster at {address} {what}: {_GIVE_TOKEN}.") from None
    except (ConnectionError, RequestException) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({type(error).__name__}). Give --address, or "
            "start one: ray start"
        ) from None
    except (RuntimeError, ValueError) as error:
        if "No available agent" in str(error):
            raise ClusterError(
                f"the Ray cluster at {address} has no agent that takes jobs: it has just been "
                "started, or the head's agent did not come up, mostly because its port is taken. "
                "Try again in a minute; if it stays so, dashboard_agent.log in the head's logs "
                "says why: start the head with --dashboard-agent-listen-port below 32768."
            ) from None
        if "Cannot connect to host" in str(error):
            raise ClusterError(
                f"the Ray cluster at {address} does not reach the node that had the job's driver, "
                "and has its log"
            ) from None
        if "Maximum request body size" in str(error):
            raise ConfigError(
                "the working folder, which is sent for the code in it, must not be larger than a Ray "
                "cluster takes. Keep data elsewhere, in data.root, or give `excludes` in "
                "--runtime-env."
            ) from None
        raise ClusterError(
            f"the Ray cluster at {address}: {' '.join(str(error).split())[:500]}"
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
