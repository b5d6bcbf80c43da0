"""Folders that are damaged, forged or none at all: one clear error each, and nothing runs."""

import hashlib
import io
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch

from syncnorm.errors import CheckpointError
from syncnorm.train.checkpoint.snapshot import MAX_JSON_BYTES
from syncnorm.train.checkpoint.store import CheckpointStore
from tests.train.snapshots import assert_equal, make_snapshot, names

SEED = 20


def check_refused(store: CheckpointStore, path: Path, message: str) -> None:
    """`path` is refused with `message`, and the newest good one is another."""
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        store.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    snapshot, _, faults = store.newest()
    assert_equal(snapshot, make_snapshot(11))
    assert faults == [str(caught.value)]


@pytest.fixture
def damaged(store: CheckpointStore) -> Path:
    """A good checkpoint, yet to be damaged, after an older one."""
    store.write(make_snapshot(11))
    return store.write(make_snapshot(12))


NAMES = [
    "ema.safetensors",
    "model.safetensors",
    "optimizer.pt",
    "rng.pt",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_bit_a_byte_too_few_or_too_many_in_any_file(store, damaged, name):
    file = damaged / name
    good = file.read_bytes()
    draw = random.Random(SEED)
    for _ in range(20):
        at, bit = draw.randrange(len(good)), draw.randrange(8)
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        check_refused(store, damaged, name)
    for length in (0, draw.randrange(len(good)), len(good) - 1):
        file.write_bytes(good[:length])
        # the last byte of a manifest is a bracket
        check_refused(store, damaged, name)
    file.write_bytes(good + b"x")
    check_refused(store, damaged, name)
    file.unlink()
    check_refused(store, damaged, f"{name}` must be")
    file.write_bytes(good)
    assert store.newest()[1:] == (damaged, [])


def test_the_message_says_what_is_wrong(store, damaged):
    file = damaged / "rng.pt"
    good = file.read_bytes()
    wrong = good[:-1] + bytes([good[-1] ^ 1])
    file.write_bytes(wrong)
    digests = [hashlib.sha256(data).hexdigest() for data in (good, wrong)]
    check_refused(
        store,
        damaged,
        f"`{file}` must have the SHA-256 {digests[0]}, as manifest.json says, got {digests[1]}",
    )
    file.write_bytes(good[:-1])
    check_refused(
        store,
        damaged,
        f"`{file}` must have {len(good)} bytes, as manifest.json says, got {len(good) - 1}",
    )
    file.write_bytes(good)
    (damaged / "more").write_text("")
    check_refused(
        store,
        damaged,
        f"`{damaged}` must hold what manifest.json lists and nothing else, got 'more'",
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file(store, damaged, name, kind, tmp_path):
    file = damaged / name
    moved = file.rename(tmp_path / "moved")
    {"link": lambda: file.symlink_to(moved), "folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}[
        kind
    ]()
    check_refused(
        store, damaged, f"`{file}` must be a file that can be read, got: Not a regular file"
    )


@pytest.mark.parametrize("kind", ["file", "link to nothing", "empty"])
def test_what_is_no_checkpoint(store, kind):
    store.write(make_snapshot(11))
    path = store.folder / "step-00000012"
    if kind == "file":
        path.write_text("")
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    else:
        path.mkdir()
    check_refused(
        store,
        path,
        "manifest.json` must be a file" if kind == "empty" else "must be a checkpoint's folder",
    )
    # one that is no checkpoint is replaced all the same
    store.write(make_snapshot(12))
    assert store.newest()[1:] == (path, [])
    assert names(store.folder) == ["step-00000011", "step-00000012"]


def test_a_manifest_of_any_size(store, damaged):
    with (damaged / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # takes no space
    check_refused(
        store, damaged, f"manifest.json` must have at most {MAX_JSON_BYTES} bytes, got {1 << 40}"
    )


def test_a_file_of_any_size(store, damaged):
    with (damaged / "rng.pt").open("r+b") as file:
        file.truncate(1 << 43)
    edit_manifest(damaged, lambda manifest: manifest["files"]["rng.pt"].update(size=1 << 43))
    check_refused(store, damaged, f"rng.pt` must fit into memory, got {1 << 43} bytes")


def edit_manifest(path, edit):
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


ENTRY = {"size": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update(format="other"),
            "'format': Input should be 'syncnorm-checkpoint', got 'other'",
        ),
        (
            lambda m: m.update(version=2),
            "'version': Input should be less than or equal to 1, got 2",
        ),
        (lambda m: m.update(version=True), "'version': Input should be a valid integer, got True"),
        (lambda m: m.pop("version"), "'version': Field required"),
        (lambda m: m.update(step="12"), "'step': Input should be a valid integer, got '12'"),
        (lambda m: m.update(step=-1), "'step': Input should be greater than or equal to 0, got -1"),
        (lambda m: m.update(step=13), "must be of step 12, got step 13"),
        (lambda m: m.update(more=1), "'more': Extra inputs are not permitted, got 1"),
        (lambda m: m.update(files=[]), "'files': Input should be an object, got []"),
        (
            lambda m: m["files"].update({"../rng.pt": ENTRY}),
            "'../rng.pt': '[key]': String should match",
        ),
        (
            lambda m: m["files"].update({"/etc/passwd": ENTRY}),
            "'/etc/passwd': '[key]': String should match",
        ),
        (lambda m: m["files"].update({"a.pt\n": ENTRY}), r"'a.pt\n': '[key]': String should match"),
        (
            lambda m: m["files"].update({"manifest.json": ENTRY}),
            "'manifest.json': '[key]': String should match",
        ),
        (
            lambda m: m["files"].update({"x" * 10**5 + ".pt": ENTRY}),
            "xxx.pt': '[key]': String should match",
        ),
        (
            lambda m: m["files"].update({"extra.pt": ENTRY}),
            "extra.pt` must be there for the checkpoint to be whole",
        ),
        (
            lambda m: m["files"]["rng.pt"].update(size=-1),
            "'size': Input should be greater than or equal to 0, got -1",
        ),
        (
            lambda m: m["files"]["rng.pt"].update(size=1.0),
            "'size': Input should be a valid integer, got 1.0",
        ),
        (lambda m: m["files"]["rng.pt"].update(sha256="0"), "'sha256': String should match"),
        (lambda m: m["files"].pop("rng.pt"), "lists and nothing else, got 'rng.pt'"),
        (lambda m: m["files"].pop("state.json"), "lists and nothing else, got 'state.json'"),
    ],
)
def test_a_manifest_that_says_something_else(store, damaged, edit, message):
    edit_manifest(damaged, edit)
    check_refused(store, damaged, message)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"[" * 10**5, b"null", b'{"step": ' + b"9" * 10**5 + b"}", b"{} {}", b"NaN"],
)
def test_a_manifest_that_is_none(store, damaged, data):
    (damaged / "manifest.json").write_bytes(data)
    check_refused(store, damaged, "manifest.json` must be as this version of syncnorm writes it: ")


