"""The commands submit, sweep, status, logs, stop and list. Ray is imported only when one is called."""

import contextlib
import json as json_format
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncnorm.errors import ConfigError
from syncnorm.run.arguments import Allow, Config, Insecure, Overrides
from syncnorm.run.env import set_for_ray_of_own
from syncnorm.run.in_process import add_working_folder_to_path
from syncnorm.run.interrupt import as_keyboard_interrupt

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from syncnorm.run.ray.job import Job
    from syncnorm.run.ray.submit import JobStatus
    from syncnorm.run.ray.sweep import Sweep

_PANEL = "On a Ray cluster"

_Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The dashboard's http(s)://HOST:PORT; RAY_ADDRESS if it is set, else this machine's.",
    ),
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, all else on standard error.")
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The job's submission id.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (submit, sweep, status, logs, stop):
        app.command(rich_help_panel=_PANEL)(command)
    app.command("list", rich_help_panel=_PANEL)(list_jobs)


_RuntimeEnv = Annotated[
    Path | None,
    typer.Option(
        "--runtime-env",
        metavar="FILE",
        help="Ray's runtime_env for the job, as YAML or JSON: pip, env_vars, working_dir, ...",
    ),
]
_Wait = Annotated[bool, typer.Option(help="Follow the job until it is over.")]


def submit(
    config: Config,
    overrides: Overrides = None,
    address: _Address = None,
    submission_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="Name of the job and of its folder in run_dir; by default made from the settings.",
        ),
    ] = None,
    wait: _Wait = True,
    allow: Allow = None,
    runtime_env: _RuntimeEnv = None,
    entrypoint_num_cpus: Annotated[
        float | None,
        typer.Option(min=0, metavar="N", help="CPUs of the job's driver, besides its workers'."),
    ] = None,
    entrypoint_num_gpus: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="GPUs of the job's driver.")
    ] = None,
    entrypoint_memory: Annotated[
        int | None, typer.Option(min=0, metavar="BYTES", help="Memory of the job's driver.")
    ] = None,
    entrypoint_resources: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Further resources of Ray of the job's driver."),
    ] = None,
    insecure: Insecure = False,
    json: _Json = False,
) -> None:
    """Train on a Ray cluster, from the run's newest checkpoint if there is one.

    The run's folder is run_dir/ID, which all machines of the cluster must share. The exit status is
    that of the run.
    """
    from syncnorm.run.ray.environment import make_runtime_env, read_resources, read_runtime_env
    from syncnorm.run.ray.job import check_folder, make_job

    job = make_job(config, overrides or [], allow or [], submission_id)
    environment = make_runtime_env(job.request().config, read_runtime_env(runtime_env))
    resources = read_resources(
        entrypoint_num_cpus, entrypoint_num_gpus, entrypoint_memory, entrypoint_resources
    )
    check_folder(job)
    with _client(address, insecure) as client:
        _start(client, "syncnorm.run.ray.driver", job, environment, wait, json, resources)


def sweep(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of a packed configuration. With --resume, the sweep's "
            "own if left out.",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE,VALUE...", help="Values to try, or one for all trials."),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML file with ranges to draw from: docs/sweep.md."),
    ] = None,
    asha: Annotated[
        bool, typer.Option("--asha", help="End trials early that fall behind (ASHA).")
    ] = False,
    concurrent: Annotated[
        int | None,
        typer.Option(min=1, help="Most trials at once; as many as there is room for if not given."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Go on with the sweep in this folder.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A Ray dashboard's http(s)://HOST:PORT; runs the trials as a job of its cluster.",
        ),
    ] = None,
    wait: _Wait = True,
    allow: Allow = None,
    runtime_env: _RuntimeEnv = None,
    insecure: Insecure = False,
    json: _Json = False,
) -> None:
    """Train trials of a configuration that differ in some keys, by Ray Tune, and compare them.

    On this machine, or as a job on a Ray cluster. Each trial is a run, with a folder in
    run_dir/NAME-sweep-... The last line of standard output is the sweep's folder. Exit status 0 if
    all trials are done, 1 if some have failed, 75 if it was stopped and can go on.
    """
    from syncnorm.run.ray.environment import make_runtime_env, names_code, read_runtime_env
    from syncnorm.run.ray.sweep import choose_sweep

    made = choose_sweep(
        config,
        values or [],
        space=space,
        allowed=allow or [],
        is_asha=asha,
        concurrent=concurrent,
        resume=resume,
        is_dated=address is None,
    )
    if address is None:
        for option, is_given in (
            ("--json", json),
            ("--runtime-env", runtime_env is not None),
            ("--no-wait", not wait),
            ("--insecure", insecure),
        ):
            if is_given:
                raise ConfigError(f"`{option}` must be left out without --address")
        set_for_ray_of_own()
        try:
            from syncnorm.run.ray.tune import run_local_sweep
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("ray", "pandas", "pyarrow"):
                raise
            raise ConfigError("this command needs Ray: pip install 'syncnorm[ray]'") from None

        if allow:
            add_working_folder_to_path()
        raise typer.Exit(run_local_sweep(made))
    configs = [made.config(number) for number in range(len(made.trials))]
    with_code = next(filter(names_code, configs), configs[0])
    environment = make_runtime_env(with_code, read_runtime_env(runtime_env))
    with _client(address, insecure) as client:
        _start(client, "syncnorm.run.ray.tune", made, environment, wait, json)


