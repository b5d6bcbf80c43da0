"""Sources of numbers: arrays in memory and on disk, tables, and Hugging Face's data sets."""

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from syncnorm.errors import ConfigError
from syncnorm.train.data.inputs import Standardise
from syncnorm.train.data.sources.arrays import npy, npz
from syncnorm.train.data.sources.huggingface import _decoded, hf
from syncnorm.train.data.sources.table import csv

from .files import inputs_of, samples_of, targets_of, write_csv


def arrays(**changed: Any) -> dict[str, Any]:
    """Give arrays of 10 and of 4 samples (3, 2, 2) of 5 classes; None leaves one out."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {
        "x_train": random.normal(5, 3, (10, 3, 2, 2)),
        "y_train": np.arange(10) % 5,
        "x_test": random.normal(5, 3, (4, 3, 2, 2)),
        "y_test": np.arange(4),
        **changed,
    }
    return {name: array for name, array in made.items() if array is not None}


def write_npz(folder: Path, **changed: Any) -> Path:
    np.savez(folder / "data.npz", **arrays(**changed))
    return folder / "data.npz"


def write_npy(folder: Path, **changed: Any) -> Path:
    for name, array in arrays(**changed).items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize(("write", "load"), [(write_npz, npz), (write_npy, npy)])
def test_arrays_are_standardised_by_channel(tmp_path, write, load):
    splits = load(write(tmp_path))
    assert (splits.num_classes, splits.in_channels) == (5, 3)
    train = inputs_of(splits.train)
    assert train.dtype == torch.float64
    assert torch.allclose(train.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(
        train.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-12
    )
    given = load(tmp_path, mean=[1.0, 2.0, 3.0], std=[2.0, 2.0, 4.0])
    x = torch.from_numpy(arrays()["x_test"])
    expected = (x - torch.tensor([1, 2, 3])[:, None, None]) / torch.tensor([2, 2, 4])[:, None, None]
    assert torch.equal(inputs_of(given.test), expected)
    assert targets_of(splits.test) == [0, 1, 2, 3]
    assert splits.train[0][1].dtype == torch.int64


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">f4", "float16", "bool"])
def test_numbers_of_every_type_are_read(tmp_path, dtype):
    x = np.arange(40).reshape(10, 4).astype(dtype)
    splits = npy(write_npy(tmp_path, x_train=x, x_test=x[:4]), mean=[0.0] * 4, std=[1.0] * 4)
    assert inputs_of(splits.train).dtype == torch.float32
    assert inputs_of(splits.train).tolist() == x.astype("f4").tolist()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "float64"])
def test_large_whole_numbers_keep_the_digits_that_differ(tmp_path, dtype):
    """Such as dates in seconds."""
    x = (1_700_000_000 + np.arange(40)).reshape(10, 4).astype(dtype)
    splits = npz(write_npz(tmp_path, x_train=x, x_test=x[:4]))
    expected = (x - x.mean(0, dtype="f8")) / x.std(0, dtype="f8")
    got = inputs_of(splits.train)
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert got.numpy() == pytest.approx(expected, rel=1e-6)
    raw = torch.from_numpy(x.astype("i8")).to(getattr(torch, dtype))
    assert torch.equal(Standardise(splits.inputs, got.dtype)(raw), got)


def test_floating_targets_are_numbers_to_learn(tmp_path):
    y = np.arange(10, dtype="f4")
    splits = npz(write_npz(tmp_path, y_train=y, y_test=y[:4]))
    assert splits.num_classes == 1
    assert targets_of(splits.train) == y.tolist()
    splits = npz(write_npz(tmp_path, y_train=np.ones((10, 6)), y_test=np.ones((4, 6))))
    assert splits.num_classes == 6


def test_maps_of_classes_may_hold_255(tmp_path):
    y = np.full((10, 2, 2), 255, dtype="u1")
    path = write_npz(tmp_path, y_train=y, y_test=y[:4])
    assert npz(path, num_classes=3).num_classes == 3
    assert npz(path).num_classes is None


def anonymous_memory() -> int:
    """Count the bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


