"""One network of those of two runs."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from syncnorm import recalibrate
from syncnorm.errors import ConfigError, InputError
from syncnorm.merge import interpolate, match_weights
from syncnorm.train.checkpoint.evaluated import NEWEST, share_evaluated
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.config.schema import Config
from syncnorm.train.finished.load import make_evaluated, signature_of
from syncnorm.train.finished.recalibrate import share_of_batches, split_to_compare_by
from syncnorm.train.renewal import Judged, has_statistics
from syncnorm.train.setup import autocast, load_feed, task_of
from syncnorm.train.step import evaluate
from syncnorm.train.workers import Workers


@dataclass(frozen=True)
class Merged:
    """A merged network, and the metrics of both runs and its own.

    Args:
        split: that they are of.
        metrics: of the first run, the second and the merged network, by name.
        snapshot: the merged network, to be written.
    """

    split: str
    metrics: tuple[dict[str, float], dict[str, float], dict[str, float]]
    snapshot: Snapshot


def merge_runs(
    folders: tuple[Path, Path],
    configs: tuple[Config, Config],
    alpha: float,
    is_matched: bool,
    workers: Workers,
    allowed: tuple[str, ...],
) -> Merged:
    """Interpolate the evaluated models of two runs.

    Running statistics are re-estimated on the first run's training set, of which each worker has
    its share.

    *Collectives*: two broadcasts, one all-reduce of `syncnorm.recalibrate` and those of three
    evaluations; every worker must call.

    Raises:
        ConfigError: the runs differ in network or inputs, or cannot be merged; on all workers.
    """
    config = configs[0]
    snapshots = [share_evaluated(folder, NEWEST, workers) for folder in folders]
    signatures = [signature_of(*each) for each in zip(snapshots, folders, strict=True)]
    # Where a run's weights began does not matter.
    model, other = (each.model.model_dump(exclude={"weights", "partial"}) for each in configs)
    if model != other or signatures[0] != signatures[1]:
        raise ConfigError(
            f"runs {str(folders[0])!r} and {str(folders[1])!r} must be of one `model`, trained on "
            "inputs that were standardised alike, and on the same classes"
        )
    with closing(load_feed(config, workers.device, allowed)) as feed:
        split = split_to_compare_by(feed)
        a, b = (
            make_evaluated(each, signatures[0], snapshot, folder, workers.device, allowed)
            for each, snapshot, folder in zip(configs, snapshots, folders, strict=True)
        )
        try:
            merged = interpolate(a, match_weights(a, b) if is_matched else b, alpha)
        except InputError as error:
            raise ConfigError(str(error)) from None
        task = task_of(config, workers.device, feed, allowed)
        if has_statistics(merged):
            with autocast(config, workers.device):
                recalibrate(Judged(merged, task), share_of_batches(feed, workers, config))
        first, second, third = (
            evaluate(task, each, feed, split, config, workers) for each in (a, b, merged)
        )
        # What the optimizer had is of neither.
        snapshot = replace(snapshots[0], tensors={"model": merged.state_dict()}, states={})
        return Merged(split, (first, second, third), snapshot)
