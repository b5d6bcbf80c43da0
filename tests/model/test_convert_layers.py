"""Single layers: what is kept, what is set, what is refused, and what the table says."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from syncnorm import (
    Lagged,
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    conversion_table,
    convert,
    convert_sync_batchnorm,
    frozen_statistics,
    groups,
    prepare_ddp,
    register_adapter,
    revert,
)
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.model.foreign import Kept, NormAct, Softplus, SyncNormAct, Unknown, scale


def _trained(layer: nn.Module, batches: int = 3) -> nn.Module:
    shape = {nn.BatchNorm1d: (6, 4), nn.BatchNorm3d: (3, 4, 2, 2, 2)}.get(type(layer), (3, 4, 5, 5))
    for seed in range(batches):
        layer(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1)
    return layer


def test_dtype_device_mode_and_requires_grad_are_kept():
    layer = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2, dtype=torch.float64).eval()
    layer.bias.requires_grad_(False)
    weight = layer.weight
    convert(layer, SyncBatchRenorm)
    assert layer.weight is weight
    assert (layer.training, layer.eps, layer.bias.requires_grad, layer.weight.dtype) == (
        False, 1e-3, False, torch.float64,
    )  # fmt: skip
    meta = revert(convert(nn.BatchNorm1d(4, device="meta"), SyncBatchRenorm, sync="lagged"))
    assert meta.running_mean.is_meta


@pytest.mark.parametrize(
    ("layer", "to", "options", "momentum"),
    [
        (nn.BatchNorm2d(4, momentum=0.2), SyncBatchNorm, {}, 0.2),
        (nn.BatchNorm2d(4, momentum=0.2), SyncBatchRenorm, {}, 0.01),
        (nn.BatchNorm2d(4, momentum=0.2), SyncBatchRenorm, {"momentum": 0.3}, 0.3),
        (nn.BatchNorm2d(4, momentum=0.2), SyncBatchNorm, {"momentum": None}, None),
        (nn.BatchNorm2d(4, momentum=None), SyncBatchNorm, {}, None),
        (SyncBatchNorm(4, momentum=0.2), SyncBatchRenorm, {}, 0.01),
        (SyncBatchRenorm(4, momentum=0.2), SyncBatchNorm, {}, 0.1),
        (SyncBatchRenorm(4, momentum=0.2), SyncBatchRenorm, {"sync": "none"}, 0.2),
    ],
)
def test_momentum(layer, to, options, momentum):
    before = layer.momentum
    convert(layer, to, **options)
    assert type(layer) is to
    assert layer.momentum == momentum
    revert(layer)
    assert layer.momentum == before


def test_the_schedule_starts_when_a_trained_layer_becomes_renormalisation():
    layer = _trained(nn.BatchNorm2d(4))
    schedule = RenormSchedule.switch(2, 3.0, 5.0)
    convert(layer, SyncBatchRenorm, schedule=schedule)
    assert int(layer.num_batches_tracked) == 0
    assert layer.schedule is schedule
    assert [float(bound) for bound in layer.bounds()] == [1.0, 0.0]
    layer(torch.randn(3, 4, 5, 5))
    assert (
        conversion_table(layer).splitlines()[1].split("  ")[-1]
        == "3 before, 1 since: the schedule's clock"
    )
    # There and back between our own layers, nothing is lost and nothing counted twice.
    convert(layer)
    assert int(layer.num_batches_tracked) == 4
    layer(torch.randn(3, 4, 5, 5))
    convert(layer, SyncBatchRenorm)
    assert int(layer.num_batches_tracked) == 0
    assert int(revert(layer).num_batches_tracked) == 5
    assert type(layer) is nn.BatchNorm2d


def test_running_average_std_goes_on_from_the_same_sigma():
    layer = _trained(nn.BatchNorm2d(4))
    before = layer.running_var.clone()
    built = SyncBatchRenorm(4)
    built.load_state_dict(layer.state_dict())
    built.num_batches_tracked.zero_()
    convert(layer, SyncBatchRenorm)
    assert torch.equal(layer.running_var, before)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(layer(x), built(x))
    assert torch.equal(layer.running_var, built.running_var)


def test_the_table():
    model = nn.Sequential(
        nn.BatchNorm1d(4), SyncBatchNorm(4), Kept(4), nn.BatchNorm1d(4, track_running_stats=False)
    )
    assert conversion_table(model).splitlines() == ["layer  was  is  momentum  batches counted"]
    convert(model, select="[023]", momentum=0.5)
    assert conversion_table(model).splitlines() == [
        "layer  was          is                  momentum    batches counted",
        "0      BatchNorm1d  SyncBatchNorm       0.1 -> 0.5  0",
        "2      Kept         SyncBatchNorm_Kept  0.1 -> 0.5  0",
        "3      BatchNorm1d  SyncBatchNorm       0.1 -> 0.5  none",
    ]


def test_without_running_statistics():
    layer = nn.BatchNorm2d(4, track_running_stats=False)
    x = torch.randn(3, 4, 5, 5)
    expected = layer(x)
    assert_close(convert(layer).eval()(x), expected, torch.float32, "y")
    assert revert(layer).running_mean is None


def test_select_by_any_name_of_a_tied_layer():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.BatchNorm1d(4)})
    convert(model, select="^b$")
    assert type(model["a"]) is SyncBatchNorm
    assert model["a"] is model["b"]
    assert type(model["c"]) is nn.BatchNorm1d
    convert(model, select=lambda name, layer: name == "c" and layer.num_features == 4)
    assert type(model["c"]) is SyncBatchNorm


def test_others_are_left_alone():
    """FrozenBatchNorm of torchvision and detectron2 is no subclass of torch's BatchNorm, as here."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(4))

    model = nn.Sequential(
        nn.InstanceNorm2d(4, affine=True), FrozenBatchNorm2d(), nn.LayerNorm(4), SyncBatchNorm(4)
    )
    before = [(type(m), vars(m).copy()) for m in model.modules()]
    assert convert(model) is model
    assert [(type(m), vars(m)) for m in model.modules()] == before
    assert revert(nn.Sequential(nn.BatchNorm1d(4)))[0].num_features == 4


