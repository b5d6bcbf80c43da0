"""`syncnorm.load`, `evaluate`, `predict` and `export` on runs: raw inputs give what training saw."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import syncnorm
from syncnorm.errors import ConfigError, InputError
from syncnorm.run.ending import Exit, read_exit
from syncnorm.run.folder import write_config
from syncnorm.run.request import RunRequest
from syncnorm.run.worker import train_in
from syncnorm.train import loop
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.inputs import Inputs
from syncnorm.train.data.splits import Splits
from syncnorm.train.finished.predict import predict
from syncnorm.train.metrics import last_step
from syncnorm.train.models import MODELS
from tests.launch import commands
from tests.launch.commands import call
from tests.train import runs

TEST = digits(None).test
# Both layers; the first run's model is a moving average.
RUNS = {
    "norm": ("digits", ["train.epochs=2", "train.ema=0.9"]),
    "renorm": ("digits_renorm", ["train.epochs=1"]),
}


class Made(NamedTuple):
    folder: Path
    metrics: dict[str, float]


def make(pool, folder: Path, config: Config) -> Made:
    folder.mkdir()
    write_config(config, folder)
    ((outcome, _),) = pool(1).run(runs.train_sections, str(folder), config.model_dump())
    return Made(folder, outcome.metrics["test"])


@pytest.fixture(scope="module")
def made(pool, tmp_path_factory) -> dict[str, Made]:
    """The runs of `RUNS`, one worker each."""
    folder = tmp_path_factory.mktemp("use")
    return {
        name: make(pool, folder / name, load_config(config, overrides))
        for name, (config, overrides) in RUNS.items()
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The test images as files, some of them in a folder below; and all in one array."""
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(TEST.images[:, 0].numpy()):
        path = folder / f"{number // 100}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    np.save(folder / "x.npy", TEST.images.numpy())
    return folder


