"""`syncnorm predict` on runs of other tasks than one class for each sample."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config, TaskSection
from syncnorm.train.data.inputs import Signature, Standardise
from syncnorm.train.data.sources.images import ImageReader, read_pixels
from syncnorm.train.finished.load import LoadedModel
from syncnorm.train.finished.predict import rows_of
from tests.launch.commands import SYNCNORM, call, run
from tests.launch.test_use import make

# By task, the shapes of a sample and of a target, and the network.
TASKS = {
    "multilabel": ((8,), (4,), "Perceptron"),
    "regress": ((8,), (), "Perceptron"),
    "segment": ((3, 12, 12), (12, 12), "SmallUNet"),
}


def test_rows_of_a_table_are_found_by_the_names_of_their_columns(pool, tmp_path, capfd):
    features = np.random.default_rng(0).normal(3.0, 50.0, (60, 8))
    names = [f"x{number}" for number in range(8)]
    kinds = np.where(features.sum(1) > 24, "many", "few")
    rows = [[*row, number, kind] for number, (row, kind) in enumerate(zip(features, kinds))]
    data = tmp_path / "data.csv"
    data.write_text(
        "\n".join(";".join(map(str, row)) for row in [[*names, "number", "kind"], *rows])
    )
    options = {"target": "kind", "drop": ["number"], "delimiter": ";", "test": 0.2}
    config = Config(
        model={"name": "tests.train.tasks:Perceptron"},
        data={"name": "csv", "root": str(data), "options": options},
        train={"epochs": 3, "global_batch": 20, "lr": 0.1},
    )  # pyright: ignore[reportArgumentType]
    folder, _ = make(pool, tmp_path / "run", config)
    np.save(tmp_path / "x.npy", features)
    predict = ["predict", folder, "--allow", "tests", "-o"]

    def answers(*arguments: object) -> list[dict]:
        assert call(capfd, *predict, tmp_path / "out.jsonl", *arguments).status == 0
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    expected = answers(tmp_path / "x.npy")
    assert len({row["name"] for row in expected}) == 2
    assert [{**row, "file": str(tmp_path / "x.npy")} for row in answers(data)] == expected

    # In another order, with a column that is none of the training's, without the target; and rows
    # of which some are bad.
    other = [";".join(["note", *names[::-1]])]
    other += [";".join(["?", *map(str, row[::-1])]) for row in features]
    other[4], other[7] = "?;1;2;3", other[7].replace(str(features[6, 2]), "nan")
    (tmp_path / "other.csv").write_text("\n".join(other))
    (tmp_path / "wrong.csv").write_text("x0;x1\n1;2\n")
    bad = [tmp_path, tmp_path / "wrong.csv", tmp_path / "none.csv"]
    status, out, err = call(capfd, *predict[:-1], tmp_path / "other.csv", *bad)
    assert status == 1
    got = [json.loads(line) for line in out.splitlines()]
    wanted = [row for row in expected if row["index"] not in (3, 6)]
    for row, other_row in zip(got, wanted, strict=True):
        # In batches of another size, which rounds otherwise.
        chance = pytest.approx(other_row["probability"], rel=1e-5)
        assert row == other_row | {"file": str(tmp_path / "other.csv"), "probability": chance}
    lines = [line.replace(f"{tmp_path}", "T") for line in err.splitlines()]
    assert lines[:-1] == [
        "syncnorm: T/other.csv, line 5: must have 9 values, got 4",
        "syncnorm: T/other.csv, line 8, column x2: must be a finite number of at most 3.4e+38, got "
        "'nan'. Fill it in.",
        "syncnorm: T: must be a table or an array of the run's inputs, got a folder",
        "syncnorm: T/wrong.csv: must have the columns of the training set, got none named 'x2'",
        "syncnorm: T/none.csv: cannot be read: No such file or directory",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks(task, pool, tmp_path, capfd):
    inputs, targets, model = TASKS[task]
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (40, *inputs), dtype=np.uint8)
    y = draw.integers(0, 2, (40, *targets))
    y = y if task == "segment" else y.astype("float32")
    data = tmp_path / "data.npz"
    np.savez(data, x_train=x, y_train=y, x_test=x, y_test=y)
    options = {"num_classes": 2} if task == "segment" else {}
    config = Config(
        model={"name": f"tests.train.tasks:{model}"},
        data={"name": "npz", "root": str(data), "options": options},
        task={"name": task},
        train={"epochs": 1, "global_batch": 20, "lr": 0.1},
    )  # pyright: ignore[reportArgumentType]
    folder, metrics = make(pool, tmp_path / "run", config)
    np.save(tmp_path / "x.npy", x)
    raw, allow = tmp_path / "raw.npz", ["--allow", "tests"]
    predict = ["predict", folder, tmp_path / "x.npy", *allow]
    assert call(capfd, *predict, "-o", raw)[0] == 0
    with np.load(raw) as file:
        outputs = file["outputs"]
        assert file["indices"].tolist() == list(range(40))
    if task == "segment":
        status, _, err = call(capfd, *predict)
        assert status == 2
        assert "`--output` must be a folder" in err
        Image.fromarray(x[7].transpose(1, 2, 0)).save(tmp_path / "seven.png")
        masks = tmp_path / "masks"
        assert call(capfd, *predict, tmp_path / "seven.png", "-o", masks)[0] == 0
        # A mask has its image's name.
        image = (tmp_path / "seven.png").read_bytes()
        for output in (tmp_path, masks, tmp_path / "not there yet"):
            status, _, err = call(capfd, *predict, tmp_path / "seven.png", tmp_path, "-o", output)
            assert (status, "`--output` must be apart from what is predicted" in err) == (2, True)
        assert (tmp_path / "seven.png").read_bytes() == image
        found = np.stack([np.asarray(Image.open(masks / f"x-{n}.png")) for n in range(40)])
        assert (found == y).mean() == pytest.approx(metrics["accuracy"])
        assert (np.asarray(Image.open(masks / "seven.png")) == found[7]).all()
        unread = shlex.join(map(str, [*SYNCNORM, *predict, "-o", masks]))
        # The pipe's other end is closed long before the first mask is there.
        done = run(["bash", "-c", f"{unread} | true; exit ${{PIPESTATUS[0]}}"], tmp_path)
        assert done.returncode == 1
        assert done.stderr == "syncnorm: standard output cannot be written: Broken pipe\n"
        return
    status, out, err = call(capfd, *predict)
    assert status == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    if task == "regress":
        values = np.array([row["value"] for row in rows])
        assert np.square(values - y).mean() == pytest.approx(metrics["mean_squared_error"])
        return
    for row, output in zip(rows, outputs, strict=True):
        assert row["labels"] == np.flatnonzero(output > 0).tolist()
        assert all(value > 0.5 for value in row["probabilities"])
    right = sum(row["labels"] == np.flatnonzero(t).tolist() for row, t in zip(rows, y))
    assert right / 40 == pytest.approx(metrics["exact_match"])


@pytest.mark.parametrize(
    ("task", "outputs", "row"),
    [
        (
            {"name": "multilabel", "loss": "BCELoss"},
            [0.25, 0.75],
            {"labels": [1], "names": [None], "probabilities": [0.75]},
        ),
        ({"name": "regress", "loss": "PoissonNLLLoss"}, [0.0], {"value": 1.0}),
        (
            {"name": "regress", "loss": "PoissonNLLLoss", "options": {"log_input": False}},
            [2.0],
            {"value": 2.0},
        ),
        (
            {"name": "classify", "loss": "BCELoss"},
            [0.25, 0.75],
            {"class": 1, "name": None, "probability": 0.75},
        ),
    ],
)
def test_predictions_are_what_the_loss_takes_outputs_for(task, outputs, row):
    config = load_config("digits").model_copy(update={"task": TaskSection(**task)})
    model = LoadedModel(nn.Identity(), config, Signature())
    assert rows_of(model, torch.tensor([outputs])) == [row]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_a_file_become_what_training_reads(channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (17, 30, 3), dtype=np.uint8)
    path = str(tmp_path / "wide.png")
    Image.fromarray(pixels).save(path)
    reader = ImageReader(12, channels, None, None)
    raw = read_pixels(path, reader.inputs.shape)
    assert (raw.dtype, raw.shape) == (torch.uint8, (channels, 12, 12))
    found = Standardise(reader.inputs, torch.float32)(raw[None])[0]
    torch.testing.assert_close(found, reader.read(path, in_training=False))