def test_convert_sync_batchnorm_leaves_ours_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), SyncBatchRenorm(4), nn.SyncBatchNorm(4))
    assert convert_sync_batchnorm(model) is model
    assert [type(m) for m in model] == [SyncBatchNorm, SyncBatchRenorm, SyncBatchNorm]
    assert convert_sync_batchnorm(model) is model
    assert type(convert_sync_batchnorm(nn.BatchNorm1d(4))) is SyncBatchNorm


def take_over_torchs_group() -> None:
    theirs, given = dist.new_group([0, 1]), dist.new_group([0, 1])
    for process_group, expected in ((None, theirs), (given, given), ("node", "node")):
        layer = nn.SyncBatchNorm(4, process_group=theirs)
        convert(layer, process_group=process_group)
        assert layer.process_group is expected
        # A group as torch keeps it could be neither copied nor pickled.
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))  # noqa: S301 our own
        assert copied.process_group is expected
        assert pickled.process_group == (expected if expected == "node" else groups.Ranks((0, 1)))
        assert revert(layer).process_group is theirs
        assert revert(copied).process_group is theirs
        assert type(layer) is type(copied) is nn.SyncBatchNorm
        assert "workers" not in vars(layer)


def test_torchs_process_group_is_taken_over(pool):
    pool(2).run(take_over_torchs_group)


def test_ours_keep_what_no_option_says():
    group, lagged = "node", Lagged(max_drift=0.5)
    layer = SyncBatchNorm(4, process_group=group, sync=lagged)
    keys = layer.state_dict().keys()
    convert(layer, SyncBatchRenorm, running_average="var")
    assert (layer.process_group, layer.sync, layer.sync_mode.argument) == (group, "lagged", lagged)
    assert layer.state_dict().keys() == keys
    convert(layer, SyncBatchRenorm, sync="batch")
    assert (layer.sync, layer.running_average) == ("batch", "var")
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(4).state_dict())
    revert(layer)
    assert (type(layer), layer.sync, layer.sync_mode.argument) == (SyncBatchNorm, "lagged", lagged)
    assert layer.state_dict().keys() == keys
    assert not hasattr(layer, "schedule")


@pytest.mark.parametrize("sync", ["lagged", Lagged()], ids=str)
def test_the_mode_that_a_layer_has_is_no_other(sync):
    """Its averages stay."""
    model = nn.Sequential(SyncBatchNorm(4, sync="lagged"))
    updates = model[0].lagged_updates
    convert(model, sync=sync)
    assert model[0].lagged_updates is updates
    convert(model, sync=Lagged(max_drift=0.5))
    assert model[0].lagged_updates is not updates