def accuracy(outputs: Any) -> float:
    classes = torch.as_tensor(outputs).argmax(1)
    return int((classes == TEST.labels).sum()) / len(TEST)


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_model_takes_raw_images(name, made):
    before = torch.get_rng_state(), random.getstate()
    model = syncnorm.load(made[name].folder)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not any(module.training for module in model.modules())
    assert accuracy(model(TEST.images)) == made[name].metrics["accuracy"] > 0.3
    assert (model.task, model.classes) == ("classify", tuple("0123456789"))
    assert model.config == load_config(*RUNS[name])
    with pytest.raises(InputError, match=r"must be \(N, 1, 8, 8\) of uint8, got shape \(4, 3, 8"):
        model(torch.zeros(4, 3, 8, 8))
    # By whatever name, and beside whatever else, they are standardised.
    raw = TEST.images.float()
    assert torch.equal(model(x=raw), model(TEST.images))
    for others, got in (((raw, raw), 2), ((), 0), ((raw.numpy(),), 0)):
        with pytest.raises(InputError, match=rf"of uint8, in one tensor, got {got}"):
            model(*others)


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_gives_the_runs_metrics(name, made, capfd):
    folder, metrics = made[name]
    status, out, err = call(capfd, "evaluate", folder, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["metrics"] == pytest.approx(metrics, rel=1e-12)
    assert found["metrics"]["accuracy"] == metrics["accuracy"]
    assert (found["split"], found["samples"]) == ("test", 360)


def test_evaluate_on_several_workers_and_on_other_data(made, tmp_path, capfd):
    folder, metrics = made["norm"]
    whole = [*commands.SYNCNORM, "evaluate", str(folder), "--json"]
    for several in ([*whole, "--workers", "2"], [*commands.TORCHRUN, *whole[1:]]):
        done = commands.run(several, tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["metrics"]
        assert found["accuracy"] == metrics["accuracy"]
        assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-6)

    # Other data are standardised as the run's own: the same test set beside other training images.
    other = "data.name=tests.launch.test_use:other_digits"
    options = ["--data", other.removeprefix("data."), "--allow", "tests", "--json"]
    status, out, err = call(capfd, "evaluate", folder, *options)
    assert status == 0, err
    assert json.loads(out)["metrics"]["accuracy"] == metrics["accuracy"]


def resume_without_memory(folder: str) -> None:
    config = load_config(f"{folder}/config.yaml", ["launch.memory_gib=0.05"])
    with pytest.raises(ConfigError, match="must be such that a step fits into memory"):
        train_in(Path(folder), RunRequest(config, "digits"), runs.workers(), runs.Free())


def resume_and_fail(folder: str) -> None:
    request = RunRequest(load_config(f"{folder}/config.yaml"), "digits")
    with mock.patch.object(loop, "check_memory", side_effect=RuntimeError("a driver is gone")):
        with pytest.raises(RuntimeError, match="a driver is gone"):
            train_in(Path(folder), request, runs.workers(), runs.Free())


def test_a_run_that_is_refused_when_it_is_resumed_stays_as_it_was(made, pool, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made["norm"].folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pool(1).run(resume_without_memory, str(folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_one_that_fails_then_has_its_steps(made, pool, tmp_path):
    """The failure comes before its checkpoint is read."""
    folder = tmp_path / "run"
    shutil.copytree(made["norm"].folder, folder)
    pool(1).run(resume_and_fail, str(folder))
    found = read_exit(folder)
    assert found is not None
    assert (found.status, found.step) == ("failed", last_step(folder / "metrics.jsonl"))
    assert found.step > 0


@pytest.mark.parametrize("factor", [1 / 255, 15.0])
def test_other_data_on_another_scale_are_told_of(made, capfd, monkeypatch, factor):
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", factor)
    data = ["--data", "name=tests.launch.test_use:scaled_digits", "--allow", "tests"]
    status, _, err = call(capfd, "evaluate", made["norm"].folder, *data)
    assert status == 0
    assert err.startswith("syncnorm: --data: by the run's mean and std its samples have a mean of ")
    assert err.endswith("are its numbers on another scale?\n")
    assert err.count("\n") == 1


FACTOR = 1.0


def scaled_digits(root):
    from syncnorm.train.data.datasets import Split, make_dataset

    data = digits(root)
    scaled = [Split(FACTOR * s.images.float(), s.labels) for s in (data.train, data.test)]
    return make_dataset(*scaled, 10)


class Mapping(nn.Module):
    """A network that is called with a mapping."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(values)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"values": torch.full((4,), index - 16.0), "labels": int(index > 16)}


def mappings(root, seed=0):
    inputs = Inputs(shape=(4,), dtype="float32", mean=(0.0,) * 4, std=(1.0,) * 4)
    return Splits(Rows(), Rows(), num_classes=2, in_channels=4, inputs=inputs)


def test_other_data_may_be_mappings(pool, tmp_path, capfd):
    config = Config(
        model={"name": "tests.launch.test_use:Mapping"},
        data={"name": "tests.launch.test_use:mappings"},
        norm={"name": "batch_norm", "sync": "none"},
        train={"epochs": 1, "global_batch": 16, "lr": 0.1},
    )
    folder, metrics = make(pool, tmp_path / "run", config)
    other = ["--data", "options.seed=5", "--allow", "tests", "--json"]
    status, out, err = call(capfd, "evaluate", folder, *other)
    assert (status, err) == (0, "")
    assert json.loads(out)["metrics"] == pytest.approx(metrics)


def test_other_data_have_no_more_classes_than_the_run(made, capfd):
    data = ["--data", "name=tests.launch.test_use:digits_of_12_classes", "--allow", "tests"]
    status, _, err = call(capfd, "evaluate", made["norm"].folder, *data)
    assert (status, err) == (2, "syncnorm: `--data` must have the run's 10 classes, got 12\n")


def digits_of_12_classes(root):
    from syncnorm.train.data.datasets import make_dataset

    data = digits(root)
    return make_dataset(data.train, data.test, 12)


def leaving(root):
    """Data whose code ends the program."""
    sys.exit(0)


def test_code_that_ends_the_program_is_no_success(made, tmp_path, capfd):
    data = ["--data", "name=tests.launch.test_use:leaving", "--allow", "tests"]
    status, out, err = call(capfd, "evaluate", made["norm"].folder, *data)
    assert (status, out) == (1, "")
    assert err.startswith("syncnorm: worker 0 failed: SystemExit: 0 (")
    whole = [*commands.SYNCNORM, "evaluate", str(made["norm"].folder), *data, "--workers", "2"]
    done = commands.run(whole, tmp_path, {"PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == 1, done.stdout
    assert "failed: RuntimeError: the worker's program was ended by SystemExit(0)" in done.stderr


def test_evaluate_by_other_statistics(made, tmp_path, capfd):
    folder, metrics = made["renorm"]
    losses = {"running": metrics["loss"]}
    for statistics in ("batch", "mix:0.7", "prior:16"):
        options = ["evaluate", str(folder), "--json", "--statistics", statistics]
        status, out, err = call(capfd, *options)
        assert (status, err) == (0, "")
        found = json.loads(out)["metrics"]
        losses[statistics] = found["loss"]
    assert len({round(loss, 4) for loss in losses.values()}) == 4
    # 360 samples in batches of 64: the last has 40, of which each of 2 workers has 20.
    done = commands.run([*commands.SYNCNORM, *options, "--workers", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)["metrics"]
    assert again["accuracy"] == found["accuracy"]
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_statistics_of_the_batch_mend_other_light(made, capfd):
    """Images of less contrast, more light and noise: what alpha-BN and its kin are for."""
    folder, metrics = made["norm"]
    other = ["--data", "name=tests.launch.test_use:dim_digits", "--allow", "tests", "--json"]
    accuracies = {}
    for statistics in ("running", "mix:0.5", "batch"):
        status, out, err = call(capfd, "evaluate", folder, "--statistics", statistics, *other)
        assert status == 0, err
        accuracies[statistics] = json.loads(out)["metrics"]["accuracy"]
    assert metrics["accuracy"] > 0.9
    assert accuracies["running"] < 0.5
    assert accuracies["running"] + 0.2 < accuracies["mix:0.5"]
    assert accuracies["batch"] > 0.7


def dim_digits(root):
    from syncnorm.train.data.datasets import Split, make_dataset

    data = digits(root)
    noise = torch.randn(data.test.images.shape, generator=torch.Generator().manual_seed(0))
    images = 0.4 * data.test.images.float() + 4 + 2 * noise
    train = Split(data.train.images.float(), data.train.labels)
    return make_dataset(train, Split(images, data.test.labels), 10)


def other_digits(root):
    from syncnorm.train.data.datasets import Split, make_dataset

    data = digits(root)
    train = Split(data.train.images[:100] * 3, data.train.labels[:100])
    return make_dataset(train, data.test, 10)


@pytest.mark.parametrize("name", RUNS)
def test_predictions_of_files_and_arrays_are_as_accurate(name, made, images, tmp_path, capfd):
    folder, metrics = made[name]
    out = tmp_path / "out.csv"
    files = [images, images / "x.npy"]
    assert call(capfd, "predict", folder, *files, "-o", out, "--top", "2")[0] == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for some in (rows[:360], rows[360:]):
        right = [int(row["class"]) == int(label) for row, label in zip(some, TEST.labels)]
        assert sum(right) / 360 == metrics["accuracy"]
    first, again = rows[3], rows[363]
    assert first["file"] == str(images / "0" / "003.png")
    assert (again["file"], again["index"]) == (str(images / "x.npy"), "3")
    assert first["name"] == first["class"] == again["class"] != first["class_2"]
    assert 1 >= float(first["probability"]) > float(first["probability_2"]) > 0


def test_names_that_are_no_text_are_written_by_numbers(made, images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "in" / os.fsdecode(b"caf\xe9 \xe6\x97\xa5.png")
    odd.parent.mkdir()
    shutil.copy(images / "0" / "003.png", odd)
    for name in ("out.jsonl", "out.csv"):
        status, _, err = call(capfd, "predict", made["norm"].folder, odd.parent, "-o", name)
        assert status == 0, err
    row = json.loads(Path("out.jsonl").read_text())
    assert row["file"] == str(odd)
    with Path("out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == str(odd).replace("\udce9", "\\udce9")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert call(capfd, "predict", made["norm"].folder, odd)[0] == 0
    assert json.loads(narrow.buffer.getvalue())["file"] == str(odd)


def test_a_file_that_is_no_image_stops_no_other(made, images, tmp_path, capfd):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "rows.npy", np.zeros((2, 5)))
    np.save(tmp_path / "none.npy", np.zeros((0, 1, 8, 8)))
    np.savez(tmp_path / "none.npz")
    good = images / "0" / "003.png"
    names = ("text.png", "empty", "rows.npy", "none.jpg", "none.npy", "none.npz")
    bad = [tmp_path / name for name in names]
    status, out, err = call(capfd, "predict", made["norm"].folder, *bad, good, "--top", 3)
    assert status == 1
    row = json.loads(out)
    assert row["file"] == str(good)
    assert row["top"][0]["class"] == row["class"]
    assert len(row["top"]) == 3
    lines = err.splitlines()
    assert len(lines) == 7
    for path, line in zip(bad, lines):
        assert line.startswith(f"syncnorm: {path}: must ")
    assert lines[4].endswith("got (0, 1, 8, 8)")
    assert lines[5].endswith("must be an array of numbers, got an archive of none")
    assert lines[6] == "syncnorm: 6 of the files or samples could not be predicted"


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (TEST.images[:3].numpy() / 255, "float64"),
        (TEST.images[:3].float().numpy(), "float32"),
        (TEST.images[:3].numpy().astype(int) * 100 - 7, "int64 with values from -7 to 1593"),
    ],
    ids=["shares", "floats", "whole numbers"],
)
def test_numbers_of_another_type_than_the_training_data_are_refused(
    array, got, made, tmp_path, capfd
):
    path = tmp_path / "x.npy"
    np.save(path, array)
    status, out, err = call(capfd, "predict", made["norm"].folder, path)
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"syncnorm: {path}: must be (N, 1, 8, 8) of uint8, as the training data are stored, got torch.{got}",
        "syncnorm: 1 of the files or samples could not be predicted",
    ]
    # A whole number is as good as another, if it is a byte's.
    np.save(path, TEST.images[:3].numpy().astype(int))
    assert call(capfd, "predict", made["norm"].folder, path)[0] == 0


def test_numbers_on_another_scale_are_told_of(made, tmp_path, capfd):
    """An ordinary image goes to 255, and the digits to 16; fractions are what `ToTensor` makes."""
    folder = made["norm"].folder
    for name in ("a.png", "b.png"):
        Image.fromarray(TEST.images[3, 0].numpy() * 15).save(tmp_path / name)
    status, out, err = call(capfd, "predict", folder, tmp_path)
    assert (status, len(out.splitlines())) == (0, 2)
    (line,) = err.splitlines()
    where = f"syncnorm: {tmp_path}/a.png: the mean of its pixels is "
    assert re.fullmatch(rf"{where}1\d standard deviations from that of .*another scale\?", line)
    model = syncnorm.load(folder)
    with pytest.warns(UserWarning, match="of 0 to 255, got fractions of at most 1: give bytes"):
        model((TEST.images / 16).requires_grad_())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_model_is_loaded_where_there_is_a_device(made):
    with pytest.raises(ConfigError, match="`device` must be cpu where there is no CUDA device"):
        syncnorm.load(next(iter(made.values())).folder, device="cuda")


def test_a_loaded_model_is_transformed_and_exported(made):
    """No value is looked at there."""
    model, x = syncnorm.load(made["norm"].folder), TEST.images[:3].float()
    outputs = model(x)
    batched = torch.func.vmap(lambda each: model(each[None])[0])(x)
    assert torch.allclose(batched, outputs, atol=1e-5)
    program = torch.export.export(model, (x,)).module()
    assert torch.allclose(program(x), outputs, atol=1e-5)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "npz"])
def test_a_file_is_what_it_was_until_all_is_predicted(
    suffix, made, images, tmp_path, capfd, monkeypatch
):
    output = tmp_path / f"out.{suffix}"
    output.write_text("of an earlier one")
    some = images / "0" / "003.png"

    def fail(model, samples):
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr("syncnorm.run.predict.predict", fail)
        status, _, err = call(capfd, "predict", made["norm"].folder, some, "-o", output)
    assert (status, "no more memory" in err) == (1, True)
    assert {each.name: each.read_text() for each in tmp_path.glob("*out*")} == {
        output.name: "of an earlier one"
    }
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    assert call(capfd, "predict", made["norm"].folder, broken, "-o", output)[0] == 1
    assert output.read_text() == "of an earlier one"
    assert call(capfd, "predict", made["norm"].folder, some, "-o", output)[0] == 0
    assert output.read_bytes() != b"of an earlier one"
    assert len(list(tmp_path.glob("*out*"))) == 1
    (tmp_path / f"folder.{suffix}").mkdir()
    for bad, why in (("nowhere/out", "No such file or directory"), ("folder", "Is a directory")):
        name = tmp_path / f"{bad}.{suffix}"
        status, _, err = call(capfd, "predict", made["norm"].folder, some, "-o", name)
        assert (status, err) == (
            2,
            f"syncnorm: `--output` must be writable, got {str(name)!r}: {why}\n",
        )
    assert not (tmp_path / "nowhere").exists()


def test_outputs_that_are_no_numbers_are_no_prediction(made, tmp_path, capfd, monkeypatch):
    """Not the first class, and not NaN, which JSON does not have."""

    def second_is_nan(model, samples):
        return predict(model, samples) * torch.tensor([[1.0], [torch.nan], [1.0]])

    monkeypatch.setattr("syncnorm.run.predict.predict", second_is_nan)
    np.save(tmp_path / "x.npy", TEST.images[:3].numpy())
    status, out, err = call(capfd, "predict", made["norm"].folder, tmp_path / "x.npy")
    assert status == 1
    assert [json.loads(line)["index"] for line in out.splitlines()] == [0, 2]
    # Libraries may have something to say, too.
    line, last = [line for line in err.splitlines() if line.startswith("syncnorm: ")]
    assert "Traceback" not in err
    assert line.startswith(f"syncnorm: {tmp_path / 'x.npy'}, sample 1: must have outputs that are")
    assert last == "syncnorm: 1 of the files or samples could not be predicted"
    output = tmp_path / "out.npz"
    assert call(capfd, "predict", made["norm"].folder, tmp_path / "x.npy", "-o", output)[0] == 0
    assert np.isnan(np.load(output)["outputs"]).any(1).tolist() == [False, True, False]


def test_a_metric_that_is_no_number_is_written_as_json_has_it(made, tmp_path, capfd):
    """Of a model whose weights are NaN; in `exit.json`, too."""
    folder = tmp_path / "run"
    shutil.copytree(made["renorm"].folder, folder)
    store = CheckpointStore(folder / "checkpoints")
    snapshot, path, _ = store.newest()
    assert snapshot is not None
    assert path is not None
    model = {
        name: t * torch.nan if t.is_floating_point() else t
        for name, t in snapshot.tensors["model"].items()
    }
    shutil.rmtree(path)
    store.write(replace(snapshot, tensors={**snapshot.tensors, "model": model}))
    status, out, err = call(capfd, "evaluate", folder, "--json")
    assert status == 0, err
    assert json.loads(out, parse_constant=pytest.fail)["metrics"]["loss"] == "nan"

    Exit("done", "", 3, 0, {"test": {"loss": math.nan, "accuracy": 0.5}}).write(folder)
    json.loads((folder / "exit.json").read_text(), parse_constant=pytest.fail)
    end = read_exit(folder)
    assert end is not None
    assert math.isnan(end.metrics["test"]["loss"])
    assert end.metrics["test"]["accuracy"] == 0.5


# With nothing of syncnorm's: a name that is None in sys.modules cannot be imported.
STRANGER = """
import json, sys
sys.modules["syncnorm"] = None
import numpy, torch
folder, names = sys.argv[1], sys.argv[2:]
x, y = numpy.load(f"{folder}/x.npy"), numpy.load(f"{folder}/y.npy")
for name in names:
    path = f"{folder}/{name}"
    if name.endswith(".pt2"):
        extra = {"syncnorm.json": ""}
        program = torch.export.load(path, extra_files=extra)
        run, facts = program.module(), extra["syncnorm.json"]
    else:
        import onnx
        model = onnx.load(path)
        facts = {each.key: each.value for each in model.metadata_props}["syncnorm"]
        try:
            import onnxruntime
            session = onnxruntime.InferenceSession(path)
        except ImportError:
            from onnx.reference import ReferenceEvaluator
            session = ReferenceEvaluator(model)
        run = lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    # Of any number of samples; one by one would give the same.
    outputs = torch.cat([run(torch.from_numpy(part)) for part in (x[:1], x[1:60], x[60:])])
    right = int((outputs.argmax(1) == torch.from_numpy(y)).sum())
    print(json.dumps([right / len(x), json.loads(facts)["classes"]]))
"""


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    return pytest.importorskip("onnx")


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_program_runs_without_syncnorm(suffix, made, tmp_path, capfd, request):
    if suffix == "onnx":
        request.getfixturevalue("onnx")
    np.save(tmp_path / "x.npy", TEST.images.numpy())
    np.save(tmp_path / "y.npy", TEST.labels.numpy())
    for name, (folder, _) in made.items():
        path = tmp_path / f"{name}.{suffix}"
        assert call(capfd, "export", folder, "-o", path) == (0, f"{path}\n", "")
    names = [f"{name}.{suffix}" for name in RUNS]
    done = commands.run([sys.executable, "-c", STRANGER, ".", *names], tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    accuracies = [metrics["accuracy"] for _, metrics in made.values()]
    assert found == [[share, list("0123456789")] for share in accuracies]


def test_weights_too_large_for_an_onnx_file_lie_beside_it(made, onnx, tmp_path, monkeypatch, capfd):
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    path = tmp_path / "new" / "model.onnx"
    (path.parent / ".tmp-model.onnx" / "of an export that was killed").mkdir(parents=True)
    path.write_bytes(b"of an earlier one")
    assert call(capfd, "export", made["norm"].folder, "-o", path) == (0, f"{path}\n", "")
    assert {each.name for each in path.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    # Opens the file that it names.
    assert onnx.load(path).graph.initializer[0].raw_data


@pytest.mark.parametrize("suffix", ["pt2", "onnx", "safetensors"])
def test_an_export_makes_no_folder(suffix, made, tmp_path, capfd):
    path = tmp_path / "nowhere" / f"model.{suffix}"
    assert call(capfd, "export", made["norm"].folder, "-o", path) == (
        2,
        "",
        f"syncnorm: `--output` must be a file that can be written, got {str(path)!r}: No such file or "
        "directory\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_exported_weights_fit_plain_batch_norms(name, made, tmp_path, capfd):
    path = tmp_path / "model.safetensors"
    assert call(capfd, "export", made[name].folder, "-o", path)[0] == 0
    plain = MODELS["digits_resnet"](in_channels=1, num_classes=10, norm_layer=nn.BatchNorm2d)
    plain.load_state_dict(safetensors.torch.load_file(path))
    with safetensors.safe_open(path, "pt") as file:  # pyright: ignore[reportAttributeAccessIssue]
        facts = json.loads(file.metadata()["syncnorm"])
    inputs = facts["inputs"]
    x = (TEST.images - torch.tensor(inputs["mean"])) / torch.tensor(inputs["std"])
    assert accuracy(plain.eval()(x)) == made[name].metrics["accuracy"]
    assert inputs["shape"] == [1, 8, 8]
    assert inputs["dtype"] == "uint8"
    assert facts["classes"] == list("0123456789")


def edit_config(old: str, new: str):
    def spoil(folder: Path) -> None:
        path = folder / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def newer_version(folder: Path) -> None:
    for path in folder.glob("checkpoints/*/manifest.json"):
        path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


def damage(folder: Path) -> None:
    for path in folder.glob("checkpoints/*/ema.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.yaml").unlink(), "has no config.yaml. Name the folder of a run."),
        (lambda f: shutil.rmtree(f / "checkpoints"), "has no checkpoints. Name the folder of a"),
        (damage, "ema.safetensors` must have the SHA-256"),
        (newer_version, "must be as this version of syncnorm writes it: 'version': "),
        (edit_config("digits_resnet", "os:system"), "To run its code, add --allow os."),
        (edit_config("digits_resnet", "resnet18_cifar"), "does not fit the run's configuration: "),
    ],
    ids=["no config", "no checkpoint", "damage", "newer", "code", "another model"],
)
def test_a_run_that_is_none(spoil, message, made, images, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(made["norm"].folder, folder)
    spoil(folder)
    for arguments in (
        ["evaluate", folder],
        ["predict", folder, images / "x.npy"],
        ["export", folder, "-o", tmp_path / "model.safetensors"],
    ):
        status, out, err = call(capfd, *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.parametrize("arguments", [["predict", "RUN", "x"], ["export", "RUN", "-o", "x.pt2"]])
def test_several_workers_do_not_write_the_same(arguments, made, tmp_path, monkeypatch, capfd):
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    test_bad_input(
        arguments, "must run in one process, got 2 workers", made, tmp_path, monkeypatch, capfd
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "RUN", "--split", "validation"], "`--split` must be one of train, test"),
        (["evaluate", "RUN", "--statistics", "mix"], "must be running, batch, mix:WEIGHT (of"),
        (["evaluate", "RUN", "--statistics", "mix:2"], "'mix:2': `source` must be in [0, 1], got"),
        (["evaluate", "RUN", "--statistics", "prior:few"], "could not convert string to float"),
        (["evaluate", "RUN", "--data", "nane=mnist"], "`data.nane` is not a key"),
        (["evaluate", "RUN", "--checkpoint", "best"], "no checkpoint is marked as the best one"),
        (["evaluate", "RUN", "--checkpoint", "recalibrated"], "Make it: syncnorm recalibrate"),
        (
            ["predict", "RUN", "x", "--checkpoint", "../other"],
            "`--checkpoint` must be newest, best",
        ),
        (["predict", "RUN", "x", "-o", "x.txt"], "`--output` must end in .jsonl, .json"),
        (["export", "RUN", "-o", "model.pth"], "must end in .safetensors, .pt2, .onnx, got"),
    ],
)
def test_bad_input(arguments, message, made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [made["norm"].folder if word == "RUN" else word for word in arguments]
    status, out, err = call(capfd, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_page_works_as_it_stands(made, images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made["norm"].folder, "RUN")
    shutil.copytree(images / "0", "photos")
    shutil.copy(images / "0" / "007.png", "one.png")
    shutil.copy(images / "x.npy", "array.npy")
    page = (Path(__file__).parents[2] / "docs" / "use.md").read_text()
    lines = re.findall(r"^syncnorm (.*)$", page, flags=re.MULTILINE)
    assert len(lines) == 8
    for line in lines:
        # Others start processes of their own, or need a package more; each has its test.
        if "--workers" not in line and not line.endswith((".onnx", ".pt2")):
            status, out, err = call(capfd, *shlex.split(line))
            assert (status, err) == (0, ""), line
            assert out or "-o" in line
    assert len(Path("predictions.csv").read_text().splitlines()) == 101
    names = {"images": TEST.images}
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert capfd.readouterr().out.startswith("classify 2 ['")
