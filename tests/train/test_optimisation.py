"""Keys of `train` beside the optimizer: groups, rates, float16, recomputation, layouts, averages."""

from __future__ import annotations

import copy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import invariance
from benchmarks.invariance import FLOAT64_BOUND, Job
from syncnorm import recalibrate
from syncnorm.errors import ConfigError
from syncnorm.train import optim, scaling
from syncnorm.train.config.file import load_config
from syncnorm.train.config.train import TrainSection
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.feed import TRAIN, MemoryFeed
from syncnorm.train.efficiency import make_efficient, set_tf32
from syncnorm.train.models import MODELS
from syncnorm.train.parameters import parameter_groups
from syncnorm.train.renewal import renew_statistics
from syncnorm.train.setup import Setup
from syncnorm.train.step import StepResult, training_step
from syncnorm.train.workers import Workers
from tests.train import runs
from tests.train.test_loop import THIN
from tests.train.test_options import needed

MODEL = MODELS["digits_resnet"]
DECAY = {"name": "SGD", "weight_decay": 0.5}


def section(**keys) -> TrainSection:
    return TrainSection(epochs=1, global_batch=4, lr=1.0, **keys)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm([2, 3]), nn.Linear(3, 1))


def named_groups(model: nn.Module, train: TrainSection) -> list[tuple[set[str], float, float]]:
    """Of each group the names, the decay and the rate that it has been given."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optim.make_optimizer(
        train.optimizer.name, parameter_groups(model, train), train.lr, train.optimizer.options
    )
    return [
        ({names[p] for p in group["params"]}, group.get("weight_decay", 0), group.get("rate", 1))
        for group in optimizer.param_groups
    ]


def test_biases_and_norms_do_not_decay():
    weights, rest = {"0.weight", "2.weight"}, {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert named_groups(network(), section(optimizer=DECAY)) == [(weights, 0.5, 1), (rest, 0, 1)]
    whole = [(weights | rest, 0.5, 1)]
    assert named_groups(network(), section(optimizer=DECAY, decay="all")) == whole


@pytest.mark.parametrize("options", [{"name": "SGD"}, {"name": "Adam"}, {"name": "Rprop"}], ids=str)
def test_without_decay_there_is_one_group_so_that_older_checkpoints_fit(options):
    assert len(named_groups(network(), section(optimizer=options))) == 1
    assert len(named_groups(network(), section(optimizer={"name": "AdamW"}))) == 2, "by default"


def test_the_first_rate_that_is_found_holds():
    train = section(rates={r"^0\.w": 0.5, "^0": 0.25}, decay="all", optimizer=DECAY)
    assert named_groups(network(), train) == [
        ({"0.weight"}, 0.5, 0.5),
        ({"0.bias"}, 0.5, 0.25),
        ({"1.weight", "1.bias", "2.weight", "2.bias"}, 0.5, 1),
    ]
    frozen = network()
    frozen[0].requires_grad_(False)
    message = "`train.rates` must each find a parameter that is trained, got '\\^0'. .* 1.weight, "
    with pytest.raises(ConfigError, match=message):
        parameter_groups(frozen, section(rates={"^0": 0.5}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("StepLR", {"step_size": 2}),
        ("OneCycleLR", {"max_lr": 2.0, "total_steps": 9, "cycle_momentum": False}),
        ("CosineAnnealingLR", {"T_max": 5, "eta_min": 0.3}),
    ],
)
def test_a_schedule_multiplies_each_groups_rate(name, options):
    """Also one that sets rates whatever they were."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    groups = parameter_groups(model, section(rates={"^1": 0.25}))
    optimizer = optim.make_optimizer("SGD", groups, 1.0, {})
    schedule = optim.make_schedule(name, optimizer, 0.0, 8, options)
    for _ in range(8):
        before = [p.item() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved = [a - p.item() for a, p in zip(before, model.parameters(), strict=True)]
        lr = schedule.get_last_lr()[0]
        assert moved == pytest.approx([lr, 0.25 * lr])
        schedule.step()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4, "cycle_momentum": False}),
        ("StepLR", {"step_size": 2}),
        ("LinearLR", {}),
    ],
)
def test_without_warm_up_a_schedule_begins_as_torchs_own(name, options):
    rates = []
    for make in (
        partial(optim.make_schedule, name, warmup=0.0, total_steps=8, options=options),
        partial(optim.SCHEDULERS[name], **options),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = make(optimizer=optimizer)
        rates.append([])
        for _ in range(8):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == rates[1]


# 81 = 2 * 40 + 1: the third step has a sample for one worker alone.
SHORT = Job(
    ["train.epochs=2", "train.lr=0.05", "train.global_batch=40", "train.dtype=float64"],
    samples=81,
    steps=6,
)
RECOMPUTED = r"train.recompute=[layer\d, ^fc$]"
JOBS = {
    "groups and rates": SHORT.but(
        "train.optimizer.weight_decay=0.1", "train.rates.layer1=0.3", "train.rates.bn=2"
    ),
    "recomputed, channels last": SHORT.but(
        RECOMPUTED, "train.channels_last=true", "train.norm_batch=10", "launch.micro_batch=20"
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_curve_is_that_of_one_worker(pool, name):
    (expected,) = pool(1).run(invariance.train, JOBS[name])
    for world_size in (2, 3, 4):
        first, *others = pool(world_size).run(invariance.train, JOBS[name])
        assert all(other == first for other in others)
        assert max(invariance.gaps(first.losses, expected.losses)) <= FLOAT64_BOUND
    if name == "groups and rates":
        (other,) = pool(1).run(invariance.train, JOBS[name].but("train.decay=all"))
        assert max(invariance.gaps(other.losses, expected.losses)) > 1e-6


def test_recomputed_it_has_the_same_bits(pool):
    job = SHORT.but("train.dtype=float32", "norm.name=sync_batch_renorm", "train.ema=0.5")
    assert pool(2).run(invariance.train, job.but(RECOMPUTED)) == pool(2).run(invariance.train, job)


def test_the_outermost_modules_are_recomputed_and_keep_nothing():
    model = MODEL(in_channels=1, num_classes=4, norm_layer=nn.BatchNorm2d)
    names = list(model.state_dict())
    make_efficient(model, section(recompute=[r"layer1", r"conv2"]))
    wrapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert wrapped == ["layer1", "layer2.0.conv2", "layer3.0.conv2"]
    assert list(model.state_dict()) == names
    average = copy.deepcopy(model)
    nn.init.zeros_(model.layer1[0].bn2.weight)
    x = torch.randn(2, 16, 8, 8)
    assert not torch.equal(average.layer1(x), model.layer1(x)), "a copy computes its own"
    message = r"`train.recompute` must each find a module, got 'layr'. The nearest is 'layer1'. There are conv1, "
    with pytest.raises(ConfigError, match=message):
        make_efficient(model, section(recompute=["layr"]))


def test_the_estimate_of_memory_counts_the_inputs_of_what_is_recomputed():
    (plain, _), (less, _) = needed(), needed(r"train.recompute=[layer\d]")
    # Of an image those of three layers, (16, 8, 8), (16, 8, 8) and (32, 4, 4), in float32.
    assert 4 * 2560 < less.per_sample < plain.per_sample / 2


def test_images_and_weights_have_channels_last():
    seen: list[torch.Tensor] = []
    model = MODEL(in_channels=3, num_classes=4, norm_layer=nn.BatchNorm2d)
    make_efficient(model, section(channels_last=True))
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 3, 8, 8))
    for tensor in (*seen, model.layer1[0].conv1.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def take_steps(
    options: list[str], steps: int, samples: int = 80
) -> tuple[Setup, MemoryFeed, list[StepResult]]:
    """Take steps on the first digits, over all ranks."""
    config = load_config("digits", ["train.global_batch=80", *options])
    data = digits(None)
    workers = Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    data = type(data)(data.train[:samples], data.test[:80], 10, data.mean, data.std)
    feed = MemoryFeed(data, config, workers.device)
    setup = runs.setup_of(config, workers, feed, steps)
    results = [
        runs.take_whole_step(setup, feed, step, training_step) for step in range(1, steps + 1)
    ]
    return setup, feed, results


def with_float16(first_scale: float, options: list[str]):
    """Of each step the loss, the norm, and what was done; the scale and the schedule at last."""
    with mock.patch.object(scaling, "_FIRST_SCALE", first_scale):
        setup, _, results = take_steps(
            [THIN, "train.autocast=float16", "train.clip=9", *options], 5
        )
    return (
        [(r.loss, r.grad_norm, r.was_taken, r.has_overflowed) for r in results],
        setup.scaler.get_scale() * setup.workers.world_size,
        setup.schedule.last_epoch,
    )


def test_with_float16_a_step_that_overflows_is_left_out_on_all_workers(pool):
    """Whatever `train.not_finite` says; and the scale goes down."""
    outcomes = {}
    for world_size in (1, 2, 4):
        first, *others = pool(world_size).run(with_float16, 2.0**40, [])
        assert all(other == first for other in others)
        outcomes[world_size] = first
    steps, scale, scheduled = outcomes[1]
    assert [step[2:] for step in steps] == [(False, True)] * 5
    assert [step[1] for step in steps] == [None] * 5
    assert len({step[0] for step in steps}) == 1, "nothing has moved"
    assert (scale, scheduled) == (2.0**35, 5)
    assert all(outcome[1:] == (scale, scheduled) for outcome in outcomes.values())


def test_with_float16_it_is_the_same_training_on_any_number_of_workers(pool):
    (wide,) = pool(1).run(with_float16, 2.0**14, ["train.autocast=null"])
    (narrow,) = pool(1).run(with_float16, 2.0**14, [])
    for world_size in (2, 3):
        steps, scale, _ = pool(world_size).run(with_float16, 2.0**14, [])[0]
        assert scale == pytest.approx(2.0**14)
        for got, expected in zip(steps, narrow[0], strict=True):
            assert got[:2] == pytest.approx(expected[:2], rel=2e-2)
            assert got[2:] == expected[2:] == (True, False)
    for got, expected in zip(narrow[0], wide[0], strict=True):
        assert got[0] == pytest.approx(expected[0], rel=2e-2)
    assert narrow[0] != wide[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_scale_that_is_saved_is_the_same_for_any_number_of_workers(world_size):
    scaler = scaling.make_scaler("float16", Workers(0, world_size, torch.device("cpu")))
    state = scaling.scaler_state(scaler, world_size)
    assert state["scale"] == 2.0**16
    scaling.load_scaler(scaler, state | {"scale": 2.0**9}, world_size)
    assert scaling.scaler_state(scaler, world_size)["scale"] == 2.0**9


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_gradient_that_is_not_finite_at_any_scale_is_no_overflow(world_size):
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 / world_size)
    found = []
    for _ in range(2):
        scaler.scale((weight * torch.inf).sum()).backward()
        found.append(scaling.unscale(scaler, optimizer, True, world_size))
        optimizer.zero_grad()
    assert found == [(True, True), (False, False)]


def averaged(decay: float, renews: bool) -> tuple[list[torch.Tensor], float]:
    """The averaged network's statistics, and how far its logits are from those by population's."""
    options = [THIN, f"train.ema={decay}", "train.dtype=float64", "train.norm_batch=20"]
    setup, feed, _ = take_steps(options, 20)
    assert setup.average is not None
    if renews:
        renew_statistics(setup, feed, 1)
    average = setup.average.module
    images, _ = feed.load(TRAIN, torch.arange(80))
    exact = copy.deepcopy(average)
    if dist.get_world_size() == 1:
        recalibrate(exact, [images])
    exact.eval()
    judged = copy.deepcopy(average).eval()
    with torch.no_grad():
        expected, got = exact(images), judged(images)
    return list(average.buffers()), float((got - expected).norm() / expected.norm())


def test_an_average_of_statistics_is_not_that_of_the_averaged_network(pool):
    """So it gets its own before it is judged, the same on any number of workers."""
    ((_, wrong),) = pool(1).run(averaged, 0.95, False)
    ((expected, right),) = pool(1).run(averaged, 0.95, True)
    assert right < 0.1 < wrong
    for world_size in (2, 3):
        for buffers, _ in pool(world_size).run(averaged, 0.95, True):
            torch.testing.assert_close(buffers, expected, rtol=1e-9, atol=1e-12)


def renewed_without_numbers() -> tuple[bool, bool]:
    setup, feed, _ = take_steps(["train.ema=0.9"], 2)
    assert setup.average is not None
    average = setup.average.module
    with torch.no_grad():
        next(average.parameters()).fill_(torch.nan)
    before = copy.deepcopy(list(average.buffers()))
    renew_statistics(setup, feed, 1)
    pairs = list(zip(average.buffers(), before, strict=True))
    return all(torch.equal(*pair) for pair in pairs), all(b.isfinite().all() for b in before)


def test_an_average_that_is_not_finite_keeps_its_statistics_and_the_run_goes_on(pool):
    assert pool(2).run(renewed_without_numbers) == [(True, True)] * 2


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_holds_for_products_and_for_convolutions(wanted):
    """Also where torch's own defaults for convolutions and for recurrent layers are others."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    parts = (matmul, cudnn.conv, cudnn.rnn)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        set_tf32(wanted)
        assert [part.fp32_precision == "tf32" for part in parts] == [wanted] * 3
        # Readable by the names from before `fp32_precision`, which torch's own code reads.
        assert torch.get_float32_matmul_precision() == ("high" if wanted else "highest")
        with cudnn.flags():
            pass
        set_tf32(None)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (wanted, wanted)
        # Whatever a program has said of all.
        cudnn.fp32_precision = "ieee" if wanted else "tf32"  # pyright: ignore[reportAttributeAccessIssue]
        set_tf32(wanted)
        assert [part.fp32_precision == "tf32" for part in parts] == [wanted] * 3
    finally:
        cudnn.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]
        matmul.allow_tf32, cudnn.allow_tf32 = before
