"""The layers of a network in the order of its forward, by a trace of torch.fx."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.family.standardised import CONVOLUTIONS
from syncnorm.model.modes import evaluating

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


class Call(NamedTuple):
    """A convolution, linear layer or batch norm, as the forward calls it."""

    name: str
    module: nn.Module
    is_normalised: bool
    """True if nothing but batch norms takes its output."""
    is_output: bool
    """True if its output comes to be the network's with nothing that has parameters between."""


class _Tracer(fx.Tracer):
    """Leaves normalisation layers whole, those of other libraries too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_BatchNorm, Pooling)) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace(model: nn.Module) -> fx.Graph:
    """Trace a network; nothing is computed.

    Raises:
        InputError: it cannot be traced.
    """
    try:
        return _Tracer().trace(model)
    except Exception as error:
        raise InputError(
            f"`model` must be traceable by torch.fx, got {type(model).__name__}: {error}"
        ) from error


def calls(model: nn.Module) -> list[Call]:
    """Find the convolutions, linear layers and batch norms, in the order of evaluation's forward.

    Raises:
        InputError: the network cannot be traced, calls one of them twice, has two of one weight, or
            one whose weight is computed from something else.
    """
    with evaluating(model):
        graph = trace(model)
    modules = {
        node: model.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    last = _last(graph, modules)
    found: dict[object, Call] = {}
    for node, module in modules.items():
        if not isinstance(module, (*LAYERS, _BatchNorm)):
            continue
        name = str(node.target)
        weight = dict(module.named_parameters()).get("weight")
        if isinstance(module, LAYERS) and weight is None:
            raise InputError(
                f"`model` must hold its weights as parameters, got a computed one in {name!r}. "
                "Remove the parametrisation."
            )
        key = module if weight is None else weight
        if key in found:
            raise InputError(
                f"`model` must use each weight once, got {found[key].name!r} again at {name!r}"
            )
        is_normalised = all(isinstance(modules.get(user), _BatchNorm) for user in node.users)
        found[key] = Call(name, module, is_normalised, node in last)
    return list(found.values())


def _last(graph: fx.Graph, modules: dict[fx.Node, nn.Module]) -> set[fx.Node]:
    """The nodes from which a path without parameters leads to an output."""
    last: set[fx.Node] = set()
    ahead = [node for node in graph.nodes if node.op == "output"]
    while ahead:
        node = ahead.pop()
        if node in last:
            continue
        last.add(node)
        if node not in modules or not any(True for _ in modules[node].parameters()):
            ahead += node.all_input_nodes
    return last
