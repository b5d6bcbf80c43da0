"""join: workers with unequally many batches train as one process does on what they hold together in
each step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    SyncBatchNorm,
    accumulate,
    debug,
    gather,
    join,
    monitor,
    prepare_ddp,
    reference,
    scale_loss,
    undocumented,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.model.parts import batches_of, selective_contexts, uneven_batch, union_of


@dataclass
class Trained:
    """What training on some shards gave."""

    outputs: list[Tensor]
    gradients: list[list[Tensor]]
    state: dict[str, Tensor]
    kinds: list[str]


def _network(norm: type[nn.Module], **options) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [
        nn.Conv1d(4, 5, 1),
        norm(5, **options),
        nn.ReLU(),
        nn.Conv1d(5, 3, 3),
        norm(3, **options),
    ]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(9, 2)).double()


def _loss(y: Tensor) -> Tensor:
    """The mean over samples of something that depends on each."""
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)
    return (y - target).square().sum(1).mean()


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], is_scaled: bool
) -> tuple[list[Tensor], list[list[Tensor]]]:
    outputs, gradients = [], []
    for x in batches:
        optimizer.zero_grad()
        y = model(x)
        loss = _loss(y)
        (scale_loss(loss, len(x)) if is_scaled else loss).backward()
        outputs.append(y.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return outputs, gradients


def _momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2)


def _on_worker(
    counts: list[int],
    ddp: dict | None = None,
    is_debugging: bool = False,
    is_scaled: bool = True,
) -> Trained:
    rank = dist.get_rank()
    model = prepare_ddp(_network(SyncBatchNorm))
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    with (
        exchange.record() as record,
        debug(is_debugging, timeout_seconds=20.0 if is_debugging else None),
    ):
        with join(wrapped):
            outputs, gradients = _train(
                wrapped, _momentum(model), batches_of(rank, counts[rank]), is_scaled
            )
    return Trained(
        outputs,
        gradients,
        {k: v.clone() for k, v in model.state_dict().items()},
        [e.kind for e in record],
    )


def _on_one(counts: list[int]) -> Trained:
    """torch's own layer, on the union of what the workers have in each step."""
    model = _network(nn.BatchNorm1d)
    return Trained(
        *_train(model, _momentum(model), union_of(counts), False), dict(model.state_dict()), []
    )


def _compare(got: list[Trained], whole: Trained, counts: list[int]) -> None:
    for rank, each in enumerate(got):
        for step in range(counts[rank]):
            before = sum(
                len(batches_of(r, counts[r])[step]) for r in range(rank) if step < counts[r]
            )
            mine = whole.outputs[step][before : before + len(each.outputs[step])]
            assert_close(
                each.outputs[step], mine, torch.float64, f"output, rank {rank}, step {step}"
            )
            for ours, expected in zip(each.gradients[step], whole.gradients[step], strict=True):
                assert_close(
                    ours, expected, torch.float64, f"gradient, rank {rank}, step {step}", factor=10
                )
        for name, expected in whole.state.items():
            assert_close(
                each.state[name], expected, torch.float64, f"{name}, rank {rank}", factor=10
            )


