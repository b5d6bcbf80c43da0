"""The model of a run, ready to be used on raw inputs."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from syncnorm import rng, tracing
from syncnorm.device import model_device
from syncnorm.errors import ConfigError, InputError
from syncnorm.train.checkpoint.evaluated import NEWEST, load_evaluated, read_evaluated
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.config.callables import check_callables
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.data.batches import map_members, to_device
from syncnorm.train.data.inputs import Inputs, Signature, Standardise
from syncnorm.train.setup import autocast, make_network
from syncnorm.train.storage.fetch import local_copy

_log = logging.getLogger(__name__)


class LoadedModel(nn.Module):
    """A trained network that takes inputs as the data set gives them, bytes of images too.

    Args:
        network: as it was trained.
        config: of its run.
        signature: of its data.
    """

    config: Config
    network: nn.Module
    signature: Signature
    task: str
    classes: tuple[str, ...] | None
    standardise: Standardise | None

    def __init__(self, network: nn.Module, config: Config, signature: Signature) -> None:
        super().__init__()
        self.network, self.config, self.signature = network, config, signature
        self.task = config.task.name
        self.classes = signature.classes
        dtype = getattr(torch, config.train.dtype)
        inputs = signature.inputs
        self.standardise = None if inputs is None else Standardise(inputs, dtype)
        self._dtype: torch.dtype = dtype

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Compute the network's outputs for a batch, which is moved to its device.

        Raises:
            InputError: the batch is not what the model was trained on.
        """
        device = model_device(self.network)
        with autocast(self.config, device):
            args, kwargs = self._standardised(device, *inputs, **named)
            prepared = map_members((args, kwargs), lambda x: to_device(x, device, self._dtype))
            return self.network(*prepared[0], **prepared[1])

    def _standardised(
        self, device: torch.device, *inputs: Any, **named: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Standardise the tensor among the arguments, whatever else there is."""
        standardise = self.standardise
        found = sum(isinstance(each, Tensor) for each in (*inputs, *named.values()))
        if standardise is None or (found != 1 and standardise.inputs.mean is None):
            return inputs, named
        if found != 1:
            raise InputError(
                f"`input` must be {standardise.inputs.describe()}, in one tensor, got {found}. "
                "torch.as_tensor makes one of an array; `network` takes what is standardised."
            )

        def change(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            _warn_of_fractions(value, standardise.inputs)
            return standardise(value.to(device))

        return tuple(map(change, inputs)), {name: change(each) for name, each in named.items()}


def _warn_of_fractions(x: Tensor, inputs: Inputs) -> None:
    """Warn of fractions of 255 where a run had bytes; on a CPU, where looking is free."""
    if torch.compiler.is_compiling() or inputs.dtype != "uint8" or not x.is_floating_point():
        return
    # A transform, a tracer or a graph has no values to look at.
    if x.device.type != "cpu" or tracing.tracer_of(x) is not None:
        return
    x = x.detach()
    if x.numel() and 0 < float(x.amax()) <= 1 and bool((x != x.round()).any()):
        # The same words each time: Python shows them once.
        warnings.warn(
            f"`input` must be {inputs.describe()}, numbers of 0 to 255, got fractions of at most 1: "
            "give bytes, or multiply by 255",
            stacklevel=4,
        )


def load(
    run: str | Path,
    *,
    checkpoint: str = NEWEST,
    device: str | torch.device = "cpu",
    allow: Sequence[str] = (),
) -> LoadedModel:
    """Load the model of a run in evaluation mode: of the moving average if it has one.

    It takes raw inputs, a batch (N, ...) as the data set gives them, and returns what the network
    returns. The training set is not needed, nor a process group.

    Args:
        run: the run's folder; or its address in a store, which is copied to `runs` first.
        checkpoint: newest, best, recalibrated, or the name of a folder in the run's `checkpoints`.
        device: where to put it.
        allow: packages whose callables the run's configuration may name.

    Raises:
        ConfigError: it is not a run's folder, has no such checkpoint or a damaged one, names code
            that is not allowed, or its weights do not fit; or there is no CUDA device.

    Example:
        >>> model = load("runs/digits-20261127-201500")  # doctest: +SKIP
        >>> model(images).softmax(1), model.classes, model.task  # doctest: +SKIP
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` must be cpu where there is no CUDA device, got {str(device)!r}"
        )
    folder, allowed = local_copy(run), tuple(allow)
    config = read_run(folder, allowed, ("model.name",))
    snapshot = read_evaluated(folder, checkpoint)
    signature = signature_of(snapshot, folder)
    network = make_evaluated(config, signature, snapshot, folder, torch.device(device), allowed)
    return LoadedModel(network, config, signature).to(device).eval()


def read_run(
    folder: Path,
    allowed: tuple[str, ...],
    keys: Sequence[str] = ("model.name", "data.name", "task.name"),
    overrides: Sequence[str] = (),
) -> Config:
    """Read the configuration of a run.

    Args:
        folder: of the run.
        allowed: packages whose callables it may name. Those that the run itself was allowed do not
            count: the folder may be somebody else's.
        keys: whose callables are going to be called.
        overrides: see `load_config`.

    Raises:
        ConfigError: it is not a run's folder, or its configuration names code that is not allowed.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run {str(folder)!r} has no config.yaml. Name the folder of a run.")
    config = load_config(str(folder / "config.yaml"), overrides)
    check_callables(config, allowed, keys)
    return config


def signature_of(snapshot: Snapshot, folder: Path) -> Signature:
    """Read the inputs and outputs of the model.

    Raises:
        ConfigError: they are damaged.
    """
    try:
        return Signature.model_validate(snapshot.facts.get("signature"))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"run {str(folder)!r}: the checkpoint's signature cannot be used: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def make_evaluated(
    config: Config,
    signature: Signature,
    snapshot: Snapshot,
    folder: Path,
    device: torch.device,
    allowed: tuple[str, ...],
) -> nn.Module:
    """Build the evaluated network of a run, in evaluation mode. No exchange.

    Raises:
        ConfigError: the weights do not fit.
    """
    with rng.kept():
        network = make_network(config, signature, 1, allowed)
    network.to(device, getattr(torch, config.train.dtype))
    load_evaluated(network, snapshot, folder)
    return network.eval()
