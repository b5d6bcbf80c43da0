"""The command `syncnorm predict`: a run's model on files."""

import csv
import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.run.errors import RunError
from syncnorm.run.in_process import errors_in_one_line
from syncnorm.run.machine import choose_device
from syncnorm.run.samples import Sample, Unread, read_samples
from syncnorm.system import tell
from syncnorm.train.data.inputs import Inputs
from syncnorm.train.files import check_output, written_whole
from syncnorm.train.finished.load import LoadedModel, load
from syncnorm.train.finished.predict import Row, check_rows, masks_of, predict, read, rows_of

_BATCH = 64
# Standard deviations of pixels: a white photograph is 2 or 3 from the mean of all.
_FAR = 5.0


class Writer(Protocol):
    """Takes the outputs of a batch."""

    def add(self, samples: Sequence[Sample], outputs: Tensor) -> None:
        """Write them."""
        ...

    def close(self) -> None:
        """Finish what is written at the end."""
        ...


def run_predict(
    run: Path,
    files: Sequence[Path],
    output: Path | None,
    top: int,
    checkpoint: str,
    allowed: tuple[str, ...],
) -> None:
    """Predict the samples of files.

    Raises:
        ConfigError: bad input; see `load`.
        RunError: some files were not predicted, each of which has had its line; or code that
            the configuration names failed.
    """
    with errors_in_one_line():
        device = choose_device("auto", 0, 1)
        model = load(run, checkpoint=checkpoint, device=device, allow=allowed)
        inputs = model.signature.inputs
        if inputs is None:
            raise ConfigError(
                f"run {str(run)!r}: its samples are no pairs of one tensor and a target. Use "
                "syncnorm.load, and call it as you need it."
            )
        failed = number = 0
        is_warned = False
        _check_output(output, files)
        with _open(model, output, top) as writer:
            for batch in _batches(read_samples(files, inputs)):
                is_warned = is_warned or _warn_of_units(batch, inputs)
                failed += _predict(model, batch, writer)
                number += len(batch)
            if failed == number:  # an earlier output stays
                raise _lost(failed)
    if failed:
        raise _lost(failed)


def _lost(count: int) -> RunError:
    return RunError(f"{count} of the files or samples could not be predicted")


def _warn_of_units(batch: Sequence[Sample | Unread], inputs: Inputs) -> bool:
    """Warn of the first image whose numbers are far from those that the run was trained on."""
    for sample in batch:
        if not isinstance(sample, Sample) or not inputs.are_images or inputs.mean is None:
            continue
        distance = inputs.distance(sample.value)
        if distance > _FAR:
            tell(
                f"syncnorm: {sample.file}: the mean of its pixels is {distance:.0f} standard "
                "deviations from that of what the run was trained on: are its numbers on another "
                "scale?"
            )
            return True
    return False


def _check_output(output: Path | None, files: Sequence[Path]) -> None:
    """Raise ConfigError for an output that would replace what is predicted, or lie among it."""
    if output is None:
        return
    check_output(output)
    written = output.resolve()
    for path in (each.resolve() for each in files):
        holder = path if path.is_dir() else path.parent
        # A file within is read before it is there; a folder is filled meanwhile.
        is_filled = output.is_dir() or not output.suffix
        is_among = path.is_dir() and is_filled and written.is_relative_to(path)
        if written in (path, holder) or is_among:
            raise ConfigError(
                f"`--output` must be apart from what is predicted, got {str(output)!r} and "
                f"{str(path)!r}"
            )


def _batches(read: Iterator[Sample | Unread]) -> Iterator[list[Sample | Unread]]:
    """Group samples of one dtype, 64 at most."""
    for _, alike in groupby(read, lambda each: isinstance(each, Sample) and each.value.dtype):
        batch: list[Sample | Unread] = []
        for each in alike:
            batch.append(each)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _predict(model: LoadedModel, batch: Sequence[Sample | Unread], writer: Writer) -> int:
    """Predict and write a batch; return how many failed."""
    samples = [each for each in batch if isinstance(each, Sample)]
    unread = [each.message for each in batch if isinstance(each, Unread)]
    if samples:
        outputs = predict(model, torch.stack([sample.value for sample in samples]))
        if not isinstance(writer, _Arrays):
            lost = _without_numbers(model, outputs)
            unread += [_describe_lost(samples[number]) for number in lost]
            kept = [number for number in range(len(samples)) if number not in lost]
            samples, outputs = [samples[number] for number in kept], outputs[kept]
        if samples:
            writer.add(samples, outputs)
    for message in unread:
        print(f"syncnorm: {message}", file=sys.stderr)
    return len(unread)


def _without_numbers(model: LoadedModel, outputs: Tensor) -> list[int]:
    """Find the rows of which no prediction can be made; a logit of -inf rules its class out."""
    is_number = (outputs < math.inf) & read(model, outputs).isfinite()
    return (~is_number.reshape(len(outputs), -1).all(1)).nonzero().flatten().tolist()


def _describe_lost(sample: Sample) -> str:
    where = "" if sample.index is None else f", sample {sample.index}"
    return (
        f"{sample.file}{where}: must have outputs that are numbers, got nan or inf. Look at the "
        "sample; if all are so, take another --checkpoint. With --output FILE.npz they are "
        "written as they are."
    )


