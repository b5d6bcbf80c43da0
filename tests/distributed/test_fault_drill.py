"""One worker goes wrong: every other one ends with an error that names the layer, in time."""

from __future__ import annotations

import contextlib
import io
import re
from collections import deque
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from syncnorm import Lagged, SyncBatchNorm, debug, frozen_statistics, prepare_ddp, undocumented
from syncnorm.comm import exchange, inflight
from syncnorm.errors import ExchangeError, InputError
from syncnorm.family import OnlineNorm
from syncnorm.run.failures import is_peer_loss
from syncnorm.testing import RankPool
from syncnorm.train.setup import Setup
from tests.distributed.drill import Job, errors_of, run

TIMEOUT = 3.0
# Of a machine however busy; where nothing is noticed it is the 60 s of the group, or never.
LATEST = TIMEOUT + 40.0
FORWARD = re.escape("(training forward, moments, 9 float64)")
SKIPPED = r"ranks 0, 2 at call 2 of 'last' \(.*\), rank 1 at call 2 of 'first' \(backward, gradients, 8 float64\)\."
ABSENT = rf"ranks 0, 2 at call 2 of 'first' {FORWARD}, rank 1 not there within 3 s \(last at call 1 of 'first' \(backward"
GONE = rf"got nothing more from rank 1, in call 2 of 'first' {FORWARD}\."
OTHER = rf"ranks 0, 2 at call 2 of 'last' {FORWARD}, rank 1 at call 2 of 'last' \(.* 5 float64\)"

CASES = {
    "skips": SKIPPED,
    "raises": ABSENT,
    "is killed": GONE,
    "sends another C": OTHER,
    "is late": ABSENT,
}


@pytest.mark.parametrize("fault", CASES)
def test_in_debug_mode_all_raise_the_same_and_know_who_is_where(fault, tmp_path):
    reports = run(Job(fault, faulty=1, in_debug=True, timeout_seconds=TIMEOUT, folder=tmp_path))
    raised = {rank: r for rank, r in reports.items() if not (rank == 1 and fault == "raises")}
    assert set(raised) == {0, 1, 2} - ({1} if fault in ("is killed", "raises") else set())
    assert all(r.is_promised and r.seconds < LATEST for r in raised.values()), reports
    assert len({r.text for r in raised.values()}) == 1, "the same words on all"
    assert re.search(CASES[fault], raised[0].text), raised[0].text
    is_loss = fault in ("raises", "is killed", "is late")
    assert is_peer_loss(raised[0].text) == is_loss, (
        "launchers know the loss of a worker from a mistake of all"
    )
    assert {r.again for r in raised.values()} == {raised[0].text}, "and at the next exchange too"


@pytest.mark.parametrize("fault", ["skips", "raises", "is killed", "is late"])
def test_by_default_the_error_names_layer_and_call(fault, tmp_path):
    """A skipped layer with nothing after it.

    Whether gloo can name the cause depends on the rest of the job.
    """
    job = Job(
        "skips all" if fault == "skips" else fault,
        faulty=1,
        in_debug=False,
        timeout_seconds=TIMEOUT,
        folder=tmp_path,
    )
    reports = run(job)
    survivors = {rank: r for rank, r in reports.items() if rank != 1 or fault == "is late"}
    assert set(survivors) == {0, 2} | ({1} if fault == "is late" else set())
    for rank, r in survivors.items():
        assert r.is_promised, r
        assert r.seconds < LATEST, r
        assert is_peer_loss(r.text)
        assert (
            f"got an error on rank {rank} at call 2 of 'first' (training forward, moments, 9 "
            "float64) after" in r.text
        )
    if fault != "is killed":
        # Shortly before the end, what each worker did last: on nccl there would be nothing else.
        for rank in (0, 2):
            said = errors_of(job, rank).read_text()
            assert re.search(
                rf"syncnorm, rank {rank}: call 2 of 'first' {FORWARD} has been under way for", said
            )
            assert re.search(
                rf"s ago: call 2 of 'first' {FORWARD}, under way, ranks \[0, 1, 2\]", said
            )
        said = errors_of(job, 1).read_text()
        assert "syncnorm, rank 1: an exchange of another worker is stuck." in said
        assert re.search(
            r"s ago: call 1 of 'first' \(backward, gradients, 8 float64\), ranks \[0, 1, 2\]\n",
            said,
        )
        assert "call 2 of" not in said


