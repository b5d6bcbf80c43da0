"""sync="running": one hidden exchange per training forward; buffers are those of the pooled data."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, accumulate, debug, prepare_ddp, reference
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.testing import assert_close, shard

KINDS = {
    "norm": lambda channels: SyncBatchNorm(channels, sync="running", dtype=torch.float64),
    "renorm": lambda channels: SyncBatchRenorm(
        channels, schedule=RenormSchedule.constant(2.0, 1.0), sync="running", dtype=torch.float64
    ),
}


def _batch(size: int, seed: int, channels: int = 4) -> Tensor:
    """Samples that differ in mean, so that shards are not alike."""
    g = torch.Generator().manual_seed(seed)
    offset = torch.linspace(-3, 3, max(size, 1), dtype=torch.float64)[:size].view(-1, 1, 1)
    return torch.randn(size, channels, 5, generator=g, dtype=torch.float64) + offset


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _train(kind: str, batches: list[Tensor], sizes: tuple[int, ...], layers: int) -> tuple[dict, list]:
    rank = dist.get_rank()
    model = nn.Sequential(*(KINDS[kind](4) for _ in range(layers)))
    wrapped = DistributedDataParallel(prepare_ddp(model))
    with exchange.record() as record:
        for batch in batches:
            wrapped(batch.split(list(sizes))[rank]).square().mean().nan_to_num().backward()
    return _state(model), [(e.kind, e.numel) for e in record]


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("sizes", [(6, 2), (5, 1, 2), (8, 0)], ids=str)
def test_one_exchange_per_training_forward_however_many_layers(pool, sizes, layers):
    batches = [_batch(8, seed) for seed in range(3)]
    for _, exchanges in pool(len(sizes)).run(_train, "norm", batches, sizes, layers):
        assert exchanges == [("all moments", layers * 9 + len(sizes))] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(6, 2), (5, 1, 2), (0, 8)], ids=str)
def test_buffers_are_the_total_variance_and_equal_to_the_bit(pool, sizes, kind):
    """Total variance: within plus between workers. The mean of local variances would be far off here."""
    batches = [_batch(8, seed) for seed in range(3)]
    running = reference.RunningStatistics.initial(4)
    for batch in batches:
        if kind == "norm":
            reference.batch_norm(batch, running=running)
        else:
            reference.batch_renorm(batch, running=running, r_max=2.0, d_max=1.0)
    answers = [state for state, _ in pool(len(sizes)).run(_train, kind, batches, sizes, 1)]
    for state in answers:
        assert all(torch.equal(state[k], v) for k, v in answers[0].items())
        assert_close(state["0.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["0.running_var"], running.var, torch.float64, "running_var")
        assert int(state["0.num_batches_tracked"]) == 3
    local = torch.stack([b.split(list(sizes))[0].var((0, 2)) for b in batches if sizes[0]]) if sizes[0] else None
    if local is not None and kind == "norm":
        assert (local.mean(0) < 0.9 * batches[0].var((0, 2))).all(), "the shards must differ for this to say anything"


def test_the_forward_is_that_of_the_local_layer(pool):
    batch = _batch(8, 0)
    for rank, y in enumerate(pool(2).run(_forward, shard(batch, (6, 2)))):
        assert_close(y, reference.batch_norm(batch.split([6, 2])[rank]), torch.float64, "y")


def _forward(shards: list[Tensor]) -> Tensor:
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    return model(shards[dist.get_rank()]).detach()


def _staleness() -> list[list[float]]:
    """The running mean as seen in the buffer and then in a state dict, after each of three forwards."""
    layer = KINDS["norm"](1)
    model = prepare_ddp(nn.Sequential(layer))
    seen = []
    for step in range(3):
        model(_batch(4, step, 1) + dist.get_rank())
        seen.append([layer.running_mean.item()])
    seen[-1].append(model.state_dict()["0.running_mean"].item())
    return seen


def test_the_buffers_lack_exactly_one_forward(pool):
    running = reference.RunningStatistics.initial(1)
    expected = [0.0]
    for step in range(3):
        batch = _batch(4, step, 1)
        reference.batch_norm(torch.cat([batch, batch + 1]), running=running)
        expected.append(running.mean.item())
    for seen in pool(2).run(_staleness):
        assert [s[0] for s in seen] == pytest.approx(expected[:3], rel=1e-12)
        assert seen[-1][1] == pytest.approx(expected[3], rel=1e-12)


def _patterns(name: str) -> tuple[dict, int]:
    """One way of training with three micro-batches; the state and the number of exchanges."""
    rank = dist.get_rank()
    x = [_batch(5, 10 * seed + rank) for seed in range(3)]
    layer = KINDS["renorm"](4)
    model = prepare_ddp(nn.Sequential(layer))
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with exchange.record() as record:
        if name == "plain" or name == "gradient accumulation":
            for each in x:
                (model(each) * weight).mean().backward()
        elif name == "forwards first":
            sum((model(each) * weight).mean() for each in x).backward()
        elif name == "without backward":
            for each in x:
                model(each)
        elif name == "checkpoint":
            for each in x:
                leaf = each.clone().requires_grad_()
                (checkpoint(model, leaf, use_reentrant=False) * weight).mean().backward()
        elif name == "reentrant checkpoint":
            for each in x:
                leaf = each.clone().requires_grad_()
                (checkpoint(model, leaf, use_reentrant=True) * weight).mean().backward()
        elif name == "evaluation between, on one worker":
            for each in x:
                (model(each) * weight).mean().backward()
                if rank == 0:
                    model.eval()(each)
                    model.train()
    state = _state(model)
    state["grad"] = layer.weight.grad.clone() if layer.weight.grad is not None else torch.zeros(())
    return state, len(record)


@pytest.mark.parametrize(
    "name",
    [
        "gradient accumulation",
        "forwards first",
        "without backward",
        "checkpoint",
        "reentrant checkpoint",
        "evaluation between, on one worker",
    ],
)
def test_every_pattern_gives_the_plain_ones_buffers(pool, name):
    plain = pool(2).run(_patterns, "plain")
    for (state, exchanges), (expected, _) in zip(pool(2).run(_patterns, name), plain, strict=True):
        assert exchanges == 3
        for key, value in expected.items():
            if key != "grad" or name != "without backward":
                torch.testing.assert_close(state[key], value, rtol=1e-13, atol=1e-14, msg=lambda m, k=key: f"{k} {m}")


def _used_twice() -> Tensor:
    layer = KINDS["norm"](4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a) + self.layer(b)

    model = prepare_ddp(Twice())
    rank = dist.get_rank()
    model(_batch(3, rank), _batch(3, 10 + rank))
    state = model.state_dict()
    count = state["layer.num_batches_tracked"].view(1)
    return torch.cat([state["layer.running_mean"], state["layer.running_var"], count])


def test_a_layer_used_twice_gets_one_merged_update(pool):
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(torch.cat([_batch(3, s) for s in (0, 1, 10, 11)]), running=running)
    for got in pool(2).run(_used_twice):
        assert_close(got, torch.cat([running.mean, running.var, torch.ones(1).double()]), torch.float64, "buffers")


def _called_by_parts() -> str:
    model = nn.Sequential(nn.Sequential(KINDS["norm"](4)), nn.Identity())
    prepare_ddp(model)
    try:
        model[0](_batch(3, 0))
        return "no error"
    except InputError as error:
        return str(error)


def test_a_model_called_by_its_parts_is_noticed(pool):
    answers = pool(2).run(_called_by_parts)
    assert answers == [answers[0]] * 2
    assert "got a direct call of layer '0.0'. Call the model itself" in answers[0]


def _bad_mask(bad_rank: int) -> list[str]:
    layer = KINDS["norm"](4)
    model = prepare_ddp(_Masked(layer))
    messages = []
    for step in range(2):
        mask = torch.ones(3, 1, 5)
        if step == 0 and dist.get_rank() == bad_rank:
            mask[1] = torch.nan
        try:
            y = model(_batch(3, step), mask)
            y.square().mean().backward()
            messages.append(f"fine {bool(y.isfinite().all() and layer.weight.grad.isfinite().all())}")
        except FaultError as error:
            messages.append(str(error))
    model(_batch(3, 5), None)
    return [*messages, str(int(model.state_dict()["layer.num_batches_tracked"]))]


class _Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x, mask)


def test_a_bad_mask_is_raised_by_all_when_the_message_has_arrived(pool):
    answers = pool(3).run(_bad_mask, 1)
    assert answers == [answers[0]] * 3
    first, second, updates = answers[0]
    assert first == "fine True"
    assert "got others on rank 1 in layer 'layer', in the last training forward. They counted as 0." in second
    assert updates == "1", "the faulty forward leaves no trace, and work goes on"


def test_a_copy_has_the_update_that_was_under_way():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    model(_batch(6, 0))
    other = copy.deepcopy(model)
    assert int(other[0].num_batches_tracked) == 0
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    other(_batch(6, 1))
    assert int(other.state_dict()["0.num_batches_tracked"]) == 2
    assert int(model.state_dict()["0.num_batches_tracked"]) == 1


def test_loading_drops_what_was_under_way():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    start = _state(model)
    model(_batch(6, 0))
    model.load_state_dict(start)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_a_forward_that_raises_leaves_no_trace():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4), nn.Linear(7, 2)))
    with pytest.raises(RuntimeError):
        model(_batch(6, 0))
    model[1] = nn.Identity()
    model(_batch(6, 1))
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(_batch(6, 1), running=running)
    assert_close(model.state_dict()["0.running_mean"], running.mean, torch.float64, "running_mean")


def _accumulated(sync: str, rounds: int) -> tuple[dict, list[str]]:
    """Micro-batches of one global batch, cut by rank and round."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = SyncBatchRenorm(4, schedule=RenormSchedule.constant(2.0, 1.0), sync=sync, dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer))
    pieces = _batch(12, 3).tensor_split(rounds * world)
    with exchange.record() as record:
        with accumulate(model):
            before = layer.running_mean.clone()
            for i in range(rounds):
                model(pieces[i * world + rank]).square().mean().backward()
                assert torch.equal(layer.running_mean, before)
        kinds = [e.kind for e in record]
    return _state(model), kinds