def test_arrays_on_disk_stay_there(tmp_path):
    shape = (20_000, 3, 16, 21_000)  # of bytes: 20 GB, of which none is written
    header = np.lib.format.open_memmap(tmp_path / "x_train.npy", mode="w+", dtype="u1", shape=shape)
    del header
    np.save(tmp_path / "y_train.npy", np.zeros(20_000, dtype="i8"))
    before = anonymous_memory()
    data = npy(tmp_path, mean=[0.0] * 3, std=[1.0] * 3).train
    for index in range(0, 20_000, 500):
        assert data[index][0].sum() == 0
    assert anonymous_memory() - before < 100e6  # a sample is 4 MB
    assert len(pickle.dumps(data)) < 10_000  # to a loader's process goes no content
    batches = DataLoader(data, sampler=[7, 19_999], num_workers=1)
    assert [tuple(x.shape) for x, _ in batches] == [(1, 3, 16, 21_000)] * 2


X = arrays()["x_train"]
NAN = X.copy()
NAN[3, 1, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"y_train": None}, "must hold y_train, got"),
        (
            {"x_val": X, "y_val": np.arange(10), "x_valid": X, "y_valid": np.arange(10)},
            "must hold one pair of arrays for validation, got val and valid in ",
        ),
        ({"x_test": None}, "must hold x_test, got"),
        ({"x_train": NAN}, "must be finite, got nan or inf"),
        ({"y_train": np.arange(9)}, "must have x (N, C, ...) and y (N, ...), got (10, 3, 2, 2)"),
        ({"y_train": np.arange(10) - 1}, "y of train must be from 0 to 8, got -1 for sample 0"),
        (
            {"y_train": np.arange(10, dtype="u8") + 2**63},
            "y of train must number the classes from 0, got 9223372036854775817 for sample 9",
        ),
        ({"y_test": np.array([0, 1, 2, 5])}, "y of test must be from 0 to 4, got 5 for sample 3"),
        ({"y_train": np.array(["a"] * 10)}, "y of train must be numbers, got <U1"),
        ({"x_test": X[:4, :2]}, "x of test must be like that of train, float64 (N, 3, 2, 2), got"),
        ({"y_test": np.ones(4)}, "y of test must be like that of train, int64 (N, ), got float64"),
        ({"x_test": X[:0], "y_test": np.arange(0)}, "must leave samples for test, got none"),
    ],
)
@pytest.mark.parametrize(("write", "load"), [(write_npz, npz), (write_npy, npy)])
def test_an_array_that_does_not_fit_is_named(tmp_path, write, load, changed, named):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, **changed))
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("write", "load"), [(write_npz, npz), (write_npy, npy)])
def test_pickled_objects_are_not_loaded(tmp_path, write, load):
    with pytest.raises(ConfigError, match=r"y_train.*(Object arrays|Python objects)"):
        load(write(tmp_path, y_train=np.array([None] * 10)))


def test_options_of_arrays_that_do_not_fit_are_named(tmp_path):
    path = write_npz(tmp_path)
    with pytest.raises(ConfigError, match=r"`data.options.mean` must have a value for each of 3"):
        npz(path, mean=[0.0])
    with pytest.raises(ConfigError, match=r"std` must .* greater than 0, got"):
        npz(path, std=[1.0, 0.0, 1.0])
    with pytest.raises(ConfigError, match="y of train must be from 0 to 3, got 4"):
        npz(path, num_classes=4)


def test_files_that_are_no_arrays_are_named(tmp_path):
    with pytest.raises(ConfigError, match="a folder with one, got 0 in"):
        npz(tmp_path)
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ConfigError, match=r"data.npz: must be arrays that numpy can read"):
        npz(tmp_path)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ConfigError, match=r"must be an .npz of several arrays"):
        npz(tmp_path / "one.npy")


ROWS = [["id", "a", "b", "kind"]] + [
    [n, n * 0.5, 7, ("dog", "cat", "eel")[n % 3]] for n in range(9)
]


