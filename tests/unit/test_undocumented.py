"""Every undocumented name of torch that the package uses does what it is used for.

A release of torch that changes one of them fails here, whatever else it breaks.
"""

import contextlib
import functools
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from syncnorm import SyncBatchNorm, undocumented
from syncnorm.testing import RankPool


class Probe(nn.Module):
    """Notes the value of a function in its forward."""

    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.function())
        return x.sin()


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_pass_is_known_where_a_checkpointed_forward_is_repeated(reentrant):
    probe = Probe(undocumented.backward_pass)
    for _ in range(2):
        x = torch.ones(3, requires_grad=True)
        checkpoint(probe, x, use_reentrant=reentrant).sum().backward()
    first, repeated, second, repeated_later = probe.seen
    assert first == second == -1
    assert -1 < repeated < repeated_later


def test_forward_mode_is_off_in_a_function_and_on_under_no_grad():
    probe = Probe(undocumented.is_forward_mode_enabled)
    checkpoint(probe, torch.ones(3, requires_grad=True), use_reentrant=True)
    with torch.no_grad():
        probe(torch.ones(3))
    assert probe.seen == [False, True]


def test_forward_mode_level():
    assert undocumented.forward_mode_level() < 0
    with forward_ad.dual_level():
        assert undocumented.forward_mode_level() == 0


def test_a_plain_apply_is_a_functions_own():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, times):
            ctx.times = times
            return x * times

        @staticmethod
        def backward(ctx, g):
            return g * ctx.times, None

    x = torch.ones(3, requires_grad=True)
    y = undocumented.plain_apply(Scaled)(x, 2.0)
    y.backward(torch.arange(3.0))
    assert y.tolist() == [2.0] * 3
    assert x.grad.tolist() == [0.0, 2.0, 4.0]


def test_saved_tensor_hooks():
    probe = Probe(lambda: undocumented.saved_tensor_hooks() is not None)
    probe(torch.ones(3))
    with save_on_cpu():
        probe(torch.ones(3))
    checkpoint(probe, torch.ones(3, requires_grad=True), use_reentrant=False)
    assert probe.seen == [False, True, True]


@pytest.mark.parametrize("depths", [[True], [False], [True, False], [False, True]], ids=str)
def test_checkpoints_are_known_in_their_first_forward_and_in_repetitions(depths):
    seen: list[list[tuple[object, bool]]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(list(undocumented.checkpoints()))
        return x.sin()

    function = forward
    for reentrant in depths:
        function = functools.partial(checkpoint, function, use_reentrant=reentrant)
    function(torch.randn(3).requires_grad_()).sum().backward()
    first, *repetitions = seen
    assert [is_repetition for _, is_repetition in first] == [False] * len(depths)
    assert sorted(undocumented.is_reentrant(each) for each, _ in first) == sorted(depths)
    outermost = [scopes for scopes in repetitions if any(s is first[-1][0] for s, _ in scopes)]
    assert outermost
    assert all((first[-1][0], True) in scopes for scopes in outermost)
    seen.clear()
    forward(torch.randn(3))
    assert seen == [[]]


def test_a_call_after_the_backward_pass():
    events = []
    x = torch.ones(3, requires_grad=True)
    y = x * 1.0
    x.register_hook(lambda grad: events.append("last gradient"))

    def first(grad: Tensor) -> None:
        undocumented.after_backward(lambda: events.append("end"))
        events.append("first gradient")

    y.register_hook(first)
    y.sum().backward()
    assert events == ["first gradient", "last gradient", "end"]


TRACERS = {
    "has_transform": undocumented.has_transform,
    "is_jit_tracing": undocumented.is_jit_tracing,
    "has_proxy_mode": undocumented.has_proxy_mode,
    "has_fake_mode": undocumented.has_fake_mode,
}


def _in_transform(probe: Probe) -> None:
    torch.func.grad(lambda x: probe(x).sum())(torch.ones(3))


def _in_trace(probe: Probe) -> None:
    torch.jit.trace(probe, torch.ones(3), check_trace=False)


def _in_make_fx(probe: Probe) -> None:
    make_fx(probe)(torch.ones(3))


def _in_fake_mode(probe: Probe) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        probe(torch.ones(3))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda probe: probe(torch.ones(3)), set()),
        (_in_transform, {"has_transform"}),
        (_in_trace, {"is_jit_tracing"}),
        (_in_make_fx, {"has_proxy_mode"}),
        (_in_fake_mode, {"has_fake_mode"}),
    ],
)
def test_tracers(call, expected):
    probe = Probe(lambda: {name for name, is_active in TRACERS.items() if is_active()})
    call(probe)
    assert probe.seen == [expected]


