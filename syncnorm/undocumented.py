"""The names of torch that are not documented and that this package uses, each behind one function.

A new release of torch is a look at this file: `tests/unit/test_undocumented.py` tries every name
of it. The base classes `_BatchNorm`, `_NormBase`, `_LazyNormBase` and `_DropoutNd`, for which torch
has no other names, are imported where they are used.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch._compile import _disable_dynamo
from torch._library.effects import EffectType
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
    is_traceable_wrapper_subclass,
)
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    _CheckpointFrame,
    checkpoint,
)

F = TypeVar("F", bound=Callable[..., Any])

# Autograd.

backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that is running; -1 outside of one. FSDP2 relies on it, too."""

is_forward_mode_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled
"""False where forward-mode gradients are off: in an autograd Function, not under `no_grad`."""

forward_mode_level: Callable[[], int] = partial(attrgetter("_current_level"), forward_ad)
"""The number of nested `torch.autograd.forward_ad.dual_level`, less one."""


saved_tensor_hooks: Callable[[], tuple[Callable[..., Any], Callable[..., Any]] | None] = partial(
    torch._C._autograd._top_saved_tensors_default_hooks,  # pyright: ignore[reportAttributeAccessIssue]
    True,
)
"""The innermost pair of hooks on what autograd saves, pack and unpack; None without.

Non-reentrant checkpointing sets such hooks.
"""


def checkpoints() -> Iterator[tuple[Any, bool]]:
    """Find the activation checkpoints that the present forward is in, innermost first.

    Yields for each an object that lives as long as the checkpoint may be repeated, the same in its
    first forward and in each repetition, and True if this is a repetition. For the non-reentrant
    kind it is torch's frame; for the re-entrant kind, of torch and of others, the context of the
    autograd Function. Looks through the Python stack, which costs some ten microseconds.
    """
    hooks = saved_tensor_hooks()
    found = None if hooks is None else _closed_over(hooks[0], "frame")
    if isinstance(found, _CheckpointFrame):
        yield found, False
    stack = sys._getframe(1)
    while stack is not None:
        code = stack.f_code
        # `checkpoint` itself, or since torch 2.15 what it calls.
        if code.co_filename == _CHECKPOINT_FILE and "gen" in code.co_varnames:
            frame = getattr(stack.f_locals.get("gen"), "gi_frame", None)
            first = None if frame is None else frame.f_locals.get("new_frame")
            if first is not None and first is not found:
                yield first, False
        elif code.co_name == "unpack_hook" and code.co_filename == _CHECKPOINT_FILE:
            if "frame" in stack.f_locals:
                yield stack.f_locals["frame"], True
        elif code.co_name in ("forward", "backward") and "self" not in code.co_varnames:
            # Not of modules: to look at a function's variables keeps them until it returns.
            context = next((stack.f_locals.get(name) for name in code.co_varnames), None)
            if isinstance(context, BackwardCFunction):
                yield context, code.co_name == "backward"
        stack = stack.f_back


def is_reentrant(checkpoint: Any) -> bool:
    """True for what `checkpoints` finds of the re-entrant kind, whose first forward has no graph."""
    return isinstance(checkpoint, BackwardCFunction)


_CHECKPOINT_FILE = inspect.unwrap(checkpoint).__code__.co_filename


def _closed_over(function: Any, name: str) -> Any:
    """The value of a variable of the function around `function`; None if there is none."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None


def after_backward(callback: Callable[[], None]) -> None:
    """Call back at the end of the running backward pass, before DDP waits for its reductions."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` where no transform of torch.func is active.

    Without a look at each argument for what a transform may have left behind, which takes as long
    as a small layer's arithmetic.
    """
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


# Tracers of operators, see `syncnorm.tracing`. Every call of a layer asks these: they are torch's own functions.

has_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""True within a transform of torch.func."""


def dynamo_tracer() -> str | None:
    """What is given the operators of code that is being compiled or exported; None: the compiler.

    Dynamo enters the transforms of torch.func while it traces what is within them, and guards on
    them, so the answer is a constant of the graph.
    """
    if torch.compiler.is_exporting():
        return "torch.export"
    if has_transform():
        return "a transform of torch.func"
    return "forward-mode differentiation" if forward_mode_level() >= 0 else None


# As torch.compiler.assume_constant_result, without its import of Dynamo, which would otherwise
# answer for itself: in torch 2.11, that whatever it compiles is exported.
dynamo_tracer._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

is_jit_tracing: Callable[[], bool] = torch._C._is_tracing
"""True within torch.jit.trace."""

has_legacy_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
"""True for a batch of gradients: `torch.autograd.grad(..., is_grads_batched=True)`."""