def test_a_table_becomes_standardised_features_and_classes(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [ROWS[0], [0, 2.0, 8, "cat"]])
    splits = csv(tmp_path, target="kind", drop=["id"])
    assert (splits.num_classes, splits.in_channels) == (3, 2)
    train = inputs_of(splits.train)
    assert train.dtype == torch.float32
    a = torch.arange(9) * 0.5
    assert torch.allclose(train[:, 0], (a - a.mean()) / a.std(correction=0))
    assert (train[:, 1] == 0).all()  # constant
    assert targets_of(splits.train) == [1, 0, 2] * 3
    assert splits.test[0][0].tolist() == [0, 1]
    assert targets_of(splits.test) == [0]


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
def test_a_constant_of_an_array_is_a_constant(tmp_path, value):
    x = np.full((37, 2), value)
    x[:, 1] = np.arange(37)
    np.savez(tmp_path / "some.npz", x_train=x, y_train=np.arange(37) % 2)
    train = inputs_of(npz(tmp_path / "some.npz").train)
    assert train[:, 0].abs().max() < 1e-15
    assert train[:, 1].std(correction=0) == pytest.approx(1.0)


def test_a_constant_without_an_exact_mean_is_a_constant(tmp_path):
    write_csv(tmp_path / "train.csv", [["a", "y"], *([0.1, n % 2] for n in range(37))])
    write_csv(tmp_path / "test.csv", [["a", "y"], [0.35, 0]])
    splits = csv(tmp_path, target="y")
    assert inputs_of(splits.train).abs().max() < 1e-15
    assert splits.test[0][0].item() == pytest.approx(0.25)


def test_classes_of_numbers_are_in_their_order(tmp_path):
    rows = [["x", "y"], *([n, label] for n, label in enumerate([10, 9, 2, 10]))]
    splits = csv(write_csv(tmp_path / "some.csv", rows), target="y")
    assert targets_of(splits.train) == [2, 1, 0, 2]
    assert splits.test is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["2", "1", "1.0"],
            "must name classes that differ, got '1' and '1.0', which are one number",
        ),
        (["2", "01", "1"], "must name classes that differ, got '01' and '1', which are one number"),
        (["2", "NaN", "1"], "line 3, column y: must be a class of the training set, got 'NaN'"),
        (["cat", "dog", "nan"], "line 4, column y: must be a class of the training set, got 'nan'"),
        (["1", "", "2"], "line 3, column y: must be a class of the training set, got ''"),
    ],
)
def test_targets_that_name_no_class_of_their_own_are_refused(tmp_path, labels, message):
    rows = [["x", "y"], *([n, label] for n, label in enumerate(labels))]
    with pytest.raises(ConfigError, match=re.escape(message)):
        csv(write_csv(tmp_path / "some.csv", rows), target="y")


@pytest.mark.parametrize(
    "labels", [["+", "-"], ["100", "1e2"], ["9007199254740992", "9007199254740993"]], ids=str
)
def test_codes_are_classes(tmp_path, labels):
    rows = [["x", "y"], *([n, label] for n, label in enumerate(labels))]
    assert csv(write_csv(tmp_path / "some.csv", rows), target="y").num_classes == 2


def test_a_quote_that_is_not_closed_is_an_error(tmp_path):
    """Not a value of all the rest of the file."""
    lines = ["x,y", "1,a", '2,"b', *(f"{n},a" for n in range(9))]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match="quotes around whole ones only: unexpected end of data"):
        csv(tmp_path, target="y")


def test_names_of_sets_may_have_capitals(tmp_path, caplog):
    for name in ("Train.csv", "TEST.CSV", "other.csv"):
        write_csv(tmp_path / name, [["x", "y"], [1, 0], [2, 1]])
    splits = csv(tmp_path, target="y")
    assert splits.test is not None
    assert (len(splits.train), len(splits.test)) == (2, 2)
    assert "data.root: other are no sets of" in caplog.text
    write_csv(tmp_path / "TEST.csv", [["x", "y"], [1, 0]])
    with pytest.raises(ConfigError, match=r"must hold one table of each name, got TEST\.CSV and"):
        csv(tmp_path, target="y")