def test_dispatch_modes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert undocumented.count_dispatch_modes() == 0
    with FakeTensorMode():
        assert undocumented.count_dispatch_modes() == 1
        assert isinstance(torch.ones(3), undocumented.FakeTensor)


def test_a_wrapper_has_no_memory():
    wrapper = AsyncCollectiveTensor(torch.ones(3))
    assert undocumented.is_wrapper(wrapper)
    assert wrapper.data_ptr() == 0
    assert undocumented.is_wrapper(Bare.around(torch.ones(3)))
    for t in (torch.ones(3), nn.Parameter(torch.ones(3)), torch.ones(3).as_subclass(_Subclass)):
        assert not undocumented.is_wrapper(t)
        assert t.data_ptr()
    with torch.device("meta"):
        assert not undocumented.is_wrapper(torch.ones(3).as_subclass(_Subclass))
    with FakeTensorMode():
        assert not undocumented.is_wrapper(torch.ones(3))


class _Subclass(Tensor):
    pass


class Bare(Tensor):
    """A wrapper that torch cannot take apart."""

    held: Tensor

    @classmethod
    def around(cls, t: Tensor) -> Tensor:
        made = Tensor._make_wrapper_subclass(cls, t.shape, t.stride(), dtype=t.dtype)
        made.held = t
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.held, (args, kwargs or {}))
        return tree_map_only(Tensor, cls.around, func(*args, **kwargs))


def test_a_gradient_in_a_wrapper_is_read_by_operators():
    x, g = torch.randn(2, 4, 3, 5)
    expected = torch.nn.BatchNorm1d(3)(x.requires_grad_())
    (dx,) = torch.autograd.grad(expected, x, g)
    (found,) = torch.autograd.grad(SyncBatchNorm(3, sync="none")(x), x, Bare.around(g))
    torch.testing.assert_close(getattr(found, "held", found), dx)