def test_layers_that_were_built_as_ours_become_what_is_said():
    model = nn.Sequential(SyncBatchNorm(4), SyncBatchRenorm(4, sync="lagged"), nn.BatchNorm2d(4))
    convert(model[2])
    with pytest.raises(
        InputError,
        match=re.escape(
            "got '0' (and 1 more) was built as ours, so it cannot be known what it should"
        ),
    ):
        revert(model)
    assert type(model[2]) is SyncBatchNorm, "nothing was changed"
    for each in model:
        _trained(each)
    x = torch.randn(3, 4, 5, 5)
    expected = model.eval()(x)
    revert(model, to=nn.BatchNorm2d)
    assert [type(m) for m in model] == [nn.BatchNorm2d] * 3
    assert [vars(m).keys() for m in model] == [vars(nn.BatchNorm2d(4)).keys()] * 3
    assert torch.equal(model(x), expected)
    assert list(model[1].state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    with pytest.raises(
        InputError, match=r"`to` must be torch.nn.BatchNorm1d, .* got <class '.*GroupNorm'>"
    ):
        revert(model, to=nn.GroupNorm)


def test_a_subclass_keeps_its_methods():
    layer = Kept(4)
    layer.is_frozen = True
    convert(layer)
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, Kept)
    assert not layer.train().training, "its train() has been asked"
    assert torch.equal(layer.spread(), torch.ones(4))
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 our own
        assert type(each) is type(layer)
        assert type(revert(each)) is Kept
        assert "train" in vars(type(each))


def test_parametrized_layers_in_either_order():
    for removed_first in (True, False):
        layer = nn.BatchNorm2d(4)
        parametrize.register_parametrization(layer, "weight", Softplus())
        original = layer.parametrizations.weight.original
        convert(layer)
        assert isinstance(layer, SyncBatchNorm)
        assert layer.parametrizations.weight.original is original
        x = torch.randn(3, 4, 5, 5)
        expected = SyncBatchNorm(4)(x) * nn.functional.softplus(original).view(1, -1, 1, 1)
        assert_close(layer(x), expected, torch.float32, "y")
        if removed_first:
            parametrize.remove_parametrizations(layer, "weight")
            assert type(layer) is SyncBatchNorm
            assert type(revert(layer)) is nn.BatchNorm2d
        else:
            revert(layer)
            parametrize.remove_parametrizations(layer, "weight")
            assert type(layer) is nn.BatchNorm2d


class Clamped(nn.BatchNorm1d):
    """A forward that looks at its input and calls the normalisation in between."""

    limit = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).clamp(-self.limit, self.limit).to(x.dtype)


class ClampedMore(Clamped):
    limit = 0.5


def test_adapters():
    x = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(
        InputError,
        match=re.escape("'0' is a ClampedMore, whose own forward would be lost; say what"),
    ):
        convert(nn.Sequential(ClampedMore(4)))
    with pytest.raises(
        InputError,
        match=r"`cls` must have a forward of its own, got ClampedMore, .* that of Clamped\.",
    ):
        register_adapter(ClampedMore, lambda layer, x, normalize: x)
    with pytest.raises(
        InputError,
        match=r"`cls` must be a subclass of torch's BatchNorm, got <class '.*GroupNorm'>",
    ):
        register_adapter(nn.GroupNorm, lambda layer, x, normalize: x)  # pyright: ignore
    register_adapter(
        Clamped,
        lambda layer, x, normalize: (
            normalize(x.float()).clamp(-layer.limit, layer.limit).to(x.dtype)
        ),
    )
    theirs, layer = ClampedMore(4), ClampedMore(4)
    convert(layer, SyncBatchRenorm)
    assert_close(layer(x), theirs(x), torch.float32, "y")
    assert layer(x).max().item() == 0.5
    copied = pickle.loads(pickle.dumps(layer))  # noqa: S301 our own
    assert torch.equal(copied(x), layer(x))
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0]).view(6, 1)
    assert_close(layer(x, mask)[:4], ClampedMore(4)(x[:4]), torch.float32, "with a mask")
    assert type(revert(layer)) is ClampedMore
    assert type(revert(copied)) is ClampedMore


def test_timms_layer_keeps_its_activation_and_dropout():
    layer, theirs = NormAct(4), NormAct(4)
    layer.drop = theirs.drop = nn.Dropout(1.0)
    convert(layer)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(layer(x), torch.zeros_like(x)), "dropped"
    layer.drop = theirs.drop = nn.Identity()
    assert_close(layer(x), theirs(x), torch.float32, "y")
    assert not torch.allclose(layer(x), nn.BatchNorm2d(4)(x))
    theirs.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), theirs.eval()(x))