def test_a_table_of_numbers_to_learn(tmp_path):
    path = write_csv(tmp_path / "some.csv", [["y", "x"], [0.5, 1], [-2, 3]])
    splits = csv(path, target="y", kind="regress")
    assert splits.num_classes == 1
    assert targets_of(splits.train) == [0.5, -2.0]
    # Dates in seconds, for a run in float64.
    path = write_csv(tmp_path / "dates.csv", [["y", "x"], [1_700_000_001, 1], [1_700_000_002, 3]])
    splits = csv(path, target="y", kind="regress")
    assert targets_of(splits.train) == [1_700_000_001, 1_700_000_002]


def test_equal_rows_stay_together_in_a_cut(tmp_path):
    rows = [["x", "y"], *([n % 40, n % 2] for n in range(200))]
    splits = csv(write_csv(tmp_path / "some.csv", rows), target="y", test=0.3)
    assert splits.test is not None
    held, kept = ({x.item() for x, _ in samples_of(part)} for part in (splits.test, splits.train))
    assert len(held) + len(kept) == 40
    assert len(splits.train) + len(splits.test) == 200


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        (
            [["a", "y"], [1, 0], ["nan", 1]],
            {},
            "line 3, column a: must be a finite number of at most 3.4e+38, got 'nan'",
        ),
        (
            [["a", "y"], ["", 0]],
            {},
            "line 2, column a: must be a finite number of at most 3.4e+38, got ''",
        ),
        (
            [["a", "y"], ["1_000", 0]],
            {},
            "line 2, column a: must be a finite number of at most 3.4e+38, got '1_000'",
        ),
        (
            [["a", "y"], ["red", 0]],
            {},
            "got 'red'. Fill it in, or leave columns out by data.options",
        ),
        ([["a", "y"], [1, 0, 5]], {}, "line 2: must have 2 values, got 3"),
        ([["a", "z"], [1, 0]], {}, "`data.options.target` must name a column of"),
        ([["a", "y"], [1, 0]], {"drop": ["b"]}, "`data.options.drop` must name a column of"),
        ([["y"], [1]], {}, "must have columns besides y"),
        ([["a", "a", "y"], [1, 1, 0]], {}, "a line of different names of columns"),
        ([["a", "y"]], {}, "must leave samples for train, got none"),
        (
            [["a", "y"], [1, ""]],
            {},
            "line 2, column y: must be a class of the training set, got ''",
        ),
        ([["a", "y"], [1, "x"]], {"kind": "regress"}, "line 2, column y: must be a finite number"),
        ([["a", "y"], [1, "1e39"]], {"kind": "regress"}, "column y: must be a finite number of at"),
        ([["a", "y"], ["-1e200", 0]], {}, "line 2, column a: must be a finite number of at most"),
        ([["a", "y"], [1, 0]], {"test": 1e-9}, "must leave samples for test"),
        ([["a", "y"], [1, 0]], {"kind": "rank"}, "`data.options.kind`: input should be 'classify'"),
        ([["a", "y"], [1, 0]], {"delimiter": ";"}, "`data.options.target` must name a column"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, rows, options, named):
    path = write_csv(tmp_path / "some.csv", rows)
    with pytest.raises(ConfigError) as caught:
        csv(path, target="y", **options)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (
            [["a", "y"], [1, "new"]],
            "line 2, column y: must be a class of the training set, got 'new'",
        ),
        (
            [["b", "y"], [1, "old"]],
            "test.csv: must have the columns of the training set, got none na",
        ),
    ],
)
def test_a_test_table_that_does_not_fit_is_named(tmp_path, rows, named):
    write_csv(tmp_path / "train.csv", [["a", "y"], [1, "old"]])
    write_csv(tmp_path / "test.csv", rows)
    with pytest.raises(ConfigError) as caught:
        csv(tmp_path, target="y")
    assert named in str(caught.value)


