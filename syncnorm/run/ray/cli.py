"""The commands submit, status, logs, stop and list. Ray is imported only when one is called."""

import contextlib
import json as json_format
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from syncnorm.run.interrupt import as_keyboard_interrupt

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from syncnorm.run.ray.submit import JobStatus

_PANEL = "On a Ray cluster"

_Address = Annotated[
    str | None,
    typer.Option(
        help="http(s)://HOST:PORT of the dashboard; RAY_ADDRESS if it is set, else this machine's."
    ),
]
_Insecure = Annotated[
    bool, typer.Option("--insecure", help="Connect to another machine without a token.")
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, all else on standard error.")
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The job's submission id.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (submit, status, logs, stop):
        app.command(rich_help_panel=_PANEL)(command)
    app.command("list", rich_help_panel=_PANEL)(list_jobs)


def submit(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of a packed configuration such as digits.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace values.")
    ] = None,
    address: _Address = None,
    submission_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="Name of the job and of its folder in run_dir; by default made from the settings.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job until it is over.")] = True,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE", help="A package whose callables the configuration may name."
        ),
    ] = None,
    insecure: _Insecure = False,
    json: _Json = False,
) -> None:
    """Train on a Ray cluster, from the run's newest checkpoint if there is one.

    The run's folder is run_dir/ID, which all machines of the cluster must share. The exit status is
    that of the run.
    """
    from syncnorm.run.ray.job import make_job

    job = make_job(config, overrides or [], allow or [], submission_id)
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        old = submit.start(client, job)
        if old is not None:
            note = f"submitted {job.submission_id}; the run's folder is {job.folder}"
        else:
            note = f"{job.submission_id} is running already, with the settings that it was "
            note += "submitted with"
        if not wait:
            _print_note(note)
            _print_status(submit.get_status(client, job.submission_id), json)
            return
        status = _follow(client, job.submission_id, json, old or 0, note)
        if json:
            _print_status(status, json)
        elif status.exit_code == 75:
            _print_note(f"stopped after step {status.step}. To go on: the same command")
        raise typer.Exit(1 if status.exit_code is None else status.exit_code)


def status(
    submission_id: _Id, address: _Address = None, insecure: _Insecure = False, json: _Json = False
) -> None:
    """Print the state of a job."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        _print_status(submit.get_status(client, submission_id), json)


def logs(
    submission_id: _Id,
    address: _Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job is over.")] = False,
    insecure: _Insecure = False,
    json: _Json = False,
) -> None:
    """Print the log of a job."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        if follow:
            _follow(client, submission_id, json, 0)
            return
        text = submit.logs(client, submission_id)
        if json:
            print(json_format.dumps({"submission_id": submission_id, "logs": text}))
            return
        for line in text.splitlines():
            submit.print_log_line(line, sys.stdout)


def verify_on_cluster(
    address: str | None, insecure: bool, workers: int, arguments: Sequence[str], packs_code: bool
) -> int:
    """Run `syncnorm verify ARGUMENTS` on workers of a cluster, and return its exit status."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray.verify import submit_verify

        return submit_verify(client, workers, arguments, packs_code)


def stop(
    submission_id: _Id, address: _Address = None, insecure: _Insecure = False, json: _Json = False
) -> None:
    """Let a job finish its step, save and end. Submitted again, it goes on from there."""
    with _client(address, insecure) as client:
        _stop(client, submission_id, json)


def list_jobs(address: _Address = None, insecure: _Insecure = False, json: _Json = False) -> None:
    """List the jobs that syncnorm submitted to a cluster, the oldest first."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        jobs = submit.list_statuses(client)
        if json:
            print(json_format.dumps([job.as_dict() for job in jobs]))
        for job in [] if json else jobs:
            print(_format(job))


@contextlib.contextmanager
def _client(address: str | None, insecure: bool) -> "Iterator[JobSubmissionClient]":
    from syncnorm.run.ray.client import ClusterError, connect

    try:
        with as_keyboard_interrupt():
            yield connect(address, insecure)
    except ClusterError as error:
        _print_note(str(error))
        raise typer.Exit(1) from None


def _follow(
    client: "JobSubmissionClient", submission_id: str, json: bool, skip: int, note: str = ""
) -> "JobStatus":
    from syncnorm.run.ray import submit

    while True:
        try:
            # Ctrl-C may come as soon as this is read.
            if note:
                _print_note(note)
            note = ""
            return submit.follow(client, submission_id, skip, to_stdout=not json)
        except KeyboardInterrupt:
            choice = _ask() if sys.stdin.isatty() and sys.stderr.isatty() else "d"
        if choice == "s":
            _stop(client, submission_id, json)
            raise typer.Exit(75)
        if choice == "d":
            _print_note(f"{submission_id} goes on. To look again: syncnorm logs -f {submission_id}")
            _print_note(f"To stop it: syncnorm stop {submission_id}")
            raise typer.Exit(0)


def _ask() -> str:
    """Ask to detach (d) from the followed job or to stop it (s); empty: go on."""
    # Not typer.prompt: it writes to standard output, which belongs to the result.
    print("\ndetach or stop? [d/s], or Enter to go on: ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower()[:1]
    except (EOFError, KeyboardInterrupt):
        return "d"


def _stop(client: "JobSubmissionClient", submission_id: str, json: bool) -> None:
    from syncnorm.run.ray import submit

    status = submit.get_status(client, submission_id)
    if status.is_over:
        _print_note(f"{submission_id} is over already: {_format(status)}")
    else:
        _print_note(f"stopping {submission_id}: its workers finish their step and save")
        status = submit.stop(client, submission_id)
        if status.reason is None:
            _print_note(
                f"stopped; {status.folder} cannot be seen from here, or says nothing of its end"
            )
        elif status.exit_code == 75:
            _print_note(f"stopped after step {status.step}, saved. To go on: submit it again")
        else:
            _print_note(f"it ended by itself before: {status.reason}")
    if json:
        _print_status(status, json)


def _print_status(status: "JobStatus", json: bool) -> None:
    print(json_format.dumps(status.as_dict()) if json else _format(status), flush=True)


def _format(status: "JobStatus") -> str:
    parts = [f"{status.submission_id}  {status.status:<9}"]
    if status.exit_code is not None:
        parts.append(f"exit {status.exit_code:<2}")
    if status.step is not None:
        parts.append(f"step {status.step}")
    return "  ".join([*parts, *([status.reason] if status.reason else []), status.folder])


def _print_note(text: str) -> None:
    print(f"syncnorm: {text}", file=sys.stderr, flush=True)
