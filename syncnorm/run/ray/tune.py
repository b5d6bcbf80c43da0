"""The driver of a sweep: Ray Tune places its trials, each of them a `syncnorm train` on one node.

As a Ray job: `python -m syncnorm.run.ray.tune SWEEP`. On one machine the command itself is the
driver, of a Ray of its own.
"""

import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from syncnorm.errors import ConfigError
from syncnorm.run import env
from syncnorm.run.ending import Exit
from syncnorm.run.errors import RESUMABLE, RunError
from syncnorm.run.folder import lock
from syncnorm.run.interrupt import STOP_SIGNALS, handled, put_handlers
from syncnorm.run.ray import results
from syncnorm.run.ray.cluster import read_capacity
from syncnorm.run.ray.job import STOP, prepare_folder
from syncnorm.run.ray.sweep import Sweep, write_record
from syncnorm.run.resume import allow_options
from syncnorm.system import die_with_parent
from syncnorm.train.config.schema import Config
from syncnorm.train.files import open_to_write, remove_link
from syncnorm.train.metrics import last_step
from syncnorm.train.task.make import make_task

_OBJECT_STORE_BYTES = 100_000_000
_POLL_SECONDS = 0.5
# Of what the launcher prints, in the folder of a trial.
_LOG = "logs/launcher.log"
_VALUE, _EVALUATION, _CODE = "value", "evaluation", "exit_code"
# More evaluations than any trial makes.
_MOST = 1_000_000


def main(arguments: Sequence[str]) -> int:
    """Run a sweep as a job of the cluster that this process is in, and return its exit status."""
    env.set_for_ray_sweep()
    try:
        sweep = Sweep.from_json(arguments[0] if arguments else "")
        ray.init(address="auto", logging_level=logging.WARNING, log_to_driver=False)
        return run_sweep(sweep)
    except ConfigError as error:
        print(f"syncnorm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_local_sweep(sweep: Sweep) -> int:
    """Run a sweep on this machine, and return its exit status.

    Raises:
        ConfigError: the machine is too small for a trial, or a folder does not fit.
        RunError: Ray did not start.
    """
    env.set_for_ray_sweep()
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env={"env_vars": env.ray_sweep_environment()},
        )
    except Exception as error:
        # Ray's own class for a node that is not up within 30 seconds.
        if "timed out during startup" not in str(error):
            raise
        raise RunError(
            "Ray did not start within its 30 seconds: this machine is very busy. Try again."
        ) from None
    try:
        return run_sweep(sweep)
    finally:
        ray.shutdown()


def run_sweep(sweep: Sweep) -> int:
    """Run the trials that are not done on the connected cluster, and print the results.

    Returns:
        The exit status: 0 all done, 1 some failed, 75 stopped and saved.

    Raises:
        ConfigError: the cluster is too small for a trial, the trials have different metrics, a
            folder does not fit, or another process runs the sweep; nothing was started.
    """
    # It misses the files of metrics that the trials write by themselves.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    folder = Path(sweep.folder)
    metric = _metric(sweep)
    resources = _resources(sweep.config(0))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"`run_dir` must be a folder that can be written to, got {str(folder.parent)!r}: "
            f"{error.strerror}"
        ) from None
    with closing(lock(folder)):  # another one would end the trials of this one
        return _run(sweep, folder, metric, resources)


def _run(sweep: Sweep, folder: Path, metric: str, resources: dict[str, float]) -> int:
    for number in range(len(sweep.trials)):
        prepare_folder(sweep.job(number))
    for name in (STOP, "exit.json"):
        (folder / name).unlink(missing_ok=True)
    write_record(sweep, [], None)
    left = [
        number for number, name in enumerate(sweep.names()) if not results.is_over(folder / name)
    ]
    if left:
        note = f"{len(left)} of {len(sweep.trials)} trials to run"
        print(f"syncnorm: {note}; {folder}", file=sys.stderr, flush=True)
        with _stopping(sweep):
            _tuner(sweep, left, metric, resources).fit()
    found = results.read_results(sweep, metric)
    print("\n".join(results.write_results(sweep, found, metric)), flush=True)
    code = results.exit_code(found)
    over = sum(each.status in ("done", "early") for each in found)
    steps = sum(each.step for each in found)
    status = "done" if code == 0 else "stopped" if code == RESUMABLE else "failed"
    Exit(status, f"{over} of {len(found)} trials are done", steps, code).write(folder)
    return code


