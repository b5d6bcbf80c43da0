"""Compiled layers: one graph, the exchanges in it, and the numbers of the uncompiled layer and of
the oracle.

aot_eager traces and partitions as the default backend does and needs no C++ compiler; a few tests
have that, too.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    functional,
    prepare_ddp,
    undocumented,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.testing import RankPool, assert_close
from tests.covering import covering
from tests.distributed.steps import (
    Batch,
    Outcome,
    check_against_oracle,
    make_layer,
    one_step,
    oracle_steps,
    parameters,
)
from tests.model.parts import Checkpointed, selective_contexts
from tests.operators import Operators

CHANNELS = 3
RENORM = {"bounds": (1.5, 0.5)}
SCHEDULE = RenormSchedule.constant(1.5, 0.5)
KINDS = pytest.mark.parametrize("options", [{}, RENORM], ids=["norm", "renorm"])


def _compiled(module: Any, backend: Any = "aot_eager", fullgraph: bool = True) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=fullgraph, backend=backend)


def _sample(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        size, CHANNELS, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def _compiled_steps(steps: list[Any], options: dict[str, Any], in_group: bool) -> list[Outcome]:
    """As steps.train_step, but compiled."""
    group = dist.new_group([0, 1]) if in_group else None
    layer = make_layer(CHANNELS, dtype=torch.float64, process_group=group, **options)
    with torch.no_grad():
        for parameter, value in zip(
            (layer.weight, layer.bias), parameters(CHANNELS, torch.float64), strict=True
        ):
            parameter.copy_(value)
    compiled = _compiled(layer)
    return [one_step(layer, *step, run=compiled) for step in steps]


def _check_compiled(
    pool: Any, options: dict[str, Any], sizes: list[int], masked: bool, in_group: bool
) -> None:
    batches = [
        Batch.random((sum(sizes), CHANNELS, 4), torch.float64, masked=masked, seed=seed)
        for seed in range(2)
    ]
    by_rank = list(zip(*(b.shards(sizes) for b in batches), strict=True))
    got = pool(len(sizes)).run_each(
        _compiled_steps, [(list(steps), options, in_group) for steps in by_rank]
    )
    check_against_oracle(got, batches, sizes, options)
    for outcomes in got:
        for outcome in outcomes:
            assert outcome.exchanges == [
                ("moments", 2 * CHANNELS + 2),
                ("gradients", 2 * CHANNELS + 2),
            ]


@pytest.mark.parametrize(("options", "sizes"), [({}, [0, 5]), (RENORM, [3, 4])], ids=str)
def test_the_compiled_layer_is_the_whole_batch_and_its_exchanges_are_counted(pool, options, sizes):
    _check_compiled(pool, options, sizes, masked=False, in_group=False)


def test_the_compiled_layer_with_a_mask_over_a_group_of_its_own(pool):
    _check_compiled(pool, {}, [2, 4], masked=True, in_group=True)


def _in_a_group_of_before(path: str) -> tuple[list[Tensor], bool]:
    """Running means in both of two torch.distributed, the group being one of the first.

    And whether a group of the second, of other ranks, has its name.
    """
    rank, means, names = dist.get_rank(), [], []
    parts = [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    layer, others = SyncBatchNorm(CHANNELS, momentum=1.0), []
    compiled = _compiled(layer, "eager")
    for ranks in parts:
        dist.destroy_process_group()
        dist.init_process_group("gloo", f"file://{path}{len(means)}", rank=rank, world_size=4)
        (group,) = (g for g in map(dist.new_group, ranks) if isinstance(g, dist.ProcessGroup))
        others.append(SyncBatchNorm(CHANNELS, process_group=group))
        if not means:
            layer.process_group = group
        compiled(_sample(2, rank, torch.float32))
        assert layer.running_mean is not None
        means.append(layer.running_mean.clone())
        names.append(group.group_name)
    return means, names[0] == names[1]


def test_a_compiled_layer_in_a_group_of_a_torch_distributed_that_was_shut_down(tmp_path):
    """Its ranks are those that it was given; torch gives their name to others."""
    with RankPool(4) as ranks:
        answers = ranks.run(_in_a_group_of_before, str(tmp_path / "rendezvous"))
    assert any(is_same for _, is_same in answers)
    for rank, (means, _) in enumerate(answers):
        pair = [_sample(2, each, torch.float32) for each in (rank // 2 * 2, rank // 2 * 2 + 1)]
        for mean in means:
            assert_close(mean, torch.cat(pair).mean((0, 2)), torch.float32, "running_mean")


def _after_its_layer() -> tuple[Tensor, list[str]]:
    layer = SyncBatchNorm(CHANNELS, affine=False, process_group=dist.new_group([0, 1]))
    x = _sample(3, dist.get_rank()).requires_grad_()
    y = _compiled(layer)(x)
    del layer
    torch._dynamo.reset()
    gc.collect()
    with exchange.record() as exchanges:
        (y * y.detach().cos()).sum().backward()
    assert x.grad is not None
    return x.grad, [e.kind for e in exchanges]


def test_a_compiled_backward_pass_that_outlives_its_layer(pool):
    x = torch.cat([_sample(3, rank) for rank in range(2)]).requires_grad_()
    y = nn.BatchNorm1d(CHANNELS, affine=False).double()(x)
    (y * y.detach().cos()).sum().backward()
    assert x.grad is not None
    answers = pool(2).run(_after_its_layer)
    assert_close(torch.cat([grad for grad, _ in answers]), x.grad, torch.float64, "gradient", 10)
    assert all(kinds == ["gradients"] for _, kinds in answers)


def _exchanges_where_some_need_gradients(needs_grad: list[bool]) -> list[tuple[str, int]]:
    layer = SyncBatchNorm(CHANNELS, affine=False)
    x = _sample(3, dtype=torch.float32).requires_grad_(needs_grad[dist.get_rank()])
    with exchange.record() as exchanges:
        y = _compiled(layer)(x)
        y.backward(torch.ones_like(y))
    return [(e.kind, e.numel) for e in exchanges]


def test_compiled_workers_may_differ_in_whether_the_input_needs_a_gradient(pool):
    """A compiler leaves out what it finds no use for: without its mark the exchange would be
    missing on rank 1.
    """
    first, second = pool(2).run(_exchanges_where_some_need_gradients, [True, False])
    assert first == second == [("moments", 2 * CHANNELS + 2), ("gradients", 2 * CHANNELS + 2)]


def test_two_graphs_serve_all_batch_sizes_and_one_each_for_none_and_one():
    counter = CompileCounterWithBackend("eager")
    compiled = _compiled(make_layer(CHANNELS, **RENORM), counter)
    counts = []
    for size in (2, 7, 32, 64, 1, 0):
        x = _sample(size, dtype=torch.float32).requires_grad_()
        y = compiled(x)
        y.backward(torch.ones_like(y))
        counts.append(counter.frame_count)
    assert 0 < counts[3] <= 2
    assert counts[5] <= counts[3] + 2


def _ddp_steps(is_compiled: bool, options: dict[str, Any]) -> list[Tensor]:
    """Steps of a model under DDP; the shards are uneven and other ones in each step."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(4, 4),
        make_layer(CHANNELS, dtype=torch.float64, **options),
        nn.Tanh(),
        nn.Linear(4, 2),
    ).double()
    prepare_ddp(model)
    ddp = DistributedDataParallel(_compiled(model) if is_compiled else model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        ddp(
            _sample(2 + step * dist.get_rank(), 10 * step + dist.get_rank())
        ).square().mean().backward()
        optimizer.step()
    return [t.detach().clone() for t in model.state_dict().values()]


@KINDS
def test_a_compiled_model_trains_under_ddp_as_an_uncompiled_one(pool, options):
    plain = pool(2).run(_ddp_steps, False, options)
    for got, expected in zip(pool(2).run(_ddp_steps, True, options), plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, torch.float64, "state")


def _own_buffers(is_compiled: bool) -> Tensor:
    """Running statistics of a layer that pools nothing, under DDP; prepared before it is compiled."""
    torch.manual_seed(0)
    model = prepare_ddp(nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(CHANNELS, sync="none")))
    ddp = DistributedDataParallel(torch.compile(model, backend="eager") if is_compiled else model)
    for step in range(3):
        ddp(
            _sample(6, 10 * step + dist.get_rank(), dtype=torch.float32) + dist.get_rank()
        ).sum().backward()
    return model[1].running_mean.clone()