class KeptSync(nn.SyncBatchNorm):
    def spread(self) -> torch.Tensor:
        return self.running_var.sqrt()


def _of_torchs_pooling_layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A step of timm's layer for many workers under DistributedDataParallel on a CPU, and its oracle."""
    layer, whole = SyncNormAct(2), nn.BatchNorm2d(2)
    layer.drop, layer.act = nn.Identity(), nn.SiLU()
    model = nn.Sequential(nn.Conv2d(2, 2, 1), layer, KeptSync(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_ddp(convert(model))
    copied = copy.deepcopy(model[1])
    assert type(copied) is type(layer)
    assert type(revert(copied)) is SyncNormAct
    assert isinstance(model[2], KeptSync)
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    rank = dist.get_rank()
    y = DistributedDataParallel(model[:2])(x[2 * rank :][:2])
    return y.detach(), nn.SiLU()(whole(model[0](x))).detach()[2 * rank :][:2]


def test_a_subclass_of_torchs_pooling_layer_trains_on_cpus(pool):
    """Under DistributedDataParallel, which refuses torch's own there; and no warning is told."""
    for y, expected in pool(2).run(_of_torchs_pooling_layer):
        assert_close(y, expected, torch.float32, "y")


def _with_own_forward() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def _named_as_ours() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.label = "stem"
    return layer


class Method(nn.BatchNorm2d):
    def update_running(self) -> None: ...


class BuiltAsOurs(SyncBatchNorm):
    pass


REFUSED = [
    (_with_own_forward, SyncBatchNorm, {}, "'1' has a forward that was set on the instance"),
    (lambda: Unknown(4), SyncBatchNorm, {}, "'1' is a Unknown, whose own forward would be lost; say what it does with"),
    (lambda: torch.jit.script(nn.BatchNorm2d(4)), SyncBatchNorm, {}, "'1' is compiled by torch.jit"),
    (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(4))), SyncBatchNorm, {}, "'1.0' is compiled by torch.jit"),
    (lambda: nn.BatchNorm2d(4, track_running_stats=False), SyncBatchRenorm, {}, "'1' has no running statistics, which"),
    (lambda: nn.BatchNorm2d(4, eps=0.0), SyncBatchNorm, {}, "'1' breaks a rule: `eps` must be > 0, got 0.0. The "
     "default is 1e-5. Nothing was changed."),
    (lambda: nn.BatchNorm2d(0), SyncBatchNorm, {}, "'1' breaks a rule: `num_features` must be at least 1, got 0."),
    (_named_as_ours, SyncBatchNorm, {}, "'1' has attributes that our layers use, label; rename them"),
    (lambda: Method(4), SyncBatchNorm, {}, "'1' has attributes that our layers use, update_running; rename them"),
    (lambda: BuiltAsOurs(4), SyncBatchRenorm, {}, "'1' is a BuiltAsOurs, a subclass of our layers"),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"momentun": 1}, "`momentun` must be an option of SyncBatchNorm (eps, "
     "momentum, sync), got 1. Did you mean `momentum`?"),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"schedul": 1}, "`schedul` must be an option of SyncBatchNorm"),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"affine": False}, "`affine` must not be given to convert, got False."),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"sync": "some"}, "`sync` must be \"batch\" or"),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"momentum": 2.0}, "`momentum` must be in [0, 1], or None"),
    (lambda: nn.BatchNorm2d(4), nn.SyncBatchNorm, {}, "`to` must be SyncBatchNorm, "
     "SyncBatchRenorm or a layer of syncnorm.family that takes the place of a batch norm, got <class"),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"select": "x"}, "at least one batch norm, got none of 2 with 'x'"),
    (lambda: nn.BatchNorm2d(4), SyncBatchNorm, {"select": "("}, "`select` must be a regular expression, got '('"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "to", "options", "message"), REFUSED, ids=[m for *_, m in REFUSED]
)
def test_what_cannot_be_converted_is_refused_before_anything_is_changed(make, to, options, message):
    model = nn.Sequential(nn.BatchNorm2d(4), make())
    before = [(type(m), vars(m).copy()) for m in model.modules()]
    with pytest.raises(InputError, match=re.escape(message)):
        convert(model, to, **options)
    assert [(type(m), vars(m)) for m in model.modules()] == before


def test_what_is_refused_can_be_left_out():
    model = nn.Sequential(nn.BatchNorm2d(4), Unknown(4), torch.jit.script(nn.BatchNorm2d(4)))
    convert(model, select="^0$")
    assert [type(m).__name__ for m in model] == [
        "SyncBatchNorm",
        "Unknown",
        "RecursiveScriptModule",
    ]