@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_accumulate_gives_one_exact_update(pool, rounds, sync):
    running = reference.RunningStatistics.initial(4)
    reference.batch_renorm(_batch(12, 3), running=running, r_max=2.0, d_max=1.0)
    for state, kinds in pool(2).run(_accumulated, sync, rounds):
        assert_close(state["0.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["0.running_var"], running.var, torch.float64, "running_var")
        assert int(state["0.num_batches_tracked"]) == 1
        assert kinds.count("all moments") == (0 if sync == "batch" else 1)


def test_accumulate_alone_and_when_it_fails():
    layer = SyncBatchNorm(4, dtype=torch.float64)
    with accumulate(layer):
        for piece in _batch(8, 0).split([5, 3]):
            layer(piece)
    running = reference.RunningStatistics.initial(4)
    reference.batch_norm(_batch(8, 0), running=running)
    assert_close(layer.running_var, running.var, torch.float64, "running_var")
    state = _state(layer)
    with pytest.raises(RuntimeError, match="7 channels"), accumulate(layer):
        _one_good_one_bad(layer)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    with accumulate(layer), pytest.raises(InputError, match="must not be accumulating already"):
        accumulate(layer).__enter__()


def _one_good_one_bad(layer: nn.Module) -> None:
    layer(_batch(5, 1))
    raise RuntimeError("7 channels")


def _checkpointed(reentrant: bool | None, make: str) -> list[Tensor]:
    """Gradients and buffers of a pooled layer, with and without activation checkpointing."""
    layer = {
        "norm": lambda: SyncBatchNorm(4, dtype=torch.float64),
        "renorm": lambda: SyncBatchRenorm(4, schedule=RenormSchedule.constant(1.5, 0.5), dtype=torch.float64),
    }[make]()
    for step in range(3):
        x = _batch(4, step + 10 * dist.get_rank()).requires_grad_()
        y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        cotangent = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        y.backward(cotangent)
    return [x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]


@pytest.mark.parametrize("make", ["norm", "renorm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_updates_once_and_changes_no_bit(pool, reentrant, make):
    """Also the test of the undocumented torch function that says whether a forward is being repeated."""
    plain = pool(2).run(_checkpointed, None, make)
    for got, expected in zip(pool(2).run(_checkpointed, reentrant, make), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _raise_then_evaluate(sync: str) -> tuple[list[str], Tensor]:
    """A forward that raises everywhere, an evaluation on one worker, then training as if nothing had been."""
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(4, sync=sync, dtype=torch.float64), _RaisesOnce()))
    rank = dist.get_rank()
    with exchange.record() as record:
        with contextlib.suppress(RuntimeError):
            model(_batch(6, 100 + rank) + 1000)
        if rank == 0:
            model.eval()(_batch(6, 0))
            model.train()
        for step in range(2):
            model(_batch(6, 10 * step + rank)).square().mean().backward()
    return [e.kind for e in record], model.state_dict()["0.running_mean"]


class _RaisesOnce(nn.Module):
    has_raised = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_raised:
            self.has_raised = True
            raise RuntimeError("once")
        return x


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_forward_that_raised_sends_nothing_later(pool, sync):
    running = reference.RunningStatistics.initial(4)
    for step in range(2):
        reference.batch_norm(torch.cat([_batch(6, 10 * step), _batch(6, 10 * step + 1)]), running=running)
    answers = pool(2).run(_raise_then_evaluate, sync)
    assert answers[0][0] == answers[1][0]
    for _, mean in answers:
        assert_close(mean, running.mean, torch.float64, "running_mean")


def _forwards_before_backwards(make: str, is_checkpointed: bool) -> list[Tensor]:
    """Several forwards, then one backward pass: a repeated forward must see what the first one saw."""
    torch.manual_seed(0)
    bounds = RenormSchedule.constant(1.5, 0.5)
    layer = {
        "renorm": lambda: SyncBatchRenorm(4, schedule=bounds, dtype=torch.float64),
        "lagged": lambda: SyncBatchNorm(4, sync="lagged", dtype=torch.float64),
        "lagged renorm": lambda: SyncBatchRenorm(4, schedule=bounds, sync="lagged", dtype=torch.float64),
    }[make]()
    model = prepare_ddp(nn.Sequential(layer))
    for step in range(2):
        xs = [_batch(4, 10 * step + 3 * dist.get_rank() + i).requires_grad_() for i in range(3)]
        ys = [checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x) for x in xs]
        if dist.get_rank() == 0:
            model.state_dict()
        sum((y * torch.linspace(-1, 2, y.numel()).view_as(y).sin()).mean() for y in ys).backward()
    return [*(x.grad for x in xs), layer.weight.grad, layer.bias.grad, *model.state_dict().values()]


@pytest.mark.parametrize("make", ["renorm", "lagged", "lagged renorm"])
def test_checkpointing_with_several_forwards_before_the_backward_pass(pool, make):
    plain = pool(2).run(_forwards_before_backwards, make, False)
    for got, expected in zip(pool(2).run(_forwards_before_backwards, make, True), plain, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def _saved_after_a_bad_mask() -> list[str]:
    """The worker that looks first must not raise alone, nor get out of step."""
    layer = KINDS["norm"](4)
    model = prepare_ddp(_Masked(layer))
    mask = torch.ones(3, 1, 5)
    mask[0] = -1.0 if dist.get_rank() == 1 else 1.0
    model(_batch(3, 0), mask)
    if dist.get_rank() == 0:
        model.state_dict()
    messages = []
    for _ in range(2):
        try:
            model(_batch(3, 1), None)
            messages.append("fine")
        except FaultError as error:
            messages.append(str(error))
    return messages


def test_who_looks_first_does_not_raise_alone(pool):
    answers = pool(2).run(_saved_after_a_bad_mask)
    assert answers[0] == answers[1]
    assert "on rank 1 in layer 'layer'" in answers[0][0]
    assert answers[0][1] == "fine"


def _nan_in_debug_mode(sync: str) -> str:
    x = _batch(3, 0)
    if dist.get_rank() == 1:
        x[1, 2] = torch.nan
    model = prepare_ddp(nn.Sequential(nn.Identity(), SyncBatchNorm(4, sync=sync, dtype=torch.float64)))
    try:
        with debug():
            model(x)
            model(x)
        return "no error"
    except FaultError as error:
        return str(error)


@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
def test_debug_mode_names_layer_and_rank_of_a_nan(pool, sync):
    answers = pool(2).run(_nan_in_debug_mode, sync)
    assert answers[0] == answers[1]
    assert answers[0].startswith("`x` must be finite (debug mode), got NaN or infinity on rank")
    assert "1" in answers[0].split(" in ")[0]
    assert "layer '1'" in answers[0] or "in 1." in answers[0]


def _nan_by_default() -> bool:
    x = torch.full((3, 4), torch.nan if dist.get_rank() == 1 else 1.0)
    layer = SyncBatchNorm(4)
    return bool(layer(x).isnan().all() and layer.running_mean.isnan().all())


def test_a_nan_propagates_to_all_workers_by_default(pool):
    assert pool(2).run(_nan_by_default) == [True, True]


def test_the_momentum_is_that_of_the_forward():
    """swa_utils.update_bn changes it for its forwards and puts it back before the last update is applied."""
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(1, sync="running", momentum=0.9)))
    batches = [torch.full((4, 1), v) for v in (3.0, 6.0)]
    torch.optim.swa_utils.update_bn(batches, model)
    assert model.state_dict()["0.running_mean"].item() == pytest.approx(4.5)


def test_reset_move_and_evaluation_mode_find_nothing_under_way():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4)))
    model(_batch(6, 0))
    model[0].reset_running_stats()
    assert int(model.state_dict()["0.num_batches_tracked"]) == 0
    model(_batch(6, 0))
    model.eval()
    assert int(model[0].num_batches_tracked) == 1
    model.train()(_batch(6, 0))
    model.float()
    assert int(model[0].num_batches_tracked) == 2