def test_a_quote_that_is_left_open_makes_one_short_line(tmp_path):
    (tmp_path / "train.csv").write_text('"a,y\n' + "1,2\n" * 1000)
    with pytest.raises(ConfigError) as caught:
        csv(tmp_path / "train.csv", target="y")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_two_tables_for_one_set_are_refused(tmp_path):
    for name in ("train", "training"):
        write_csv(tmp_path / f"{name}.csv", [["a", "y"], [1, "old"]])
    with pytest.raises(ConfigError, match="must hold one table for train, got train and training"):
        csv(tmp_path, target="y")


def test_names_and_values_may_have_line_breaks(tmp_path):
    (tmp_path / "train.csv").write_text('"a\nb",y\n1,"new\nold"\n2,x\n')
    splits = csv(tmp_path / "train.csv", target="y")
    assert splits.classes == ["new\nold", "x"]
    (tmp_path / "named.csv").write_text('"y\nz",x\na,1\nb,2\n')
    for target in ("y z", "y  z", "y\nz"):
        assert csv(tmp_path / "named.csv", target=target).classes == ["a", "b"]
    assert inputs_of(splits.train).tolist() == [[-1], [1]]
    (tmp_path / "train.csv").write_text('"a\nb",y\n1,u\n\nz,"x\n"\n')
    with pytest.raises(ConfigError, match="line 5, column a b: must be a finite number"):
        csv(tmp_path / "train.csv", target="y")


def test_files_that_are_no_tables_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train.csv or with one, got 0 in"):
        csv(tmp_path, target="y")
    (tmp_path / "train.csv").write_bytes(b"a,y\n\xff\xfe\x00,1\n")
    with pytest.raises(ConfigError, match="must be text in UTF-8 of values"):
        csv(tmp_path, target="y")


def test_a_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image").new("RGB", (6, 4), (255, 0, 0))
    features = datasets.Features(
        image=datasets.Image(),
        rows=datasets.Sequence(datasets.Value("float32")),
        label=datasets.ClassLabel(names=["a", "b", "c"]),
    )
    rows = {"image": [image] * 4, "rows": [[1.0, 2.0]] * 4, "label": [0, 1, 2, 1]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole, val=whole.select([1])).save_to_disk(str(tmp_path / "sets"))
    splits = hf(tmp_path / "sets", input="image", target="label", size=4)
    assert (splits.num_classes, splits.in_channels, splits.test) == (3, 3, None)
    assert inputs_of(splits.train).shape == (4, 3, 4, 4)
    assert targets_of(splits.train) == [0, 1, 2, 1]
    assert targets_of(splits.validation) == [1]
    numbers = hf(tmp_path / "sets", input="rows", target="label")
    assert numbers.in_channels == 2
    assert numbers.train[0][0].tolist() == [1, 2]
    batches = list(DataLoader(numbers.train, num_workers=1))
    assert [label.item() for _, label in batches] == [0, 1, 2, 1]
    with pytest.raises(ConfigError, match=r"`data.options.target` must name a column of train"):
        hf(tmp_path / "sets", input="rows", target="labels")
    with pytest.raises(ConfigError, match="what save_to_disk"):
        hf(tmp_path, input="rows", target="label")