def test_the_layer_itself_and_several_at_once():
    with pytest.raises(
        InputError, match="got itself, which is a Unknown, whose own forward would be lost"
    ):
        convert(Unknown(4))
    with pytest.raises(
        InputError, match=r"got 'a' is a Unknown.*; 'b' has a forward that was set on the instance"
    ):
        convert(nn.ModuleDict({"a": Unknown(4), "b": _with_own_forward()}))


@pytest.mark.parametrize("sync", ["batch", "running", "lagged"])
def test_not_within_accumulate(sync):
    model = prepare_ddp(convert(nn.Sequential(nn.BatchNorm1d(4)), sync=sync))
    for change in (revert, lambda model: convert(model, SyncBatchRenorm)):
        with accumulate(model):
            model(torch.randn(6, 4))
            with pytest.raises(
                InputError, match="'0' is used by accumulate, evaluation_statistics or"
            ):
                change(model)
        with (
            frozen_statistics(model),
            pytest.raises(InputError, match="'0' is used by frozen_statistics"),
        ):
            change(model)
        change(model)
        convert(model)


def test_a_process_group_that_is_none_is_refused_before_anything_is_changed():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.SyncBatchNorm(4, process_group=object()))
    with pytest.raises(
        InputError,
        match="'1' has a process group that cannot be used: `process_group` must be None,",
    ):
        convert(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, nn.SyncBatchNorm]
    assert type(model[1].process_group) is object


def _wrapped(kind: str) -> str:
    """What convert and revert say of a model that is wrapped already."""
    model = nn.Sequential(
        nn.Linear(4, 4), *(nn.BatchNorm1d(4) for _ in range(2 if kind == "DDP" else 1))
    )
    if kind == "DDP":
        wrapped = DistributedDataParallel(model)
    elif kind == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        wrapped = fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    types = [type(m) for m in wrapped.modules()]
    try:
        convert(nn.Sequential(nn.BatchNorm1d(4), wrapped))
    except InputError as error:
        assert [type(m) for m in wrapped.modules()] == types
        return str(error)
    return "converted"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "DDP",
            "got '1.module.1' (and 1 more) is in DistributedDataParallel; pass model.module, "
            "before wrapping. Nothing",
        ),
        (
            "FSDP2",
            "'1.1' is sharded by FSDP; convert before fully_shard or FullyShardedDataParallel.",
        ),
        ("FSDP1", "is sharded by FSDP; convert before fully_shard or FullyShardedDataParallel."),
    ],
)
def test_wrapped_models_are_refused(pool, kind, message):
    assert message in pool(1).run(_wrapped, kind)[0]


def _prepared_and_back(sync: str) -> bool:
    """Attached by prepare_ddp and trained; reverted, nothing of it is left, and the last update is
    not lost.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    convert(model, sync=sync)
    prepare_ddp(model)
    assert model[1].statistics.is_attached
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    assert len(hooks) == 2
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
    part = copy.deepcopy(model)
    # One layer of the two; the other goes on.
    revert(part[1])
    assert type(part[1]) is nn.BatchNorm1d
    part(torch.randn(5, 3)).square().sum().backward()
    part.eval()
    assert [int(m.num_batches_tracked) for m in (part[1], part[2])] == [3, 3]
    model.register_forward_hook(scale)
    revert(model)
    assert [int(m.num_batches_tracked) for m in (model[1], model[2])] == [2, 2]
    assert not model._forward_pre_hooks
    assert [*model._forward_hooks.values()] == [scale]
    assert not model._forward_hooks_always_called
    assert not any("kept_from_ddp" in vars(m) for m in model)
    assert list(model.state_dict()) == list(
        nn.Sequential(nn.Linear(3, 4), *map(nn.BatchNorm1d, (4, 4))).state_dict()
    )
    model(torch.randn(5, 3))
    # And once more, from another mode.
    convert(model, SyncBatchRenorm, sync=sync)
    prepare_ddp(model)
    model(torch.randn(5, 3)).square().sum().backward()
    convert(model, sync="batch")
    assert not model._forward_pre_hooks
    model(torch.randn(5, 3)).square().sum().backward()
    return [int(m.num_batches_tracked) for m in (model[1], model[2])] == [5, 5]


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_layers_that_act_together_are_let_go(pool, sync):
    assert pool(2).run(_prepared_and_back, sync) == [True, True]