def _start(
    client: "JobSubmissionClient",
    module: str,
    work: "Job | Sweep",
    environment: dict[str, Any],
    wait: bool,
    json: bool,
    resources: dict[str, Any] | None = None,
) -> None:
    """Submit a job, follow it if that is wanted, and end with its exit status."""
    from syncnorm.run.ray import submit

    id = work.submission_id
    old = submit.start(
        client,
        submit.Entry(
            id, module, work.to_json(), work.name, work.folder, environment, resources or {}
        ),
    )
    if old is not None:
        note = f"submitted {id}; its folder is {work.folder}"
    else:
        note = f"{id} is running already, with the settings that it was submitted with"
    if not wait:
        _print_note(note)
        _print_status(submit.get_status(client, id), json)
        return
    status = _follow(client, id, json, old or (), note)
    if json:
        _print_status(status, json)
    elif status.exit_code == 75:
        after = f" after step {status.step}" if status.step else ""
        _print_note(f"stopped{after}. To go on: the same command")
    elif (status.reason or "").startswith(submit.LOST):
        _print_note(f"{id} {status.reason}. To go on: the same command")
    raise typer.Exit(1 if status.exit_code is None else status.exit_code)


def status(
    submission_id: _Id, address: _Address = None, insecure: Insecure = False, json: _Json = False
) -> None:
    """Print the state of a job."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        _print_status(submit.get_status(client, submission_id), json)


def logs(
    submission_id: _Id,
    address: _Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job is over.")] = False,
    insecure: Insecure = False,
    json: _Json = False,
) -> None:
    """Print the log of a job."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        if follow:
            _follow(client, submission_id, json)
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
    submission_id: _Id, address: _Address = None, insecure: Insecure = False, json: _Json = False
) -> None:
    """Let a job finish its step, save and end. Submitted again, it goes on from there."""
    with _client(address, insecure) as client:
        _stop(client, submission_id, json)


def list_jobs(address: _Address = None, insecure: Insecure = False, json: _Json = False) -> None:
    """List the jobs that syncnorm submitted to a cluster, the oldest first."""
    with _client(address, insecure) as client:
        from syncnorm.run.ray import submit

        jobs = submit.list_statuses(client)
        if json:
            print(json_format.dumps([asdict(job) for job in jobs]))
            return
        if not jobs:
            _print_note(f"no jobs of syncnorm's on {client.get_address()}")
        for job in jobs:
            print(f"{_format_times(job)}  {_format(job)}")


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
    client: "JobSubmissionClient",
    submission_id: str,
    json: bool,
    printed: Sequence[str] = (),
    note: str = "",
) -> "JobStatus":
    from syncnorm.run.ray import submit

    lines = submit.LogLines(sys.stderr if json else sys.stdout, printed)
    while True:
        try:
            # Ctrl-C may come as soon as this is read.
            if note:
                _print_note(note)
            note = ""
            return submit.follow(client, submission_id, lines)
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
        what = (
            f"Ray ends it when it begins. {status.reason}"
            if status.status == "PENDING"
            else "its workers finish their step and save"
        )
        _print_note(f"stopping {submission_id}: {what}")
        status = submit.stop(client, submission_id)
        if status.reason is None:
            _print_note(
                f"stopped; {status.folder} cannot be seen from here, or says nothing of its end"
            )
        elif status.exit_code == 75:
            after = f"after step {status.step}, saved" if status.step else "before its first step"
            _print_note(f"stopped {after}. To go on: submit it again")
        else:
            _print_note(f"it ended by itself before: {status.reason}")
    if json:
        _print_status(status, json)


def _print_status(status: "JobStatus", json: bool) -> None:
    print(json_format.dumps(asdict(status)) if json else _format(status), flush=True)


def _format(status: "JobStatus") -> str:
    parts = [f"{status.submission_id}  {status.status:<9}"]
    if status.exit_code is not None:
        parts.append(f"exit {status.exit_code:<2}")
    if status.step is not None:
        parts.append(f"step {status.step}")
    return "  ".join([*parts, *([status.reason] if status.reason else []), status.folder])


def _format_times(status: "JobStatus") -> str:
    """Write when a job began and how long it took so far."""
    if status.started is None:
        return f"{'-':<16}  {'-':>8}"
    seconds = round((status.ended or time.time()) - status.started)
    return f"{datetime.fromtimestamp(status.started):%Y-%m-%d %H:%M}  {timedelta(seconds=seconds)!s:>8}"


def _print_note(text: str) -> None:
    print(f"syncnorm: {text}", file=sys.stderr, flush=True)
