"""A training run at one moment, and the folder that holds it.

    model.safetensors    tensors by name; one such file for each dictionary of tensors
    optimizer.pt         plain values and tensors, for `torch.load(weights_only=True)`; one such
                         file for each state
    state.json           facts
    manifest.json        size and SHA-256 of every other file; written last

A digest reveals damage to a file, by accident or by others who left the manifest alone. It does not
say who wrote the folder, so nothing in it is trusted: names, sizes and types are checked, and only
plain values unpickled.
"""

import hashlib
import io
import json
import os
import re
import reprlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor

from syncnorm.errors import CheckpointError, InputError
from syncnorm.train import files
from syncnorm.train.metrics import json_value

MANIFEST = "manifest.json"
STATE = "state.json"
# Far above the size of a manifest, and far below one that does harm.
MAX_JSON_BYTES = 1 << 20

_NAME = "[a-z][a-z0-9_]{0,63}"
_CONTAINERS = (dict, OrderedDict, Counter)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Snapshot:
    """A training run at one moment.

    Args:
        step: optimizer steps done.
        tensors: dictionaries of tensors, each a file NAME.safetensors.
        states: plain values and tensors, in dictionaries, lists and tuples, each a file NAME.pt.
        facts: values for JSON, for people and programs to read in state.json. They come back as
            JSON has them: a tuple as a list, a number that is a key as a string, one that is not
            finite as the word that float() reads.
        copied: the CUDA event after which the tensors are whole, of a copy; who writes it waits.

    Raises:
        InputError: a name does not suit a file, or the step is no count.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    states: dict[str, Any]
    facts: dict[str, Any]
    copied: torch.Event | None = None

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step < 10**18:
            raise InputError(f"`step` must be a count of steps below 10^18, got {self.step!r}")
        for name in (*self.tensors, *self.states):
            if not re.fullmatch(_NAME, name):
                raise InputError(
                    f"`tensors` and `states` must have lower case words as names, got {name!r}"
                )

    def on_cpu(self) -> "Snapshot":
        """Copy every tensor and container, so that further training does not change the snapshot.

        On CUDA the present device copies into pinned memory before it goes on; nobody waits for it.

        Raises:
            InputError: something could not be read back: an object, an array, a function.
        """
        tensors = {n: _copy_tensors(n, t, wait=False) for n, t in self.tensors.items()}
        states = {n: _copy(v, f"states[{n!r}]", wait=False) for n, v in self.states.items()}
        facts = json.loads(_json_text(self.facts))
        event = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        return Snapshot(self.step, tensors, states, facts, event)


class _JsonModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Entry(_JsonModel):
    size: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Manifest(_JsonModel):
    format: Literal["syncnorm-checkpoint"]
    version: int = Field(ge=1, le=1)
    step: int = Field(ge=0, lt=10**18)
    files: dict[
        Annotated[str, StringConstraints(pattern=rf"^({_NAME}\.(safetensors|pt)|state\.json)$")],
        _Entry,
    ]


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Make `folder` and write the snapshot into it, on disk on return.

    The folder's own entry in its parent is left to the caller.

    Raises:
        OSError: it could not be written; a part of it may be there.
        InputError: something could not be read back.
    """
    folder.mkdir()
    entries: dict[str, _Entry] = {}
    for name, data in _encoded(snapshot):
        files.write_bytes_synced(folder / name, data)
        entries[name] = _Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = _Manifest(format="syncnorm-checkpoint", version=1, step=snapshot.step, files=entries)
    files.write_bytes_synced(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    files.sync_folder(folder)


def read_snapshot(folder: Path) -> Snapshot:
    """Read a snapshot's folder, each file once: the verified bytes are the parsed bytes.

    Raises:
        CheckpointError: it is damaged, incomplete, has further files, or is something else.
    """
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` must be a checkpoint's folder, got no folder")
    manifest = read_json(folder / MANIFEST, _Manifest)
    _check_listing(folder, manifest)
    tensors: dict[str, dict[str, Tensor]] = {}
    states: dict[str, Any] = {}
    for path, entry in ((folder / name, entry) for name, entry in manifest.files.items()):
        if path.suffix == ".safetensors":
            tensors[path.stem] = _parse(
                path, _verified(path, entry), "tensors", safetensors.torch.load
            )
        elif path.suffix == ".pt":
            states[path.stem] = _parse(
                path, _verified(path, entry), "plain values and tensors", _load_plain
            )
    state = folder / STATE
    facts = _parse(state, _verified(state, manifest.files[STATE]), "a JSON object", _load_object)
    return Snapshot(manifest.step, tensors, states, facts)


def read_json(path: Path, kind: type[ModelT]) -> ModelT:
    """Read a small JSON file.

    Raises:
        CheckpointError: it does not fit the model `kind`.
    """
    data = _read(path, range(MAX_JSON_BYTES + 1), f"at most {MAX_JSON_BYTES} bytes")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{reprlib.repr(part)}: " for part in first["loc"])
        raise CheckpointError(
            f"`{path}` must be as this version of syncnorm writes it: {key}{first['msg']}, got "
            f"{reprlib.repr(first['input'])}"
        ) from None


def _copy_tensors(name: str, tensors: dict[str, Tensor], *, wait: bool = True) -> dict[str, Tensor]:
    for key, tensor in tensors.items():
        if type(key) is not str or not isinstance(tensor, Tensor):
            raise InputError(
                f"`tensors[{name!r}]` must be tensors by name, got {key!r}: "
                f"{type(tensor).__qualname__}"
            )
    return {key: _copy_tensor(tensor, wait=wait) for key, tensor in tensors.items()}


def _copy_tensor(tensor: Tensor, *, wait: bool) -> Tensor:
    # Others than the present device are waited for: there is one event.
    is_present = tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()
    return tensor.detach().to(
        "cpu",
        copy=True,
        non_blocking=is_present and not wait,
        memory_format=torch.contiguous_format,
    )


def _copy(value: Any, name: str, *, wait: bool = True) -> Any:
    if isinstance(value, Tensor):
        return _copy_tensor(value, wait=wait)
    kind = type(value)
    if kind in _CONTAINERS:
        return kind(
            {
                _copy(key, f"{name}, key", wait=wait): _copy(child, f"{name}[{key!r}]", wait=wait)
                for key, child in value.items()
            }
        )
    if kind in (list, tuple):
        return kind(
            _copy(child, f"{name}[{index}]", wait=wait) for index, child in enumerate(value)
        )
    if kind in _PLAIN:
        return value
    raise InputError(
        f"`{name}` must be a tensor, a plain value or a container of them, got {kind.__qualname__}"
    )


def _json_text(facts: dict[str, Any]) -> str:
    try:
        return json.dumps(json_value(facts), indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"`facts` must be what JSON can hold: {error}") from None


def _encoded(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    # One at a time, as each is a copy; and of copies, because safetensors refuses tensors that
    # share a storage, and torch.save writes the whole of it for each view.
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    for name, tensors in snapshot.tensors.items():
        yield f"{name}.safetensors", _encode_tensors(name, _copy_tensors(name, tensors))
    for name, value in snapshot.states.items():
        buffer = io.BytesIO()
        torch.save(_copy(value, f"states[{name!r}]"), buffer)
        yield f"{name}.pt", buffer.getvalue()
    yield STATE, _json_text(snapshot.facts).encode()


def _encode_tensors(name: str, tensors: dict[str, Tensor]) -> bytes:
    try:
        return safetensors.torch.save(tensors)
    except KeyError as error:  # of its table of types
        raise InputError(
            f"`tensors[{name!r}]` must be of types that safetensors has, got {error.args[0]}"
        ) from None


def _check_listing(folder: Path, manifest: _Manifest) -> None:
    try:
        found = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(
            f"`{folder}` must be a folder that can be listed, got: {error.strerror}"
        ) from None
    for name in sorted({STATE, *manifest.files} - found):
        raise CheckpointError(
            f"`{folder / name}` must be there for the checkpoint to be whole, got no such file"
        )
    for name in sorted(found - {MANIFEST, *manifest.files}):
        raise CheckpointError(
            f"`{folder}` must hold what {MANIFEST} lists and nothing else, got {reprlib.repr(name)}"
        )


def _verified(path: Path, entry: _Entry) -> bytes:
    data = _read(path, range(entry.size, entry.size + 1), f"{entry.size} bytes, as {MANIFEST} says")
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise CheckpointError(
            f"`{path}` must have the SHA-256 {entry.sha256}, as {MANIFEST} says, got {digest}"
        )
    return data


def _read(path: Path, sizes: range, rule: str) -> bytes:
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size in sizes:
                return file.read(size)
    except OSError as error:
        raise CheckpointError(
            f"`{path}` must be a file that can be read, got: {error.strerror}"
        ) from None
    except MemoryError:
        raise CheckpointError(f"`{path}` must fit into memory, got {sizes[0]} bytes") from None
    raise CheckpointError(f"`{path}` must have {rule}, got {size}")


def _parse(path: Path, data: bytes, what: str, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(data)
    except Exception as error:  # parsers of any bytes: there is no list of what they raise
        raise CheckpointError(
            f"`{path}` must hold {what} and nothing else, got {type(error).__name__}"
        ) from None


def _load_plain(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _load_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise TypeError
    return value
