"""A whole run, without a launcher."""

import pytest
import torch

from tests.train import runs

# 1437 = 4 * 359 + 1: the fifth step of an epoch has one sample, so all shards of it but the first are empty.
RAGGED = ["train.dtype=float64", "train.global_batch=359", "train.epochs=2", "train.lr=0.02"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_run_is_the_same_on_any_number_of_workers(pool, tmp_path, world_size):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder, workers in [(alone, 1), (together, world_size)]:
        folder.mkdir()
        pool(workers).run(runs.train_digits, str(folder), RAGGED)
    for kind in ("step", "epoch"):
        for one, many in zip(runs.events(alone, kind), runs.events(together, kind), strict=True):
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-12)
            assert {**many, "loss": 0, "seconds": 0} == {**one, "loss": 0, "seconds": 0}
    assert len(runs.events(alone, "step")) == 10


def test_local_statistics_make_it_another_run(pool, tmp_path):
    losses = []
    for sync in ("batch", "none"):
        folder = tmp_path / sync
        folder.mkdir()
        pool(2).run(runs.train_digits, str(folder), [*RAGGED, "train.epochs=1", f"norm.sync={sync}"])
        losses.append(runs.events(folder, "step")[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_first_loss_is_that_of_ten_equally_likely_digits(pool, tmp_path):
    pool(1).run(runs.train_digits, str(tmp_path), ["train.epochs=1", "train.global_batch=1437"])
    assert runs.events(tmp_path, "step")[0]["loss"] == pytest.approx(torch.tensor(10.0).log().item(), abs=0.5)


@pytest.mark.parametrize(("norm", "different"), [("norm.sync=batch", 1), ("norm.sync=none", 2)])
def test_what_a_run_leaves(pool, tmp_path, norm, different):
    options = ["train.epochs=2", "train.global_batch=500", norm]
    (outcome, position), (other, _) = pool(2).run(runs.train_digits, str(tmp_path), options)
    assert outcome == other
    assert len(set(outcome.digests)) == different
    assert position.step == 6

    epochs = runs.events(tmp_path, "epoch")
    assert [(event["epoch"], event["step"]) for event in epochs] == [(1, 3), (2, 6)]
    assert [event["step"] for event in runs.events(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["test_accuracy"] == outcome.test_accuracy
    assert all(event["seconds"] > 0 and event["lr"] > 0 for event in epochs)
    (end,) = runs.events(tmp_path, "end")
    assert end["digests"] == outcome.digests

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 6
    assert checkpoint["config"]["train"]["global_batch"] == 500
    assert checkpoint["model"]["bn1.num_batches_tracked"].item() == 6
    assert checkpoint["optimizer"]["state"][0]["momentum_buffer"].abs().max() > 0
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.jsonl"}
