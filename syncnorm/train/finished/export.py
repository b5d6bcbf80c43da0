"""The model of a run, written for programs that do not know syncnorm.

| suffix | content | read by |
|---|---|---|
| .safetensors | weights, under the names of torch's batch norms | safetensors |
| .pt2 | the network from raw inputs to outputs | torch.export.load |
| .onnx | as above | any runtime of ONNX |

Each carries what a user of the model has to know, as JSON: the text `syncnorm` in the metadata of
the first and the last, the extra file `syncnorm.json` of the other.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from syncnorm import revert
from syncnorm.errors import ConfigError
from syncnorm.family.layer import FamilyLayer
from syncnorm.model.convert.adapters import own_class, set_class
from syncnorm.model.convert.family import put
from syncnorm.module import SyncNorm
from syncnorm.train import files
from syncnorm.train.data.inputs import Standardise
from syncnorm.train.finished.load import LoadedModel
from syncnorm.train.task.supervised import call

# torch.export takes a size of 0 or 1 for a constant.
_EXAMPLES = 2


class RawModel(nn.Module):
    """A network from raw inputs to its output tensor.

    Args:
        network: as it was trained.
        standardise: what it needs.
    """

    network: nn.Module
    standardise: Standardise

    def __init__(self, network: nn.Module, standardise: Standardise) -> None:
        super().__init__()
        self.network, self.standardise = network, standardise

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs of a batch (N, *S)."""
        return call(self.network, self.standardise(x))


def export_model(model: LoadedModel, path: Path) -> None:
    """Write a model as the suffix says, whole or not at all.

    Weights of an .onnx that are more than such a file can hold lie beside it, under its name and
    `.data`. The file itself comes last: an earlier one is gone before they are replaced.

    Raises:
        ConfigError: the suffix is another, a package is missing, the file cannot be written, or the
            network cannot be exported.
    """
    writers: dict[str, Callable[[LoadedModel, Path], None]] = {
        ".safetensors": _write_safetensors,
        ".pt2": _write_program,
        ".onnx": _write_onnx,
    }
    if path.suffix not in writers:
        raise ConfigError(f"`--output` must end in {', '.join(writers)}, got {str(path)!r}")
    files.check_output(path)
    folder = path.with_name(f".tmp-{path.name}")
    partial = folder / path.name
    try:
        files.remove(folder)  # of an export that was killed
        folder.mkdir()
        partial.open("wb").close()  # the writers have errors of their own kinds
        writers[path.suffix](model, partial)
        for beside in folder.iterdir():
            if beside != partial:
                path.unlink(missing_ok=True)
                beside.replace(path.with_name(beside.name))
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"`--output` must be a file that can be written, got {str(path)!r}: "
            f"{error.strerror or error}"
        ) from None
    finally:
        files.remove(folder)


def describe(model: LoadedModel) -> str:
    """Describe a model's inputs, outputs and classes, as JSON."""
    facts = model.signature.model_dump()
    return json.dumps({**facts, "task": model.task, "input": "raw"})


def plain_network(model: LoadedModel) -> nn.Module:
    """Copy the network, with torch's batch norms in place of ours, and plain weights.

    Layers of the family that no batch norm evaluates as stay what they are.
    """
    network = copy.deepcopy(model.network)
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            # A copy shares the class made for the original, from which torch would remove a name.
            set_class(module, own_class(module))
            for name in [*module.parametrizations]:  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
                parametrize.remove_parametrizations(module, name)
    for layer in list(network.modules()):
        has_plain = isinstance(layer, FamilyLayer) and layer.as_batch_norm() is not None
        if isinstance(layer, SyncNorm) or has_plain:
            # Which of torch's classes does not matter: state dicts have the same keys.
            network = put(network, {layer: revert(layer, to=nn.BatchNorm2d)})
    return network


def _write_safetensors(model: LoadedModel, path: Path) -> None:
    state = plain_network(model).state_dict()
    # Tensors that share memory are copied: the format has none.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    metadata = {"format": "pt", "syncnorm": describe(model)}
    # Written here: what stops `save_file`, a full disk say, comes as no OSError.
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def _write_program(model: LoadedModel, path: Path) -> None:
    # Likewise: torch ends the process.
    written = io.BytesIO()
    torch.export.save(make_program(model), written, extra_files={"syncnorm.json": describe(model)})
    path.write_bytes(written.getbuffer())


def _write_onnx(model: LoadedModel, path: Path) -> None:
    program = make_program(model)
    try:
        with _quiet():
            exported: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["input"], output_names=["output"]
            )
    except ImportError as error:
        raise ConfigError(
            f"`--output` with .onnx needs the package {error.name}. Install it with: "
            "pip install 'syncnorm[export]'"
        ) from None
    except Exception as error:  # an operator that ONNX lacks, say
        raise ConfigError(f"the network cannot be written as ONNX: {_first_line(error)}") from None
    exported.model.metadata_props["syncnorm"] = describe(model)
    exported.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling which packages of no use here are not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def make_program(model: LoadedModel) -> torch.export.ExportedProgram:
    """Trace the network from raw inputs to its output, for any number of samples.

    Raises:
        ConfigError: it takes no single tensor, or cannot be traced.
    """
    inputs = model.signature.inputs
    if inputs is None or model.standardise is None:
        raise ConfigError(
            "a network can be exported where a sample of its data set is a pair of one tensor and "
            "its target. Others can be written as .safetensors, or used by syncnorm.load."
        )
    # Ours evaluate as one plain operator. They take inputs of any dimension, as torch's classes do
    # not.
    network = copy.deepcopy(RawModel(model.network, model.standardise)).cpu().eval()
    example = torch.zeros(_EXAMPLES, *inputs.shape, dtype=getattr(torch, inputs.dtype))
    try:
        with torch.no_grad():
            return torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    except ConfigError:
        raise
    except Exception as error:  # of the network's code, or of what torch cannot trace
        raise ConfigError(f"the network cannot be exported: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