def is_wrapper(t: Tensor) -> bool:
    """True for a tensor that keeps its numbers in others, and has no memory: its address is 0.

    Such as what a functional collective gives. Operators know where the numbers are.
    """
    if type(t) in (Tensor, nn.Parameter):
        return False
    if is_traceable_wrapper_subclass(t):
        return True
    has_numbers = not (t.is_meta or isinstance(t, FakeTensor) or t.numel() == 0)
    return has_numbers and t.data_ptr() == 0


def in_memory(t: Tensor) -> Tensor:
    """The tensor itself; of a wrapper a copy, by which a functional collective is waited for."""
    return t.clone() if is_wrapper(t) else t


count_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""The number of dispatch modes that are active."""


def unseen_by_selective_checkpoint(call: F) -> F:
    """Hide the operators of a function from selective activation checkpointing.

    That hands out what it has saved in the order of the first forward. A layer whose forward is
    repeated takes fewer operators, as it neither exchanges nor updates; and what a kernel writes
    into memory that it was given is known to it alone.
    """

    @functools.wraps(call)
    def unseen(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not count_dispatch_modes():
            return call(*args, **kwargs)
        modes = _get_current_dispatch_mode_stack()
        selective = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
        others = [mode for mode in modes if not isinstance(mode, selective)]
        if len(others) == len(modes):
            return call(*args, **kwargs)
        with _dispatch_modes(others):
            return call(*args, **kwargs)

    return cast(F, unseen)


def ignore_in_selective_checkpoints(operator: torch._ops.OpOverload) -> None:
    """Have selective activation checkpointing run an operator anew, whatever it is to save."""
    SAC_IGNORED_OPS.add(operator)


@contextmanager
def _dispatch_modes(wanted: Sequence[TorchDispatchMode]) -> Iterator[None]:
    """Have these dispatch modes on the stack in place of those that are there."""
    there: list[Any] = [_pop_mode() for _ in range(count_dispatch_modes())]
    for mode in wanted:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in wanted:
            _pop_mode()
        for mode in reversed(there):
            _push_mode(mode)


def has_proxy_mode() -> bool:
    """True within `make_fx`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def has_fake_mode() -> bool:
    """True within `FakeTensorMode`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


# Compilation.


def disable_dynamo(function: F) -> F:
    """Have compiled code call `function` instead of containing it.

    As `torch.compiler.disable`, with its import of seconds put off until something is compiled.
    """
    apart = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (apart if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast(F, call)


def leave_uncompiled(function: F) -> F:
    """Have torch.compile run `function`, and what it calls, as it is where torch calls it.

    With no import of Dynamo.

    `disable_dynamo` is for calls in code that is compiled: where nothing but the call is, its
    wrapper would be compiled.
    """
    own = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    strategy = own._FrameExecStrategy(own._FrameAction.SKIP, own._FrameAction.SKIP)
    own.set_code_exec_strategy(function.__code__, strategy)
    return function


def keep_order(operator: torch.library.CustomOpDef) -> None:  # pyright: ignore[reportPrivateImportUsage]
    """Have compiled code call `operator` in program order, also where its result is not used.

    Inductor needs `keep_order_in_inductor`, too.
    """
    operator.register_effect(EffectType.ORDERED)


def keep_order_in_inductor(operator: torch._ops.OpOverload) -> None:
    """Have inductor's scheduler know of the order; call it while `operator` is being traced.

    Before torch 2.15 inductor notes that one call comes after another under a name that its
    scheduler does not ask for, and moves calls whose inputs do not depend on each other, to save
    memory (pytorch#188301).
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in lowering.lowerings:
        return
    make = lowering.fallback_handler(operator, add_to_fallback_set=False)

    def lower(*args: Any, **kwargs: Any) -> Any:
        graph = lowering.V.graph
        begin, last = len(graph.operations), graph.effectful_ops.get(EffectType.ORDERED)
        result = make(*args, **kwargs)
        if last is not None:
            for operation in graph.operations[begin:]:
                graph.additional_buffer_deps[operation.get_operation_name()].add(last.get_name())
        return result

    lowering.lowerings[operator] = lower


# Process groups.


def device_types(group: dist.ProcessGroup) -> list[str]:
    """The types of devices whose tensors `group` can send."""
    return [device.type for device in group._device_types]


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """The timeout of `group`; None for a backend that keeps no such option."""
    options = group._get_backend(group._device_types[0]).options  # pyright: ignore[reportAttributeAccessIssue]
    return None if options is None else options._timeout


def backend_for(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend by which `group` sends tensors of `device`, such as "nccl"."""
    return group._get_backend(device).name()


def group_of_name(name: str) -> dist.ProcessGroup:
    """The group whose `group_name` this is, as torch's collectives in compiled code find it."""
    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType, reportReturnType]


def world_store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The Store of the default group, which all ranks reach."""
    return c10d._get_default_store()


def store_of(group: dist.ProcessGroup) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The Store of `group`, which its members reach."""
    return c10d._get_process_group_store(group)


def gloo_beside(group: dist.ProcessGroup, name: str, rank: int, size: int) -> dist.ProcessGroup:
    """Connect `size` members of `group` over gloo, with its timeout; all of them call.

    Returns:
        A process group that torch does not know. It has the methods of one, such as `allreduce`, and
        ends when nobody holds it.
    """
    store = dist.PrefixStore(name, store_of(group))  # pyright: ignore[reportPrivateImportUsage]
    timeout = timeout_of(group)
    more = {} if timeout is None else {"timeout": timeout}
    return dist.ProcessGroupGloo(store, rank, size, **more)  # pyright: ignore[reportPrivateImportUsage, reportReturnType, reportArgumentType]


def fake_store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The Store of the backend "fake", by which one rank runs without the others: sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend

    return FakeStore()


# The names of groups that only their members make (see syncnorm.comm.naming).


@contextmanager
def numbering_groups_from(number: int) -> Iterator[None]:
    """Have torch number the groups made within from here on, and go on as before afterwards."""
    before, c10d._world.group_count = c10d._world.group_count, number
    try:
        yield
    finally:
        c10d._world.group_count = before


@contextmanager
def connecting_anew() -> Iterator[None]:
    """Have torch connect the groups made within by themselves, without ranks that are not in them.

    Where the default group was made with a `device_id`, torch would split its communicator for
    NCCL's groups, in which all ranks have to take part.
    """
    world = c10d._get_default_group()
    before, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = before


def bound_device(group: dist.ProcessGroup) -> torch.device | None:
    """The device that a group was bound to, as `init_process_group(device_id=...)` does, if any."""
    return group.bound_device_id


def is_named_by_count() -> bool:
    """True if the number in a group's name is that of the groups made so far: torch >= 2.15.

    Before, it is the number of the groups that this rank is in.
    """
    name = c10d._hash_ranks_to_str([0])
    with numbering_groups_from(0):
        return name != c10d._hash_ranks_to_str([0])


def members_of_groups() -> list[tuple[int, ...]]:
    """The global ranks, in order, of each group that this rank knows of."""
    return [tuple(sorted(ranks)) for ranks in c10d._world.pg_group_ranks.values()]


def count_own_groups() -> int:
    """The number of groups that this rank is a member of."""
    return len(c10d._world.pg_names)


# Modules.

_CALL = nn.Module._call_impl.__code__


def is_within_itself(module: nn.Module) -> bool:
    """True in a forward of `module`, or in a hook of it, that another forward of it has called.

    Read from the stack, which no exception leaves wrong: torch runs no hook of a forward that ends
    by a KeyboardInterrupt. (Not within code that `torch.compile` has made.)
    """
    stack, forwards = sys._getframe(), 0
    while stack is not None and forwards < 2:
        if stack.f_code is _CALL and stack.f_locals["self"] is module:
            forwards += 1
        stack = stack.f_back
    return forwards > 1


# Wrappers of models.


def ignored_by_ddp(model: nn.Module) -> Collection[str]:
    """The names of parameters and buffers that DistributedDataParallel is told to ignore."""
    return getattr(model, "_ddp_params_and_buffers_to_ignore", ())


def let_ddp_ignore(ddp: DistributedDataParallel, names: Collection[str]) -> None:
    """Have a DistributedDataParallel that is about to take its module ignore these, too."""
    ddp.parameters_to_ignore.update(names)


def arrange_buckets(ddp: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
    """Have DDP arrange its buckets before the first step, for gradients that come last to first.

    It does so after the first backward pass otherwise, in the order in which gradients came. With
    more than two workers a sum depends on the arrangement: a run that is resumed would differ from
    one that is not.

    *Collectives*: one sum of all gradients, one broadcast of the arrangement; every worker must
    call.

    Args:
        ddp: not called yet.
        parameters: those whose gradients it sums, in their order.
    """
    # The backend of dry runs gives DDP no sums.
    if dist.get_backend(ddp.process_group) == "fake":
        return
    ddp.reducer.prepare_for_backward([])
    for parameter in reversed(parameters):
        torch.autograd.backward(parameter, torch.zeros_like(parameter))
    for parameter in parameters:
        parameter.grad = None
    ddp.reducer._rebuild_buckets()


def is_before_static_graph(ddp: DistributedDataParallel) -> bool:
    """True until the first step of a DDP model with `static_graph`, which has exchanges of its own."""
    return ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """True for a module whose parameters FSDP has sharded or will shard."""
    return getattr(module, "_is_fsdp_managed_module", False)