@contextmanager
def _open(model: LoadedModel, output: Path | None, top: int) -> Iterator[Writer]:
    """Choose a writer by the task and the name of the output.

    A file is there once all is written, and an earlier one until then.
    """
    suffix = "" if output is None else output.suffix
    try:
        with ExitStack() as stack:
            writer: Writer
            if output is not None and suffix == ".npz":
                writer = _Arrays(stack.enter_context(_written(output)))
            elif model.task == "segment":
                writer = _Masks(output)
            elif output is None:
                check_rows(model.task)
                writer = _Rows(model, sys.stdout, top)
            elif suffix in (".json", ".jsonl", ".csv"):
                check_rows(model.task)
                file = stack.enter_context(_as_text(stack.enter_context(_written(output))))
                writer = _Rows(model, file, top, is_csv=suffix == ".csv")
            else:
                raise ConfigError(
                    "`--output` must end in .jsonl, .json (an object in each line), .csv or .npz "
                    f"(the outputs as they are), got {str(output)!r}. A folder of masks is for "
                    "task.name segment."
                )
            yield writer
            writer.close()
    except OSError as error:
        # The masks' names go there, whatever the output.
        if output is None or isinstance(error, BrokenPipeError):
            raise RunError(f"standard output cannot be written: {error.strerror}") from None
        raise ConfigError(
            f"`--output` must be writable, got {str(output)!r}: {error.strerror or error}"
        ) from None


@contextmanager
def _written(output: Path) -> Iterator[BinaryIO]:
    if output.is_dir():  # shows before the work
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
    with written_whole(output) as file:
        yield file


@contextmanager
def _as_text(file: BinaryIO) -> Iterator[TextIO]:
    text = TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
    try:
        yield text
    finally:
        text.detach()  # it would close the file, which has yet to be brought to disk


def _place(sample: Sample) -> Row:
    return {"file": sample.file} | ({} if sample.index is None else {"index": sample.index})


def _as_line(row: Row, encoding: str | None) -> str:
    """Write JSON; a name that an encoding has not by numbers, as one that is no UTF-8."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


class _Rows:
    """Lines of JSON, or of comma-separated values."""

    def __init__(self, model: LoadedModel, file: TextIO, top: int, *, is_csv: bool = False) -> None:
        self._model, self._file, self._top, self._is_csv = model, file, top, is_csv
        self._table: csv.DictWriter[str] | None = None

    def add(self, samples: Sequence[Sample], outputs: Tensor) -> None:
        rows = rows_of(self._model, outputs, self._top)
        for sample, row in zip(samples, rows, strict=True):
            if self._is_csv:
                self._write_csv({"file": sample.file, "index": sample.index, **_flat(row)})
            else:
                self._file.write(_as_line(_place(sample) | row, self._file.encoding) + "\n")

    def _write_csv(self, row: Row) -> None:
        if self._table is None:
            self._table = csv.DictWriter(self._file, list(row))
            self._table.writeheader()
        self._table.writerow(row)

    def close(self) -> None:
        self._file.flush()


def _flat(row: Row) -> Row:
    """Give each value of a row a column of its own; labels, whose number varies, share one."""
    flat: Row = {key: value for key, value in row.items() if not isinstance(value, list)}
    for number, each in enumerate(row.get("top", ())[1:], start=2):
        flat |= {f"{key}_{number}": value for key, value in each.items()}
    for key in ("labels", "names", "probabilities"):
        if isinstance(row.get(key), list):
            flat[key] = ";".join("" if one is None else str(one) for one in row[key])
    flat |= {f"value_{number}": value for number, value in enumerate(row.get("values", ()), 1)}
    return flat


class _Arrays:
    """One .npz of all outputs as they are, with the file and the index of each."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._samples: list[Sample] = []
        self._outputs: list[Tensor] = []

    def add(self, samples: Sequence[Sample], outputs: Tensor) -> None:
        # Without the inputs, which are not needed any more.
        self._samples += [Sample(each.file, each.index, torch.empty(0)) for each in samples]
        self._outputs.append(outputs)

    def close(self) -> None:
        outputs = torch.cat(self._outputs) if self._outputs else torch.zeros(0)
        np.savez(
            self._file,
            outputs=outputs.numpy(),
            files=np.array([sample.file for sample in self._samples], dtype=str),
            indices=np.array([sample.index or 0 for sample in self._samples], dtype=int),
        )


class _Masks:
    """A file of classes for each image: .png of bytes where they suffice, else .npy."""

    def __init__(self, output: Path | None) -> None:
        if output is None or output.suffix:
            raise ConfigError(
                "`--output` must be a folder for the masks of task.name segment, or a .npz file "
                f"for its outputs as they are, got {'none' if output is None else str(output)!r}"
            )
        output.mkdir(parents=True, exist_ok=True)
        self._folder = output
        self._names: set[str] = set()

    def add(self, samples: Sequence[Sample], outputs: Tensor) -> None:
        for sample, mask in zip(samples, masks_of(outputs), strict=True):
            path = self._folder / self._name(sample)
            if mask.dtype == torch.uint8 and mask.ndim == 2:
                path = path.with_name(f"{path.name}.png")
                self._write_image(path, mask)
            else:
                path = path.with_name(f"{path.name}.npy")
                self._write_array(path, mask)
            print(_as_line(_place(sample) | {"mask": str(path)}, sys.stdout.encoding))

    def _name(self, sample: Sample) -> str:
        """Name a mask as its image; of two images of one name, the second gets a number."""
        name, number = sample.stem, 2
        while name in self._names:
            name, number = f"{sample.stem}-{number}", number + 1
        self._names.add(name)
        return name

    def _write_image(self, path: Path, mask: Tensor) -> None:
        from syncnorm.train.data.sources.images import pillow

        with written_whole(path, to_disk=False) as file:
            pillow().fromarray(mask.numpy()).save(file, format="PNG")

    def _write_array(self, path: Path, mask: Tensor) -> None:
        with written_whole(path, to_disk=False) as file:
            np.save(file, mask.numpy())

    def close(self) -> None:
        pass