def forge(path: Path, name: str, data: bytes) -> None:
    """Put in another file, and the manifest right."""
    (path / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("model.safetensors", b"", "SafetensorError"),
        ("model.safetensors", b"\xff" * 100, "SafetensorError"),
        ("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}", "SafetensorError"),
        ("model.safetensors", (8).to_bytes(8, "little") + b'{"a":1} ', "SafetensorError"),
        ("state.json", b"[]", "TypeError"),
        ("state.json", b"\xff", "UnicodeDecodeError"),
        ("state.json", b'{"a":' * 10**5, "RecursionError"),
        ("state.json", b"{", "JSONDecodeError"),
        ("optimizer.pt", b"", "EOFError"),
        ("optimizer.pt", b"PK\x03\x04" + bytes(100), "RuntimeError"),
        ("optimizer.pt", b"text", "IndexError"),
    ],
)
def test_a_file_that_is_no_such_file_though_the_digest_is_right(store, damaged, name, data, error):
    forge(damaged, name, data)
    check_refused(store, damaged, f"{name}` must hold ")
    check_refused(store, damaged, f"and nothing else, got {error}")


def test_a_safetensors_header_that_is_damaged_anywhere(store, damaged):
    good = (damaged / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for at in range(header):
        forge(damaged, "model.safetensors", good[:at] + bytes([good[at] ^ 0x80]) + good[at + 1 :])
        with pytest.raises(
            CheckpointError,
            match=r"model.safetensors` must hold tensors and nothing else, got Safe",
        ):
            store.read(damaged)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code_runs_none(store, damaged, tmp_path, is_zip):
    proof = tmp_path / "proof"
    buffer = io.BytesIO()
    torch.save({"state": [Payload(proof)]}, buffer, _use_new_zipfile_serialization=is_zip)
    assert b"mkdir" in buffer.getvalue()
    forge(damaged, "optimizer.pt", buffer.getvalue())
    check_refused(
        store,
        damaged,
        "optimizer.pt` must hold plain values and tensors and nothing else, got Unpickling",
    )
    assert not proof.exists()
    # it would have
    function, arguments = Payload(proof).__reduce__()
    function(*arguments)
    assert proof.exists()


def test_a_forged_file_that_is_right_is_read(store, damaged):
    """The control: `forge` alone does not make a checkpoint bad."""
    buffer = io.BytesIO()
    torch.save([1], buffer)
    forge(damaged, "optimizer.pt", buffer.getvalue())
    assert store.read(damaged).states["optimizer"] == [1]