@pytest.mark.parametrize("fault", ["skips", "is killed"])
def test_in_debug_mode_where_a_rank_hosts_the_store(fault, tmp_path):
    """Rank 0 hosts it and leaves at once: those in the exchange have heard by then."""
    reports = run(
        Job(
            fault,
            faulty=1,
            in_debug=True,
            timeout_seconds=TIMEOUT,
            folder=tmp_path,
            store_on_rank_zero=True,
        )
    )
    assert set(reports) == ({0, 2} if fault == "is killed" else {0, 1, 2})
    assert all(r.is_promised and re.search(CASES[fault], r.text) for r in reports.values()), reports


def test_in_debug_mode_where_the_host_of_the_store_is_killed(tmp_path):
    reports = run(
        Job(
            "is killed",
            faulty=0,
            in_debug=True,
            timeout_seconds=TIMEOUT,
            folder=tmp_path,
            store_on_rank_zero=True,
        )
    )
    assert set(reports) == {1, 2}
    for r in reports.values():
        assert r.is_promised
        assert r.seconds < LATEST
        assert (
            "Store of the process group, which cannot be reached at call 2 of 'first' (training "
            "forward" in r.text
        )


def _watched_anew(folder: str) -> list[str]:
    """The watchdog's output when another rank is stuck, in one world and in the next.

    The second output of each is that of a second look.
    """
    watch, rank, said = inflight.Watchdog(), dist.get_rank(), []
    for world in range(2):
        if world:
            dist.destroy_process_group()
            watch._check()  # nobody is there
            dist.init_process_group(
                "gloo", (Path(folder) / "anew").as_uri(), rank=rank, world_size=2
            )
        watch._check()  # nobody is stuck
        dist.barrier()
        if rank == 0:
            undocumented.world_store().set(inflight._STUCK_KEY, "0")
        dist.barrier()
        for _ in range(2):
            screen = io.StringIO()
            with contextlib.redirect_stderr(screen):
                watch._check()
            said.append(screen.getvalue())
    return said


def test_the_watch_goes_on_when_torch_distributed_begins_anew(tmp_path):
    with RankPool(2) as ranks:
        for first, again, anew, again_anew in ranks.run(_watched_anew, str(tmp_path)):
            assert "an exchange of another worker is stuck." in first
            assert "an exchange of another worker is stuck." in anew
            assert again == again_anew == ""


def test_what_a_group_leaves_unfinished_is_not_reported_once_it_is_destroyed(monkeypatch, capsys):
    monkeypatch.setattr(inflight, "_recent", deque())
    dist.init_process_group("fake", store=undocumented.fake_store(), rank=0, world_size=2)
    group, watch = dist.group.WORLD, inflight.Watchdog()
    flight = inflight.InFlight((2, 0), inflight.log_of(group), "all moments", "first", 2)
    flight.began -= 10_000
    watch._check()
    said = capsys.readouterr().err
    assert "call 1 of 'first' (all moments, 2 float64) has been under way for 100" in said
    flight.is_reported = False
    dist.destroy_process_group()
    watch._check()
    assert capsys.readouterr().err == ""


