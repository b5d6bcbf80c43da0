"""The loggers that have a name: TensorBoard, Weights & Biases, MLflow and trackio.

Options are those of the service's own call; defaults name the run and its project.
"""

import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from syncnorm.train.config import strict_yaml
from syncnorm.train.config.section import leaves

if TYPE_CHECKING:
    from syncnorm.train.loggers import LoggedRun, Logger

_PROJECT = "syncnorm"
# Of MLflow: parameters in a call, and characters of a value.
_MLFLOW_BATCH, _MLFLOW_LENGTH = 100, 500


class TensorBoard:
    """Event files in the run's folder; options are those of `SummaryWriter`."""

    def __init__(self, run: "LoggedRun", **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), **options)
        text = "".join(f"    {line}\n" for line in strict_yaml.dump(run.config).splitlines())
        self._writer.add_text("run", f"{' '.join([run.name, *run.tags])}\n\n{text}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run at Weights & Biases; options are those of `wandb.init`, such as project and mode."""

    def __init__(self, run: "LoggedRun", **options: Any) -> None:
        import wandb

        id = run.recall("wandb") or uuid.uuid4().hex[:16]
        given = {"project": _PROJECT, "name": run.name, "tags": list(run.tags), **options}
        self._run = wandb.init(
            **given,
            id=id,
            resume="allow",
            config=run.config,
            # What `tags` and `launch` say may have changed since.
            allow_val_change=True,
            dir=str(run.folder),
            # The screen is the run's own.
            settings=wandb.Settings(console="off", silent=True),
        )
        run.remember("wandb", id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of an MLflow experiment.

    Args:
        run: to be logged.
        tracking_uri: of the server or store; MLflow's own setting if it is left out.
        experiment: its name; made if it is not there.
    """

    def __init__(
        self, run: "LoggedRun", tracking_uri: str | None = None, experiment: str = _PROJECT
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient(tracking_uri)
        id = run.recall("mlflow")
        if id is not None:
            self._client.update_run(id, status="RUNNING")
        else:
            id = self._create(run, experiment)
            values = [
                Param(_mlflow_name(".".join(map(str, key))), str(value)[:_MLFLOW_LENGTH])
                for key, value in leaves(run.config)
            ]
            for start in range(0, len(values), _MLFLOW_BATCH):
                self._client.log_batch(id, params=values[start : start + _MLFLOW_BATCH])
            run.remember("mlflow", id)
        self._id = id

    def _create(self, run: "LoggedRun", experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = (
            self._client.create_experiment(experiment) if found is None else found.experiment_id
        )
        tags = {"tags": ", ".join(run.tags)} if run.tags else {}
        return self._client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _mlflow_name(key: str) -> str:
    """Replace what MLflow does not take in a name, such as the signs of a regular expression."""
    return re.sub(r"[^/\w.\- ]", "_", key)


class Trackio:
    """A run of a trackio project; options are those of `trackio.init`, such as space_id."""

    def __init__(self, run: "LoggedRun", **options: Any) -> None:
        import trackio

        self._trackio = trackio
        config = {**run.config, "tags": list(run.tags)}
        given = {"project": _PROJECT, "name": run.name, "embed": False, **options}
        # A run is found by its name.
        trackio.init(**given, config=config, resume="allow")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._trackio.log(dict(figures), step=step)

    def close(self) -> None:
        self._trackio.finish()


MAKERS: Mapping[str, Callable[..., "Logger"]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