def run_trial(settings: dict[str, Any]) -> None:
    """Train a trial to its end on this node, and report each evaluation to Tune.

    Workers that are lost are started again by the trial's own launcher; if this process is lost, with
    its node perhaps, by Tune. Either way the trial goes on from its newest checkpoint.

    Args:
        settings: `sweep`, as JSON; `trial`, its number; `metric`, that decides.
    """
    sweep = Sweep.from_json(settings["sweep"])
    stop = Path(sweep.folder) / STOP
    folder = Path(sweep.folder) / sweep.names()[settings["trial"]]
    is_asked, reported = False, 0
    with _started(folder, sweep.allowed) as process:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if stop.exists() and not is_asked:
                is_asked = True
                process.send_signal(signal.SIGTERM)
            values = results.validations(folder, settings["metric"]) if sweep.is_asha else []
            for number, value in list(enumerate(values, start=1))[reported:]:
                tune.report({_EVALUATION: number, _VALUE: value})
                reported = number
    code = process.returncode
    if is_asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        reason = "asked to stop before its workers could save"
        Exit("stopped", reason, last_step(folder / "metrics.jsonl"), RESUMABLE).write(folder)
    elif code not in (0, RESUMABLE) and results.read_exit(folder) is None:
        lines = (folder / _LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        Exit("failed", lines[-1] if lines else f"status {code}", 0, code).write(folder)
    tune.report({_CODE: code})


@contextmanager
def _started(folder: Path, allowed: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the launcher of a trial, which ends with this process, however that ends."""
    (folder / "logs").mkdir(exist_ok=True)
    # By itself Python looks for modules in the working folder before all others.
    program = [sys.executable, "-P", "-m", "syncnorm"]
    command = [*program, "train", "--resume", str(folder), *allow_options(allowed)]
    (folder / "exit.json").unlink(missing_ok=True)
    remove_link(folder / _LOG)
    with (folder / _LOG).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env.trial_environment(has_code=bool(allowed)),
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _tuner(
    sweep: Sweep, left: Sequence[int], metric: str, resources: dict[str, float]
) -> tune.Tuner:
    restarts = sweep.config(left[0]).launch.restarts
    return tune.Tuner(
        tune.with_resources(run_trial, resources),
        param_space={"sweep": sweep.to_json(), "metric": metric},
        tune_config=tune.TuneConfig(
            num_samples=len(left),
            max_concurrent_trials=sweep.concurrent,
            search_alg=_Listed(sweep, left),
            scheduler=_scheduler(sweep, metric),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=f"{datetime.now():%Y%m%d-%H%M%S}",
            storage_path=str(Path(sweep.folder) / "ray"),
            failure_config=tune.FailureConfig(max_failures=restarts),
            callbacks=[_Teller(sweep, len(left))],
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:02d}"


def _scheduler(sweep: Sweep, metric: str) -> TrialScheduler | None:
    if not sweep.is_asha:
        return None
    mode = "min" if metric.startswith("-") else "max"
    # A trial's own end is that of its epochs or its patience, not the scheduler's.
    return ASHAScheduler(
        time_attr=_EVALUATION, metric=_VALUE, mode=mode, max_t=_MOST, stop_last_trials=False
    )


class _Listed(Searcher):
    """Search that takes the trials of a list, and no more once the sweep is to stop."""

    def __init__(self, sweep: Sweep, left: Sequence[int]) -> None:
        super().__init__()
        self._left = iter(left)
        self._stop = Path(sweep.folder) / STOP

    def suggest(self, trial_id: str) -> Any:
        number = None if self._stop.exists() else next(self._left, None)
        return Searcher.FINISHED if number is None else {"trial": number}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: a sweep goes on by its trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class _Teller(tune.Callback):
    """Callback that prints the end of each trial, and records ends that Tune decides."""

    def __init__(self, sweep: Sweep, count: int) -> None:
        self._folder, self._names = Path(sweep.folder), sweep.names()
        self._count, self._ended = count, itertools.count(1)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self._folder / self._names[trial.config["trial"]]
        if _CODE not in trial.last_result:
            results.note_early_end(folder)
        self._tell(folder)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self._folder / self._names[trial.config["trial"]]
        # A trial that only lost its node is started again, and then this is called, too.
        if trial.num_failures > trial.max_failures >= 0:
            Exit("failed", "its process was lost too often", 0, 1).write(folder)
            self._tell(folder)
        else:
            print(f"syncnorm: {folder.name} was lost; starting again", file=sys.stderr, flush=True)

    def _tell(self, folder: Path) -> None:
        end = results.read_exit(folder)
        what = "unfinished" if end is None else f"{end.status} after step {end.step}"
        count = f"({next(self._ended)} of {self._count})"
        print(f"syncnorm: {folder.name} {what} {count}", file=sys.stderr, flush=True)


@contextmanager
def _stopping(sweep: Sweep) -> Iterator[None]:
    """Let the trials save and end on the first signal to stop; a second one ends this process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        put_handlers(before)
        open_to_write(Path(sweep.folder) / STOP).close()
        print("syncnorm: stopping: the trials save", file=sys.stderr, flush=True)

    with handled(stop, *STOP_SIGNALS):
        yield


def _metric(sweep: Sweep) -> str:
    tasks = [sweep.config(number).task for number in range(len(sweep.trials))]
    names = {
        make_task(task, torch.device("cpu"), torch.float32, None, sweep.allowed).best
        for task in tasks
    }
    if len(names) > 1:
        raise ConfigError(
            "`task.best` must be the same for all trials of a sweep, got "
            f"{', '.join(sorted(names))}"
        )
    return names.pop()


def _resources(config: Config) -> dict[str, float]:
    """Return what a trial takes of one node; its workers share it.

    Raises:
        ConfigError: no node has so much.
    """
    count = config.launch.most_workers
    per_worker = read_capacity(config, {}).per_worker
    wanted = {name: number * count for name, number in per_worker.items()}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= each for name, each in wanted.items()) for node in nodes):
        each = " and ".join(f"{number:g} {name}" for name, number in wanted.items())
        raise ConfigError(
            f"`launch.workers` must fit on one node, as a trial's workers share it, got {count}: "
            f"that takes {each}, and no node has so much. Set fewer: launch.workers=1."
        )
    return wanted


if __name__ == "__main__":
    # Under its own name: Ray sends a function of `__main__` by value.
    from syncnorm.run.ray import tune as this

    sys.exit(this.main(sys.argv[1:]))