def test_ddp_leaves_the_buffers_of_a_compiled_model_alone(pool):
    plain, compiled = (pool(2).run(_own_buffers, is_compiled) for is_compiled in (False, True))
    assert (plain[0] - plain[1]).abs().max() > 0.01
    for got, expected in zip(compiled, plain, strict=True):
        assert_close(got, expected, torch.float32, "running_mean")


def _over_a_mesh(is_compiled: bool) -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    norm = functional.sync_batch_norm
    run = torch.compile(norm, backend="eager", fullgraph=True) if is_compiled else norm
    return run(_sample(6, dist.get_rank()), process_group=mesh)


def test_compiled_over_a_mesh(pool):
    for plain, compiled in zip(
        pool(2).run(_over_a_mesh, False), pool(2).run(_over_a_mesh, True), strict=True
    ):
        assert_close(plain, compiled, torch.float64, "y")


def _against_eager(
    module: nn.Module, steps: int = 3, fullgraph: bool = True, run: Any = None
) -> None:
    """Outputs, gradients and state of a module and of its compiled copy, over several steps."""
    plain = copy.deepcopy(module)
    compiled = _compiled(module, fullgraph=fullgraph)
    run = run or (lambda forward, x: forward(x))
    for step in range(steps):
        both = []
        for forward, owner in ((compiled, module), (plain, plain)):
            x = _sample(4, step).requires_grad_()
            y = run(forward, x)
            y.backward(_sample(4, step + 50))
            both.append(
                [y, x.grad, *(p.grad for p in owner.parameters()), *owner.state_dict().values()]
            )
        for a, b in zip(*both, strict=True):
            assert_close(a, b, torch.float64, f"step {step}")