COUNTS = [[3, 5], [5, 3, 4], [0, 3], [2, 0, 4], [0, 0, 3], [2, 2], [0, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_one_process_on_what_the_workers_hold_together(pool, counts):
    got = pool(len(counts)).run(_on_worker, counts)
    if any(counts):
        _compare(got, _on_one(counts), counts)
    for each in got:
        assert all(torch.equal(v, got[0].state[k]) for k, v in each.state.items()), "the same bits"


@pytest.mark.parametrize(
    "ddp", [{"broadcast_buffers": False}, {"find_unused_parameters": True}], ids=str
)
def test_with_other_settings_of_ddp(pool, ddp):
    counts = [1, 4, 2]
    _compare(pool(3).run(_on_worker, counts, ddp), _on_one(counts), counts)


def test_in_debug_mode(pool):
    counts = [3, 1]
    _compare(pool(2).run(_on_worker, counts, {}, True), _on_one(counts), counts)


def _with_checkpoints(is_selective: bool) -> list[Tensor]:
    """What training leaves where the forwards are checkpointed, of a model without DDP."""
    model = prepare_ddp(_network(SyncBatchNorm))
    options = {"context_fn": selective_contexts} if is_selective else {}
    rank, seen = dist.get_rank(), []
    with join(model):
        for x in batches_of(rank, 2 + rank):
            y = checkpoint(model, x, use_reentrant=False, **options)
            assert isinstance(y, Tensor)
            _loss(y).backward()
            seen.append(y.detach())
    return [*seen, *(p.grad for p in model.parameters()), *model.state_dict().values()]


def test_selective_checkpoints_see_no_exchange(pool):
    plain = pool(2).run(_with_checkpoints, False)
    for got, expected in zip(pool(2).run(_with_checkpoints, True), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_without_scaled_loss_it_differs(pool):
    """The negative control: the comparison can tell, and `scale_loss` is what makes it exact."""
    counts = [1, 4, 2]
    with pytest.raises(AssertionError, match="gradient, rank"):
        _compare(pool(3).run(_on_worker, counts, {}, False, False), _on_one(counts), counts)


def _epochs(counts: list[int], make: str, is_handed: bool) -> dict[str, Tensor]:
    """Two passes over the data, with an optimizer that remembers."""
    rank = dist.get_rank()
    model = prepare_ddp(_network(SyncBatchNorm))
    wrapped, optimizer = DistributedDataParallel(model), globals()[make](model)
    for _ in range(2):
        with join(wrapped, *([optimizer] if is_handed else [])):
            _train(wrapped, optimizer, batches_of(rank, counts[rank]), True)
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("counts", [[4, 2], [2, 0, 3]], ids=str)
@pytest.mark.parametrize("make", ["_momentum", "_adam"])
def test_several_epochs_with_an_optimizer_that_remembers(pool, counts, make):
    whole = _network(nn.BatchNorm1d)
    optimizer = globals()[make](whole)
    for _ in range(2):
        _train(whole, optimizer, union_of(counts), False)
    for state in pool(len(counts)).run(_epochs, counts, make, True):
        for name, expected in whole.state_dict().items():
            assert_close(state[name], expected, torch.float64, name, factor=100)


def test_without_the_optimizer_the_workers_drift_apart(pool):
    """The negative control: in the second pass the worker that had left lacks the momentum of what
    it missed.
    """
    first, second = pool(2).run(_epochs, [4, 2], "_momentum", False)
    expected = pool(2).run(_epochs, [4, 2], "_momentum", True)[0]
    assert torch.equal(first["0.weight"], second["0.weight"]), "handed over at the end of the block"
    assert not torch.equal(first["0.weight"], expected["0.weight"])


def test_headers_are_sent_only_once_somebody_has_left(pool):
    kinds = pool(2).run(_on_worker, [2, 2])[0].kinds
    step = ["join", "moments", "moments", "count", "gradients", "gradients"]
    assert kinds == [*step, *step, "join", "join", "join"], (
        "a count of presence for each step and one at the end; the handover"
    )
    alone = pool(2).run(_on_worker, [2, 1])[0].kinds
    headed = ["join", *(kind for each in step[1:] for kind in ("join", each))]
    assert alone == [*step, *headed, "join", "join", "join", "join"]


def _running(counts: list[int]) -> dict[str, Tensor]:
    """sync="running", in which outputs are local and running statistics pooled."""
    model = prepare_ddp(
        nn.Sequential(SyncBatchNorm(4, sync="running"), nn.Conv1d(4, 2, 1)).double()
    )
    wrapped = DistributedDataParallel(model)
    rank = dist.get_rank()
    with join(wrapped):
        for x in batches_of(rank, counts[rank]):
            wrapped(x).square().mean().backward()
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("counts", [[2, 4], [0, 3, 1]], ids=str)
def test_running_statistics_that_are_pooled_later(pool, counts):
    shards = [batches_of(rank, count) for rank, count in enumerate(counts)]
    running = reference.RunningStatistics.initial(4)
    for step in range(max(counts)):
        reference.batch_norm(torch.cat([s[step] for s in shards if step < len(s)]), running=running)
    for state in pool(len(counts)).run(_running, counts):
        assert_close(state["0.running_mean"], running.mean, torch.float64, "running_mean")
        assert_close(state["0.running_var"], running.var, torch.float64, "running_var")
        assert int(state["0.num_batches_tracked"]) == max(counts)


def _with_readings(counts: list[int]) -> list[float]:
    """Exchanges besides those of the layers are answered too; and training goes on after the block."""
    rank = dist.get_rank()
    layer = SyncBatchNorm(4, dtype=torch.float64)
    model = prepare_ddp(nn.Sequential(layer))
    watch, shares = monitor(model), []
    with join(model):
        for x in batches_of(rank, counts[rank]):
            model(x)
            shares.append(watch.read()["layers"]["0"]["count"])
    model(uneven_batch(3, rank))
    return [*shares, int(layer.num_batches_tracked)]


def test_other_exchanges_are_answered_and_training_goes_on(pool):
    counts = [1, 3]
    sizes = [[5 * len(x) for x in batches_of(rank, count)] for rank, count in enumerate(counts)]
    first, second = pool(2).run(_with_readings, counts)
    assert first == [sizes[0][0] + sizes[1][0], 4]
    assert second == [sizes[0][0] + sizes[1][0], sizes[1][1], sizes[1][2], 4]


def _gathering(counts: list[int]) -> list[int]:
    rank = dist.get_rank()
    model = DistributedDataParallel(prepare_ddp(_network(SyncBatchNorm)))
    sizes = []
    with join(model, _momentum(model)):
        for x in batches_of(rank, counts[rank]):
            y = model(x).flatten(1)
            everybodys = gather(y)
            (y @ everybodys.T).square().mean().backward()
            sizes.append(len(everybodys))
    return sizes


@pytest.mark.filterwarnings("ignore::syncnorm.errors.UnevenShardsWarning")
@pytest.mark.parametrize("counts", [[1, 3], [0, 2]])
def test_a_gathering_gets_no_rows_of_who_has_left(pool, counts):
    lengths = [[len(x) for x in batches_of(rank, count)] for rank, count in enumerate(counts)]
    steps = [sum(each[n] for each in lengths if n < len(each)) for n in range(max(counts))]
    assert pool(2).run(_gathering, counts) == [steps[: counts[0]], steps]


def _refused(kind: str) -> str:
    group = dist.new_group([0, 1]) if kind == "group" else None
    lone = dist.new_subgroups(1)[0] if kind == "lone" else None
    layer = SyncBatchNorm(
        4, sync="lagged" if kind == "lagged" else "batch", process_group=lone or group
    )
    model = prepare_ddp(nn.Sequential(layer))
    if "ddp" in kind:
        model = DistributedDataParallel(model)
    if kind == "fsdp1":
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 4), model), device_id=torch.device("cpu")
        )
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if "running" in kind:
        model = prepare_ddp(nn.Sequential(SyncBatchNorm(4, sync="running")))
    blocks, other = contextlib.ExitStack(), model
    if "sharing" in kind:  # another model with the same layer
        other = prepare_ddp(nn.Sequential(nn.Identity(), model[0]))
    if "within" in kind:
        blocks.enter_context({"join": join, "accumulate": accumulate}[kind.split()[-1]](other))
    try:
        # No machine of the tests has NCCL: gloo under its name.
        with pytest.MonkeyPatch.context() as patch:
            if "nccl" in kind:
                patch.setattr(undocumented, "backend_for", lambda group, device: "nccl")
            with blocks, accumulate(model) if "accumulate within" in kind else join(model):
                return "accepted"
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("group", "accepted"),
        ("ddp", "accepted"),
        ("nccl", "accepted"),
        (
            "ddp nccl",
            "`model` must not exchange gradients by NCCL where workers may run out of data, got "
            "DistributedDataParallel on cpu. ",
        ),
        ("fsdp1", "`model` must not be sharded where workers may run out of data, got one of FSDP"),
        ("fsdp2", "`model` must not be sharded where workers may run out of data, got one of FSDP"),
        (
            "lagged",
            '`sync` must be "batch", "running" or "none" where workers may run out of data, got '
            "\"lagged\" in '0'",
        ),
        ("join within join", "`model` must not be in a `join` already"),
        ("sharing join within join", "accepted"),
        ("join within accumulate", "`model` must not be accumulating where workers may run out"),
        ("running join within accumulate", "`model` must not be accumulating where workers may"),
        ("accumulate within join", "accepted"),
        (
            "running accumulate within join",
            '`model` must have sync="batch" or "none" for accumulate within `join`, got "running"',
        ),
        (
            "lone",
            "`process_group` must be that of the model in all layers where workers may run out of "
            "data, got ranks",
        ),
    ],
)
def test_what_is_refused(pool, kind, said):
    for answer in pool(2).run(_refused, kind):
        assert answer.startswith(said)


def test_join_alone_does_nothing():
    model = nn.Sequential(SyncBatchNorm(4))
    with join(model), exchange.record() as record:
        model(torch.randn(3, 4))
    assert not record