def test_prepared_twice_updates_once():
    model = nn.Sequential(KINDS["norm"](4))
    prepare_ddp(model)(_batch(6, 0))
    prepare_ddp(model)(_batch(6, 0))
    assert int(model.state_dict()["0.num_batches_tracked"]) == 2


def test_statistics_that_are_not_tracked_stay():
    layer = SyncBatchNorm(3)
    layer.track_running_stats = False
    layer(torch.randn(5, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def _checkpointed_steps(make: str, is_checkpointed: bool, batches: list[list[int]]) -> list[Tensor]:
    """Gradients of several steps; a rank's batches are named by seed, and -1 is an empty one."""
    torch.manual_seed(0)
    bounds = RenormSchedule.constant(1.5, 0.5)
    layer = {
        "renorm": lambda: SyncBatchRenorm(4, schedule=bounds, dtype=torch.float64),
        "lagged": lambda: SyncBatchNorm(4, sync="lagged", dtype=torch.float64),
    }[make]()
    model = prepare_ddp(nn.Sequential(layer))
    gradients = []
    for step, seed in enumerate(batches[dist.get_rank()]):
        x = (_batch(4, seed) if seed >= 0 else torch.empty(0, 4, 5).double()).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        y.backward(_batch(len(x), 50 + step))
        gradients += [x.grad.clone(), layer.weight.grad.clone()]
    return gradients


@pytest.mark.parametrize("make", ["renorm", "lagged"])
@pytest.mark.parametrize(
    "batches", [[[0, 1, 2, 3], [-1, -1, -1, -1]], [[0, 1, 2, 3], [9, 9, 9, 9]], [[5, 6, 5, 6], [7, 7, 7, 7]]], ids=str
)
def test_checkpointing_with_batches_that_come_again(pool, make, batches):
    """Of the calls with the same sums the newest is repeated; an older one would ask for messages of its own."""
    plain = pool(2).run(_checkpointed_steps, make, False, batches)
    for got, expected in zip(pool(2).run(_checkpointed_steps, make, True, batches), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_checkpointing_more_calls_than_are_remembered_is_an_error():
    layer = SyncBatchRenorm(4, dtype=torch.float64)
    ys = [checkpoint(layer, _batch(3, i).requires_grad_(), use_reentrant=False) for i in range(70)]
    with pytest.raises(InputError, match="must repeat one of the last 64 training forwards of a layer"):
        torch.stack(ys).square().mean().backward()


def _swapped_on_one_worker() -> list[str]:
    """A fault, and one worker that loads a state in between: all are to raise all the same."""
    layer = KINDS["norm"](4)
    model = prepare_ddp(_Masked(layer))
    mask = torch.ones(3, 1, 5)
    mask[0] = -1.0 if dist.get_rank() == 1 else 1.0
    model(_batch(3, 0), mask)
    if dist.get_rank() == 0:
        model.load_state_dict(model.state_dict())
        layer.reset_running_stats()
    messages = []
    for _ in range(2):
        try:
            model(_batch(3, 1), None)
            messages.append("fine")
        except FaultError:
            messages.append("fault")
    return messages


def test_a_fault_survives_a_load_on_one_worker(pool):
    assert pool(2).run(_swapped_on_one_worker) == [["fault", "fine"]] * 2


def _trained(sync: str) -> bytes:
    torch.manual_seed(dist.get_rank())
    model = prepare_ddp(nn.Sequential(SyncBatchNorm(3, sync=sync)))
    model(torch.randn(5, 3)).square().mean().backward()
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_a_pickled_model_settles_where_there_is_no_group(pool, sync):
    first, second = (
        torch.load(io.BytesIO(data), weights_only=False).eval()  # our own ranks made them
        for data in pool(2).run(_trained, sync)
    )
    assert int(first[0].num_batches_tracked) == 1
    assert torch.equal(first[0].running_mean, second[0].running_mean)


def test_a_direct_call_after_a_forward_that_raised_is_noticed():
    model = prepare_ddp(nn.Sequential(KINDS["norm"](4), _RaisesOnce()))
    with pytest.raises(RuntimeError, match="once"):
        model(_batch(6, 0))
    with pytest.raises(InputError, match="got a direct call of layer '0'"):
        model[0](_batch(6, 0))
    try:
        raise KeyError
    except KeyError:
        # A forward that succeeds while somebody handles an exception counts.
        model(_batch(6, 0))
    assert int(model.state_dict()["0.num_batches_tracked"]) == 1


def test_a_copy_made_while_accumulating_is_free():
    for sync in ("batch", "running"):
        model = prepare_ddp(nn.Sequential(SyncBatchNorm(4, sync=sync, dtype=torch.float64)))
        with accumulate(model):
            model(_batch(6, 0))
            other = copy.deepcopy(model)
        for seed in range(2):
            other(_batch(6, seed))
        assert int(other.state_dict()["0.num_batches_tracked"]) == 2


def test_a_mask_of_many_dimensions_is_no_less_an_error():
    x = torch.randn(2, 3, *[1] * 8)
    with pytest.raises(FaultError, match="got -1"):
        SyncBatchNorm(3)(x, torch.full((2, 1, *[1] * 8), -1.0))
