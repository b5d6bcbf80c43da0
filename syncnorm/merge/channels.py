"""The paths of a network's channels: which axes of which tensors belong to one set of channels."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from syncnorm.errors import InputError
from syncnorm.merge import operations
from syncnorm.merge.calls import LAYERS, TRANSPOSED, trace
from syncnorm.model.modes import in_mode


class Place(NamedTuple):
    """An axis of a tensor that runs over a set of channels."""

    tensor: str
    """The name of the parameter or buffer, as in the state dict."""
    axis: int
    block: int
    """The number of neighbours along the axis that belong to one channel: of maps, if flattened."""


class Channels:
    """A set of channels, and where it appears.

    Attributes:
        size: the number of channels; 0 where it is not known: of an input.
        is_fixed: True for inputs and outputs, whose order means something.
        places: in the order of the forward.
    """

    size: int
    is_fixed: bool

    def __init__(self, size: int, is_fixed: bool) -> None:
        self.size, self.is_fixed = size, is_fixed
        self.places: list[Place] = []


class _Value(NamedTuple):
    """What is known of a tensor: its set of channels, and its form."""

    channels: int
    form: str
    """"input", "plain" (N, C), "spatial" (N, C, *S) or "flat" (N, C * S)."""
    dims: int = 0
    """The number of dimensions S."""


def channels(model: nn.Module) -> list[Channels]:
    """Find the sets of channels whose order is free. Nothing is computed.

    Channels that are added to each other are one set; so are those on both sides of a normalisation
    layer or an activation. Where the model's present mode leaves out layers, such as an auxiliary
    classifier in evaluation, the other mode is read, too.

    Raises:
        InputError: the network cannot be traced, or does something that is not understood.
    """
    reader = _Reader(model)
    reader.read_all(trace(model))
    if reader.has_unread_layers():
        # The other mode may compute something of its own from the same channels.
        with in_mode(model, is_training=not model.training):
            graph = trace(model)
        reader.read_all(graph)
    return reader.sets()


def _is_first_size(given: Any) -> bool:
    """True for x.size(0), x.shape[0] and x.size()[0]."""
    if not isinstance(given, fx.Node):
        return False
    of, *which = (*given.args, *given.kwargs.values())
    if given.target == "size" and which:
        return which == [0]
    is_size = isinstance(of, fx.Node) and (
        (of.target == "size" and len(of.args) == 1)
        or (of.target is getattr and of.args[1:] == ("shape",))
    )
    return given.target is operator.getitem and which == [0] and is_size


class _Reader:
    """Follows the tensors of a traced network from operation to operation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.names = {id(tensor): name for name, tensor in self.tensors.items()}
        self.all: list[Channels] = []
        self.parent: list[int] = []
        self.at: dict[tuple[str, int], int] = {}
        self.values: dict[fx.Node, _Value | None] = {}
        self.called: set[nn.Module] = set()

    def read_all(self, graph: fx.Graph) -> None:
        """Find out the values of a trace; what another one has told of the same tensors stays true."""
        for node in graph.nodes:
            self.read(node)

    def has_unread_layers(self) -> bool:
        """True if some module with parameters of its own was not called."""
        rest = (m for m in self.model.modules() if m not in self.called)
        return any(True for m in rest for _ in m.parameters(recurse=False))

    def read(self, node: fx.Node) -> None:
        """Find out the value of a node from those before it."""
        tensors = [self.values[each] for each in node.all_input_nodes]
        known = [each for each in tensors if each is not None]
        if node.op == "placeholder":
            self.values[node] = _Value(self.new(is_fixed=True), "input")
        elif node.op == "output":
            for value in known:
                self.all[self.find(value.channels)].is_fixed = True
            self.values[node] = None
        elif node.op == "get_attr":
            raise self.refusal(node, "a parameter that no layer of torch.nn holds")
        elif not known or node.target in ("size", "dim") or node.target is getattr:
            self.values[node] = None  # numbers, such as a size
        elif node.op == "call_module":
            self.values[node] = self.through_module(node, known)
        else:
            self.values[node] = self.through_function(node, known)

    def through_module(self, node: fx.Node, known: list[_Value]) -> _Value:
        module = self.model.get_submodule(str(node.target))
        self.called.update(module.modules())
        if len(known) != 1:
            raise self.refusal(node, "a layer of several inputs")
        (x,) = known
        if isinstance(module, LAYERS):
            return self.through_layer(node, module, x)
        if isinstance(module, operations.NORMS):
            return self.through_norm(node, module, x)
        if isinstance(module, nn.PReLU):
            return self.per_channel(node, module, x) if module.num_parameters > 1 else x
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self.flattened(x)
        if isinstance(module, operations.ALIKE_MODULES) or (
            isinstance(module, operations.POOLS) and x.form in ("spatial", "input")
        ):
            return x
        raise self.refusal(node, f"a layer of {type(module).__name__}")

    def through_layer(self, node: fx.Node, module: Any, x: _Value) -> _Value:
        is_linear = isinstance(module, nn.Linear)
        outwards = 1 if isinstance(module, TRANSPOSED) else 0
        if is_linear and x.form == "spatial":
            raise self.refusal(node, "a linear layer of maps that were not flattened")
        if not is_linear and x.form not in ("spatial", "input"):
            raise self.refusal(node, "a convolution of what is no map")
        groups = 1 if is_linear else module.groups
        inputs = module.in_features if is_linear else module.in_channels
        outputs = module.out_features if is_linear else module.out_channels
        if groups == 1:
            self.put(node, x, module.weight, 1 - outwards, inputs)
            dims = module.weight.ndim - 2
            y = _Value(self.new(outputs), "spatial" if dims else "plain", dims)
            self.put(node, y, module.weight, outwards, outputs)
        elif groups == inputs == outputs and x.form != "input":  # depthwise
            y = x
            self.put(node, y, module.weight, 0, outputs)
        else:
            raise self.refusal(node, f"a convolution of {groups} groups")
        if module.bias is not None:
            self.put(node, y, module.bias, 0, outputs)
        return y

    def through_norm(self, node: fx.Node, module: Any, x: _Value) -> _Value:
        for name in ("num_groups", "scaling_groups"):
            groups = getattr(module, name, 1)
            if groups > 1 and groups != getattr(module, "num_channels", 1):
                raise self.refusal(node, f"a layer of {type(module).__name__} of {groups} groups")
        if isinstance(module, nn.LayerNorm) and (
            len(module.normalized_shape) != 1 or x.form not in ("plain", "input")
        ):
            raise self.refusal(node, "a layer norm over more than channels")
        return self.per_channel(node, module, x)

    def per_channel(self, node: fx.Node, module: Any, x: _Value) -> _Value:
        """Note all tensors of a module that have a number for each channel on their last axis."""
        size = next(
            getattr(module, name)
            for name in ("num_features", "num_channels", "num_parameters", "normalized_shape")
            if hasattr(module, name)
        )
        (size,) = size if isinstance(size, tuple) else (size,)
        others = getattr(module, "not_by_channel", frozenset())
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in named:
            if name in others:
                continue
            if tensor.is_floating_point() and tensor.ndim and tensor.shape[-1] == size:
                self.put(node, x, tensor, tensor.ndim - 1, size)
        return x

    def through_function(self, node: fx.Node, known: list[_Value]) -> _Value:
        x, target = known[0], node.target
        if target in operations.JOINING:
            for other in known[1:]:
                if "input" not in (x.form, other.form) and x.form != other.form:
                    raise self.refusal(node, f"{x.form} and {other.form} tensors joined")
                self.join(node, x.channels, other.channels)
            return x
        if len(known) == 1:
            if target in operations.ALIKE_FUNCTIONS or target in operations.ALIKE_METHODS:
                return x
            if target in operations.FLATTENING and self.options(node, "start_dim", "end_dim") in (
                [1],
                [1, -1],
            ):
                return self.flattened(x)
            if target in operations.POOLING and x.form in ("spatial", "input"):
                return x
            # A view of the number of samples and -1.
            sizes = node.args[1:]
            if target in operations.VIEWS and sizes[1:] == (-1,) and _is_first_size(sizes[0]):
                return self.flattened(x)
            if (
                target in operations.MEANS
                and x.form == "spatial"
                and self.is_over_maps(node, x.dims)
            ):
                return _Value(x.channels, "plain")
        raise self.refusal(node, f"an operation {getattr(target, '__name__', target)}")

    def options(self, node: fx.Node, *names: str) -> list[Any]:
        """The arguments after the first, given by position or by these names."""
        return [*node.args[1:], *(node.kwargs[name] for name in names if name in node.kwargs)]

    def is_over_maps(self, node: fx.Node, dims: int) -> bool:
        """True if a mean is over all dimensions after the channels', which are then gone."""
        given = self.options(node, "dim")[:1]
        axes = given[0] if given and isinstance(given[0], tuple | list) else given
        if (
            node.kwargs.get("keepdim")
            or len(node.args) > 2
            or not all(isinstance(axis, int) for axis in axes)
        ):
            return False
        return {axis % (2 + dims) for axis in axes} == set(range(2, 2 + dims))

    def flattened(self, x: _Value) -> _Value:
        return _Value(x.channels, "flat" if x.form in ("spatial", "flat") else x.form)

    def put(self, node: fx.Node, x: _Value, tensor: Tensor, axis: int, length: int) -> None:
        """Note that an axis of a tensor runs over the channels of x."""
        channels = self.all[self.find(x.channels)]
        channels.size = channels.size or length
        block, rest = divmod(length, channels.size)
        if not channels.is_fixed and (rest or (block != 1 and x.form != "flat")):
            raise self.refusal(node, f"{length} features of {channels.size} channels")
        name = self.names.get(id(tensor))
        if name is None:
            raise self.refusal(node, "a weight that is computed from something else")
        place = Place(name, axis, block)
        if place[:2] in self.at:  # a layer that is called again, or a tensor of two layers
            self.join(node, x.channels, self.at[place[:2]])
            return
        self.at[place[:2]] = x.channels
        channels.places.append(place)

    def new(self, size: int = 0, is_fixed: bool = False) -> int:
        self.all.append(Channels(size, is_fixed))
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, number: int) -> int:
        while self.parent[number] != number:
            number = self.parent[number]
        return number

    def join(self, node: fx.Node, first: int, second: int) -> None:
        """Make two sets of channels one."""
        kept, gone = sorted((self.find(first), self.find(second)))
        if kept == gone:
            return
        a, b = self.all[kept], self.all[gone]
        if a.size and b.size and a.size != b.size:
            raise self.refusal(node, f"{a.size} and {b.size} channels joined")
        self.parent[gone] = kept
        a.size, a.is_fixed = a.size or b.size, a.is_fixed or b.is_fixed
        a.places += b.places

    def sets(self) -> list[Channels]:
        """The sets of channels whose order is free."""
        whole = [each for n, each in enumerate(self.all) if self.find(n) == n]
        return [each for each in whole if not each.is_fixed and each.places]

    def refusal(self, node: fx.Node, what: str) -> InputError:
        return InputError(
            "`model` must be made of convolutions, linear layers, normalisation layers, "
            f"activations, pools, flattening and sums, got {what} at {node.format_node()}"
        )