def test_an_image_of_hugging_face_is_no_address(tmp_path):
    """The package `datasets` would ask a web server for it, or open any file."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    encoded = datasets.Features(
        image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        label=datasets.Value("int64"),
    )
    image = {"bytes": None, "path": "http://127.0.0.1:9/x.png"}
    whole = datasets.Dataset.from_dict({"image": [image] * 2, "label": [0, 1]}, features=encoded)
    whole.save_to_disk(str(tmp_path / "set"))
    info = tmp_path / "set" / "dataset_info.json"
    facts = json.loads(info.read_text())
    facts["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(facts))
    splits = hf(tmp_path / "set", input="image", target="label", size=4)
    with pytest.raises(ConfigError, match="row 1: must hold an image itself, got its path"):
        splits.train[1]


def test_images_of_hugging_face_are_what_its_package_decodes(tmp_path):
    """Turned by their orientation, in the mode of the features; other columns are let alone."""
    datasets = pytest.importorskip("datasets")
    image_module = pytest.importorskip("PIL.Image")
    wide = image_module.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3)
    exif = wide.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    encoded = io.BytesIO()
    wide.save(encoded, "PNG", exif=exif)
    features = datasets.Features(
        image=datasets.Image(mode="L"), other=datasets.Image(), label=datasets.Value("int64")
    )
    image = {"bytes": encoded.getvalue(), "path": None}
    other = {"bytes": None, "path": "http://127.0.0.1:9/x.png"}
    rows = {"image": [image] * 2, "other": [other] * 2, "label": [0, 1]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    expected = np.asarray(whole.select_columns("image")[0]["image"])
    assert expected.shape == (6, 4)
    by_path = {**rows, "other": [{"bytes": b"no image", "path": None}] * 2}
    datasets.Dataset.from_dict(by_path, features=features).save_to_disk(str(tmp_path / "set"))
    plain = {"mean": [0.0], "std": [1.0], "channels": 1}
    splits = hf(tmp_path / "set", input="image", target="label", size=4, **plain)
    middle = torch.from_numpy(expected[1:5].copy()) / 255
    assert torch.allclose(splits.train[0][0][0], middle, atol=1e-6)


def test_an_image_whose_orientation_cannot_be_read_stays_as_it_is():
    image_module = pytest.importorskip("PIL.Image")
    encoded = io.BytesIO()
    image_module.new("RGB", (8, 6)).save(encoded, "PNG", exif=b"Exif\0\0garbage12")
    assert _decoded(encoded.getvalue(), "row 1", "L").size == (8, 6)


def test_targets_of_hugging_faces_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "x": [0.5, 1.5, 2.5],
        "yes": [True, False, True],
        "number": [2, 0, 1],
        "missing": [1, None, 0],
        "text": ["a", "b", "a"],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
    splits = hf(tmp_path / "set", input="x", target="yes")
    assert (splits.num_classes, splits.in_channels) == (2, 1)
    assert targets_of(splits.train) == [1, 0, 1]
    assert splits.train[0][1].dtype == torch.int64
    assert inputs_of(splits.train).tolist() == [[0.5], [1.5], [2.5]]
    assert hf(tmp_path / "set", input="x", target="number").num_classes == 3
    image = pytest.importorskip("PIL.Image").new("RGB", (6, 4))
    features = datasets.Features(x=datasets.Image(), yes=datasets.Value("bool"))
    images = {"x": [image] * 3, "yes": columns["yes"]}
    of_images = datasets.Dataset.from_dict(images, features=features)
    of_images.save_to_disk(str(tmp_path / "images"))
    train = hf(tmp_path / "images", input="x", target="yes", size=4).train
    labels = next(iter(DataLoader(train, batch_size=3)))[1]
    assert (labels.tolist(), labels.dtype) == ([1, 0, 1], torch.int64)
    with pytest.raises(ConfigError, match="got none in row 1 of train in 'missing'"):
        hf(tmp_path / "set", input="x", target="missing")
    with pytest.raises(ConfigError, match=r"of string. `class_encode_column\('text'\)` makes"):
        hf(tmp_path / "set", input="x", target="text")
    whole = datasets.Dataset.from_dict(columns)
    whole.with_format("numpy").save_to_disk(str(tmp_path / "formatted"))
    with pytest.raises(ConfigError, match="got none in row 1 of train in 'missing'"):
        hf(tmp_path / "formatted", input="x", target="missing")
    assert targets_of(hf(tmp_path / "formatted", input="x", target="yes").train) == [1, 0, 1]
    datasets.DatasetDict(train=whole, val=whole, valid=whole).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="must hold one set for validation, got val and valid"):
        hf(tmp_path / "two", input="x", target="number")