def test_renormalisation_called_twice_in_a_graph_keeps_its_r_and_d_for_the_backward_pass():
    """A compiler may compute r and d anew in the backward pass, by then from other running
    statistics.
    """
    layer = SyncBatchRenorm(CHANNELS, schedule=SCHEDULE, dtype=torch.float64)
    _against_eager(nn.Sequential(layer, nn.Tanh(), layer))


class _Functional(nn.Module):
    def __init__(self, function: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.register_buffer("running_mean", torch.zeros(CHANNELS, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(CHANNELS, dtype=torch.float64))
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, CHANNELS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.running_mean, self.running_var, self.weight, **self.options)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (functional.sync_batch_norm, {}),
        (functional.sync_batch_renorm, {"r_max": 1.5, "d_max": 0.5}),
    ],
    ids=["norm", "renorm"],
)
def test_the_functional_forms_compile(function, options):
    _against_eager(_Functional(function, **options))


@pytest.mark.parametrize(
    "options",
    [{"momentum": None, "bias": False}, {"track_running_stats": False}, {"sync": "none"}],
    ids=str,
)
def test_other_options_compile(options):
    _against_eager(SyncBatchNorm(CHANNELS, dtype=torch.float64, **options))


@pytest.mark.parametrize(
    *covering(
        make=[SyncBatchNorm, SyncBatchRenorm],
        dtype=[torch.float32, torch.bfloat16, torch.float64],
        sync=["batch", "none"],
    ),
    ids=str,
)
def test_several_layers_compile_for_any_size_at_once(make, dtype, sync):
    torch._dynamo.reset()
    model = nn.Sequential(make(CHANNELS, sync=sync), nn.Tanh(), make(CHANNELS, sync=sync)).to(dtype)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 5):
        x = _sample(size, dtype=dtype)
        y, expected = compiled(x), plain(x)
        assert_close(y, expected, dtype, "y")
        for each in (y, expected):
            each.backward(_sample(size, 7, dtype))
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(got.grad, wanted.grad, dtype, "gradient")


def test_what_a_layer_is_given_by_torchs_name_and_running_statistics_that_were_taken_away():
    layer = SyncBatchRenorm(CHANNELS, dtype=torch.float64)
    assert_close(_compiled(layer)(input=_sample(5)), _sample_normalised(), torch.float64, "y")
    layer.running_mean = layer.running_var = None
    with pytest.raises(InputError, match="`running_mean` must be there in training, got None"):
        _compiled(layer, fullgraph=False)(_sample(5))


def _sample_normalised() -> Tensor:
    return functional.sync_batch_norm(_sample(5))


def test_a_ramp_of_the_schedule_compiles():
    schedule = RenormSchedule(warmup_steps=1, r_steps=4, d_steps=4)
    _against_eager(
        SyncBatchRenorm(CHANNELS, schedule=schedule, momentum=0.3, dtype=torch.float64), steps=5
    )


@pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
def test_evaluation_compiles_to_plain_operators(sync):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = prepare_ddp(
        nn.Sequential(SyncBatchNorm(CHANNELS, sync=sync, dtype=torch.float64))
    ).eval()
    x = _sample(4)
    assert torch.equal(_compiled(model, backend)(x), model(x))
    calls = [
        node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"
    ]
    assert calls == [torch.nn.functional.batch_norm]


def _modes_that_break(sync: str, is_compiled: bool, kind: str) -> list[Tensor]:
    layer = {
        "norm": lambda: SyncBatchNorm(CHANNELS, sync=sync, dtype=torch.float64),
        "renorm": lambda: SyncBatchRenorm(
            CHANNELS, schedule=SCHEDULE, sync=sync, dtype=torch.float64
        ),
    }[kind]()
    model = prepare_ddp(nn.Sequential(nn.Tanh(), layer, nn.Tanh()))
    forward = _compiled(model, fullgraph=False) if is_compiled else model
    seen = []
    for step in range(4):
        x = _sample(3, 10 * step + dist.get_rank()).requires_grad_()
        forward(x).backward(_sample(3, 50 + step))
        seen += [x.grad, *(t.clone() for t in model.state_dict().values())]
    return seen


@pytest.mark.parametrize(("sync", "kind"), [("running", "renorm"), ("lagged", "norm")])
def test_modes_in_which_layers_act_together_run_beside_the_graph(pool, sync, kind):
    plain = pool(2).run(_modes_that_break, sync, False, kind)
    for got, expected in zip(pool(2).run(_modes_that_break, sync, True, kind), plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, torch.float64, sync)


def _whole_steps(sync: str, is_compiled: bool, is_accumulated: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layers = [SyncBatchNorm(CHANNELS, sync=sync), SyncBatchNorm(CHANNELS, sync=sync)]
    model = prepare_ddp(nn.Sequential(layers[0], nn.Linear(CHANNELS, CHANNELS), layers[1]).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        if is_accumulated:
            with accumulate(model):
                for part in x.chunk(2):
                    model(part).sin().sum().backward()
        else:
            model(x).sin().sum().backward()
        optimizer.step()

    run = _compiled(step, fullgraph=False) if is_compiled else step
    for number in range(4):
        run(_sample(4 + 2 * dist.get_rank(), 10 * number + dist.get_rank())[..., 0])
    return [t.detach().clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("is_accumulated", [False, True])
@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_whole_step_may_be_compiled(pool, sync, is_accumulated):
    """What the layers do together in a backward pass, and at a block's end, runs as it is."""
    plain = pool(2).run(_whole_steps, sync, False, is_accumulated)
    compiled = pool(2).run(_whole_steps, sync, True, is_accumulated)
    for got, expected in zip(compiled, plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, torch.float64, sync)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_checkpointing_a_compiled_layer_updates_once(how):
    # Where a compiler runs operators one by one, selective checkpoints take no ordered ones.
    is_selective = how == "selective"
    layer = SyncBatchNorm(CHANNELS, sync="none" if is_selective else "batch", dtype=torch.float64)
    options = {"context_fn": partial(selective_contexts, True)} if is_selective else {}
    _against_eager(
        layer,
        run=lambda forward, x: checkpoint(forward, x, use_reentrant=how == "reentrant", **options),
    )


@pytest.mark.parametrize("how", ["inside", "outside", "selective"])
def test_checkpointing_a_compiled_renormalisation_is_an_error(how):
    """It would see running statistics that have moved, and be wrong without a word."""
    layer = SyncBatchRenorm(CHANNELS, schedule=SCHEDULE, sync="none", dtype=torch.float64)
    compiled = _compiled(Checkpointed(layer) if how == "inside" else layer)
    x = _sample(4).requires_grad_()
    options = {"context_fn": partial(selective_contexts, True)} if how == "selective" else {}
    y = compiled(x) if how == "inside" else checkpoint(compiled, x, use_reentrant=False, **options)
    with pytest.raises(
        InputError, match="`checkpoint` must not repeat a renormalisation that is compiled"
    ):
        y.backward(_sample(4, 1))


def test_a_fault_in_the_mask_makes_compiled_output_nan_and_leaves_the_buffers():
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64)
    mask = torch.ones(4, 1, 4)
    mask[1, 0, 2] = -1.0
    assert _compiled(layer)(_sample(4), mask).isnan().all()
    assert torch.equal(layer.running_var, torch.ones(CHANNELS, dtype=torch.float64))
    assert layer.num_batches_tracked == 0


class _Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolution(x)) + x)