def test_events_are_not_looked_at_while_a_graph_is_captured(monkeypatch):
    """Another thread's look would end the capture. What is no event is watched all the same.

    With a stand-in for a message of CUDA's.
    """
    looks, streams = [], []

    class Event:
        def __init__(self, device: str) -> None:
            assert device == "cuda:1"

        def record(self, stream: str | None) -> None:
            streams.append(stream)

        def query(self) -> bool:
            looks.append(self)
            return False

    monkeypatch.setattr(inflight, "_watchdog", inflight.Watchdog())
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    flights = [inflight.InFlight.__new__(inflight.InFlight) for _ in range(4)]
    before, within, on_host, after = flights
    for flight in flights:
        flight._done, flight.is_finished, flight.work = None, False, None
    on_device = cast(Any, SimpleNamespace(is_cuda=True, device="cuda:1", get_device=lambda: 1))
    for flight, is_capturing in ((before, False), (within, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=is_capturing: c)
        flight.finish(on_device)
    assert [inflight._is_under_way(each) for each in (before, within, on_host)] == [
        False,
        False,
        True,
    ]
    assert not looks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # A process that has not made the message's device the current one.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    after.finish(on_device)
    assert streams == [None, "that of cuda:1"]
    assert inflight._is_under_way(before)
    assert len(looks) == 1


def _state_without_the_other(kind: str) -> tuple[str, str]:
    """Rank 1 does not come to the last step. Rank 0 saves its state, then trains on."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT))
    make = {
        "running": lambda: SyncBatchNorm(4, sync="running", process_group=group),
        "lagged": lambda: SyncBatchNorm(4, sync=Lagged(max_drift=1e9), process_group=group),
        "online": lambda: OnlineNorm(4, process_group=group),
    }
    model = prepare_ddp(torch.nn.Sequential(make[kind]()), group)

    def step() -> None:
        model(torch.randn(5, 4, requires_grad=True)).square().sum().backward()

    for _ in range(3):  # a layer of "lagged" waits in the first two
        step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if dist.get_rank() == 1:
        return "", ""
    step()
    with frozen_statistics(model):
        after = model.state_dict()
    kept = {name for name, value in before.items() if torch.equal(value, after[name])}
    # A checkpoint of the trainer's would be one of another run: it is not written.
    with pytest.raises(ExchangeError, match="must be made by all of ranks"):
        Setup.flush_statistics(cast(Any, SimpleNamespace(layers=list(model))))
    with pytest.raises(ExchangeError) as caught:
        step()
    return ", ".join(sorted(before.keys() - kept)), str(caught.value)


@pytest.mark.parametrize("kind", ["running", "lagged", "online"])
def test_a_state_is_saved_though_another_worker_is_gone(kind):
    """What is late is the only message that it waits for; the next training forward raises."""
    with RankPool(2) as ranks:
        (changed, said), _ = ranks.run(_state_without_the_other, kind)
    # OnlineNorm's follow the worker's own samples first.
    assert (changed == "") == (kind != "online")
    assert "must be made by all of ranks [0, 1], got an error on rank 0" in said


def _agreed(steps: int) -> tuple[int, list[str], int]:
    """Debug mode changes no number, and leaves no more than a few keys behind."""
    torch.manual_seed(dist.get_rank())
    layer, x = SyncBatchNorm(4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    with exchange.record() as record, debug(timeout_seconds=30.0):
        before = undocumented.world_store().num_keys()
        for _ in range(steps):
            layer(x).square().sum().backward()
        after = undocumented.world_store().num_keys()
    state = layer.running_mean.clone()
    layer.reset_running_stats()
    for _ in range(steps):
        layer(x)
    return after - before, [e.kind for e in record], int(torch.equal(state, layer.running_mean))


def test_what_agreeing_leaves_behind(pool):
    for keys, kinds, is_same in pool(2).run(_agreed, 20):
        assert kinds == ["moments", "gradients"] * 20
        assert is_same
        assert keys < 20, "old signatures are forgotten"


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_timeout_is_positive(seconds):
    with pytest.raises(
        InputError, match=rf"`timeout_seconds` must be > 0, got {seconds}\. None waits"
    ):
        debug(timeout_seconds=seconds).__enter__()


def test_it_is_an_error_of_torch_distributed_to_those_who_catch_that():
    assert issubclass(ExchangeError, RuntimeError)