def test_selective_checkpointing_alone_sees_nothing_of_a_function():
    class Names(undocumented.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    @undocumented.unseen_by_selective_checkpoint
    def hidden(x):
        return x.sin()

    def policy(context, func, *args, **kwargs):
        asked.append(func.overloadpacket.__name__)
        return True

    seen: list[str] = []
    asked: list[str] = []
    outer, inner = Names(), Names()
    with outer, create_selective_checkpoint_contexts(policy)[0], inner:
        hidden(torch.ones(3)).cos()
        before = undocumented.count_dispatch_modes()
        with pytest.raises(AttributeError):
            hidden(None)
        assert undocumented.count_dispatch_modes() == before == 3
    assert asked == ["ones", "cos"]
    # What is saved is detached.
    found = [name for name in seen if name != "detach"]
    assert found == ["ones", "ones", "sin", "sin", "cos", "cos"]


def test_own_dispatch_modes():
    class Names(undocumented.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Names():
        torch.ones(3).sin()
    assert seen == ["ones", "sin"]


def test_a_batch_of_gradients():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(undocumented.has_legacy_batch(grad))
            return 2 * grad

    seen: list[bool] = []
    x = torch.ones(3, requires_grad=True)
    for grads, is_batched in ((torch.ones(3), False), (torch.eye(3), True)):
        torch.autograd.grad(Double.apply(x), x, grads, is_grads_batched=is_batched)
    assert seen == [False, True]


def test_compiled_code_calls_what_dynamo_is_kept_from():
    seen: list[bool] = []

    @undocumented.disable_dynamo
    def apart(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    compiled = torch.compile(lambda x: apart(x.sin()) * 2, backend="eager")
    assert apart(torch.zeros(2)).tolist() == [1, 1]
    assert compiled(torch.zeros(2)).tolist() == [2, 2]
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("backend", "options"),
    # Inductor orders the calls; of what it would compile nothing is left.
    [("aot_eager", {}), ("inductor", {"fallback_by_default": True})],
    ids=["aot_eager", "inductor"],
)
@pytest.mark.parametrize("is_used", [False, True])
def test_compiled_code_keeps_the_order_of_calls(backend, options, is_used, tmp_path, monkeypatch):
    """None depends on another. Of those that are used inductor itself calls the first one last."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    calls: list[int] = []

    @torch.library.custom_op(f"syncnorm_test::note_{backend}_{is_used}", mutates_args=())
    def note(x: Tensor, number: int) -> Tensor:
        calls.append(number)
        return x.clone()

    @note.register_fake
    def _(x: Tensor, number: int) -> Tensor:
        undocumented.keep_order_in_inductor(note._opoverload)
        return torch.empty_like(x)

    undocumented.keep_order(note)

    def function(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        sums = [note(torch.zeros(size), number).sum() for number, size in enumerate((7, 5, 6))]
        return x * 2, sums if is_used else []

    torch.compile(function, backend=backend, options=options)(torch.ones(2))
    assert calls == [0, 1, 2]


def _about_groups() -> dict[str, object]:
    world = dist.group.WORLD
    assert world is not None
    rank = dist.get_rank()
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=7))
    assert isinstance(pair, dist.ProcessGroup)
    undocumented.world_store().set(f"world {rank}", "said")
    undocumented.store_of(pair).set(f"pair {rank}", "said")
    dist.barrier()
    found = {
        "timeouts": [undocumented.timeout_of(world), undocumented.timeout_of(pair)],
        "devices": undocumented.device_types(world),
        "backend": undocumented.backend_for(pair, torch.device("cpu")),
        "by name": undocumented.group_of_name(pair.group_name) is pair,
        "stores": [
            undocumented.world_store().check([f"world {1 - rank}"]),
            undocumented.store_of(pair).check([f"pair {1 - rank}"]),
            undocumented.store_of(pair).check([f"world {rank}"]),
        ],
        "members": undocumented.members_of_groups(),
        "own groups": undocumented.count_own_groups(),
    }
    beside = undocumented.gloo_beside(pair, "beside", 1 - rank, 2)
    total = torch.full((2,), rank + 1.0, dtype=torch.float64)
    beside.allreduce([total]).wait()
    found["beside"] = (beside.rank(), beside.options._timeout, total.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    # Only on rank 1: torch's count of groups made goes on as before.
    if rank == 1:
        with undocumented.numbering_groups_from(1000):
            dist.new_group([1], use_local_synchronization=True)
    found["own groups"] = (found["own groups"], undocumented.count_own_groups())
    again = dist.new_group([0, 1])
    assert isinstance(again, dist.ProcessGroup)
    found["name"] = again.group_name
    return found


def test_groups():
    with RankPool(2, timeout_seconds=60.0) as ranks:
        zero, one = ranks.run(_about_groups)
    for rank, found in enumerate((zero, one)):
        assert found["beside"] == (1 - rank, timedelta(seconds=7), [3, 3])
        assert found["timeouts"] == [timedelta(seconds=60), timedelta(seconds=7)]
        assert "cpu" in found["devices"]
        assert found["backend"] == "gloo"
        assert found["by name"]
        assert found["stores"] == [True, True, False]
        assert found["members"] == [(0, 1), (0, 1)]
    assert zero["own groups"] == (2, 2)
    assert one["own groups"] == (2, 3)
    assert zero["name"] == one["name"]


def _name_by_count() -> tuple[bool, bool]:
    """Names that follow the count of groups: said of torch, and seen in two groups of one rank."""
    names = []
    for number in (1000, 2000):
        with undocumented.numbering_groups_from(number):
            made = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        names.append(made.group_name)
        dist.destroy_process_group(made)
    return undocumented.is_named_by_count(), names[0] != names[1]


def test_the_number_in_a_groups_name():
    with RankPool(1) as ranks:
        ((said, seen),) = ranks.run(_name_by_count)
    assert said == seen


def _splits() -> list[int]:
    """Numbers of splits of the default group that a group of one asks for: as torch has it, and ours."""
    world, asked = dist.group.WORLD, []
    assert world is not None
    assert undocumented.bound_device(world) is None
    world.bound_device_id = torch.device("cuda", 1)  # as init_process_group(device_id=...) sets it
    assert undocumented.bound_device(world) == torch.device("cuda", 1)
    numbers = []
    # It takes one argument more from torch 2.15 on.
    with mock.patch.object(c10d, "_get_split_source", side_effect=lambda *args: asked.append(args)):
        for way in (contextlib.nullcontext, undocumented.connecting_anew):
            asked.clear()
            with way():
                dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
            numbers.append(len(asked))
    assert undocumented.bound_device(world) == torch.device("cuda", 1)
    world.bound_device_id = None
    return numbers


def test_a_group_connects_without_the_ranks_that_are_not_in_it():
    with RankPool(1) as ranks:
        assert ranks.run(_splits) == [[1, 0]]


def test_the_fake_backend_sends_nothing():
    dist.init_process_group("fake", store=undocumented.fake_store(), rank=0, world_size=3)
    try:
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x.tolist() == [1, 1]
        assert dist.get_world_size() == 3
    finally:
        dist.destroy_process_group()


def _after_ddp(ignored: list[str], is_told_late: bool) -> float:
    """A buffer of this rank after DDP has broadcast those of rank 0, unless it was told not to."""
    model = nn.BatchNorm1d(1)
    model.running_mean.fill_(dist.get_rank())
    if is_told_late:

        def tell(ddp: nn.Module, name: str, module: nn.Module | None) -> None:
            if name == "module":
                undocumented.let_ddp_ignore(ddp, ignored)

        with register_module_module_registration_hook(tell):
            DistributedDataParallel(model)
    else:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        assert list(undocumented.ignored_by_ddp(model)) == ignored
        DistributedDataParallel(model)
    return model.running_mean.item()


class _Nested(nn.Module):
    def forward(self, x: Tensor, other: nn.Module | None = None) -> Tensor:
        return x if other is None else other(x)


def test_a_forward_within_one_of_the_same_module():
    model, other = _Nested(), _Nested()
    seen: list[bool] = []

    def look(module: nn.Module, *_: object) -> None:
        seen.append(undocumented.is_within_itself(module))

    model.register_forward_pre_hook(look)
    model.register_forward_hook(look)
    model(torch.ones(2), other)
    assert seen == [False] * 2
    model(torch.ones(2), model)
    assert seen == [False, False, False, True, True, False]


@pytest.mark.parametrize("is_told_late", [False, True])
def test_ddp_reads_what_it_is_to_ignore(pool, is_told_late):
    assert pool(2).run(_after_ddp, [], is_told_late) == [0, 0]
    assert pool(2).run(_after_ddp, ["running_mean"], is_told_late) == [0, 1]


def _sharded() -> list[bool]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(2, 2))
    before = undocumented.is_managed_by_fsdp(model[0])
    FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return [before, undocumented.is_managed_by_fsdp(model[0])]


def test_modules_of_fsdp(pool):
    assert pool(2).run(_sharded) == [[False, True]] * 2


def _buckets(are_arranged: bool) -> list[list[list[int]]]:
    """The numbers of the parameters in each bucket, of two steps."""
    model = nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(3)))
    ddp = DistributedDataParallel(model)
    numbers = {p: number for number, p in enumerate(model.parameters())}
    if are_arranged:
        undocumented.arrange_buckets(ddp, list(numbers))
        assert all(p.grad is None for p in numbers)
    steps: list[list[list[int]]] = []

    def keep(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
        steps[-1].append([numbers[p] for p in bucket.parameters()])  # pyright: ignore[reportArgumentType]
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, keep)
    for _ in range(2):
        steps.append([])
        ddp(torch.ones(2, 600)).sum().backward()
    return steps


def _static_graph() -> list[bool]:
    found: list[bool] = []
    for is_static in (False, True):
        ddp = DistributedDataParallel(nn.Linear(2, 2), static_graph=is_static)
        for _ in range(2):
            found.append(undocumented.is_before_static_graph(ddp))
            ddp(torch.ones(2, 2)).sum().backward()
    return [*found, undocumented.is_before_static_graph(ddp)]


def test_ddp_says_if_it_has_learned_a_static_graph(pool):
    assert pool(1).run(_static_graph)[0] == [False, False, True, False, False]


def test_ddp_arranges_its_buckets_before_the_first_step(pool):
    first, second = pool(1).run(_buckets, True)[0]
    assert first == second == [[2], [1, 0]]
    first, second = pool(1).run(_buckets, False)[0]
    assert first != second