def test_models_without_our_layers_are_compiled_with_their_backward_pass():
    """The package has a hook on all modules, and torch makes some while it compiles."""
    model = nn.Sequential(nn.Conv1d(3, 3, 1))
    x = _sample(4, dtype=torch.float32).requires_grad_()

    def step(x: Tensor) -> Tensor:
        y = model(x)
        y.square().sum().backward()
        return y

    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        y = torch.compile(step, backend="aot_eager_decomp_partition")(x)
    assert torch.allclose(y, model(x), atol=1e-6)
    assert x.grad is not None


class _Branches(nn.Module):
    """Layers whose exchanges do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(make_layer(CHANNELS, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        long, short, middle = x.repeat(1, 1, 16).sin(), x * 2 + 1, x.repeat(1, 1, 4) * 3 + 5
        a, b, c = (
            norm(each).relu().mean((1, 2))
            for norm, each in zip(self.norms, (long, short, middle), strict=True)
        )
        return a + b * c


def _branches(sizes: list[int], folder: str) -> list[dict[str, Tensor]]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # no code of an earlier run
    found: list[dict[str, Tensor]] = []
    rank = dist.get_rank()
    for is_compiled in (False, True):
        model = _Branches()
        run = _compiled(model, "inductor") if is_compiled else model
        run(_sample(sizes[rank], rank)).square().sum().backward()
        gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        found.append({**dict(model.named_buffers()), **gradients})
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    return found


def test_inductor_is_told_of_the_order_of_exchanges():
    """How it then keeps it: `test_compiled_code_keeps_the_order_of_calls`."""
    from torch._inductor import lowering

    operator = torch.ops.syncnorm.sum.default
    with FakeTensorMode():
        operator(torch.zeros(2), "", "", "")
    # Inductor has one of its own for what it has compiled.
    assert lowering.lowerings[operator].__module__ == undocumented.__name__


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_inductor_exchanges_in_the_same_order_on_workers_with_other_graphs(pool, tmp_path):
    """A worker without samples would have the statistics of one layer in the place of another's."""
    for eager, compiled in pool(2).run(_branches, [0, 6], str(tmp_path)):
        for name, expected in eager.items():
            assert_close(compiled[name], expected, torch.float64, name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
@KINDS
def test_inductor_fuses_and_is_right_at_a_large_mean(options, monkeypatch):
    from torch._inductor import metrics

    block = _Block(make_layer(CHANNELS, **options))
    x = torch.randn(4, CHANNELS, 9, 9, requires_grad=True)
    with monkeypatch.context() as patched, Operators() as eager:
        # The operators that are compiled, not the C that runs in their place.
        patched.setattr("syncnorm.maths.kernels.fused_for", lambda *_: None)
        block(x).sum().backward()
    metrics.reset()
    _compiled(block, "inductor")(x).sum().backward()
    assert 0 < metrics.generated_kernel_count < len(eager.names) / 4

    # At mean / std = 1e4; the variance from the running statistics after one step of momentum 1.
    batch = Batch.random((8, CHANNELS, 5, 5), torch.float32, mean=1e4, std=1.0)
    layer = make_layer(CHANNELS, momentum=1.0, **options)
    with torch.no_grad():
        for parameter, value in zip(
            (layer.weight, layer.bias), parameters(CHANNELS, torch.float32), strict=True
        ):
            parameter.copy_(value)
    got = one_step(layer, batch.x, batch.cotangent, None, run=_compiled(layer, "inductor"))
    (expected,) = oracle_steps([batch], {"momentum": 1.0, **options})
    for name in ("running_mean", "running_var"):
        assert_close(got.buffers[name], expected.buffers[name], torch.float32, name)
    # By a mean in float32 y would be off by up to 6e-4.
    assert_close(got.y, expected.y, torch.float32, "y")
    assert_close(got.grad_input, expected.grad_input, torch.float32, "input gradient")
    for name, parameter in got.parameters.items():
        assert_close(parameter, expected.parameters[name], torch.float32, f"gradient of {name}")


def test_compiled_code_says_that_it_is_not_differentiated_twice():
    x = _sample(4).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (dx,) = torch.autograd.grad(
            _compiled(SyncBatchNorm(CHANNELS, dtype=torch.float64))(x).pow(3).sum(),
            x,
            create_graph=True,
        )
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            dx.sum().backward()
