"""State dicts of other libraries: each layer is written out as its library computes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from syncnorm import SyncBatchNorm, SyncBatchRenorm, adopt_state_dict, convert
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.model.foreign import ARCHITECTURES, NormAct

C = 4


def _vectors(*names: str, seed: int = 0) -> dict[str, Tensor]:
    """Positive and negative numbers; those of variances and deviations positive."""
    g = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(C, generator=g, dtype=torch.float64) for name in names}
    return {k: v.abs() + 0.1 if "var" in k or "std" in k else v for k, v in vectors.items()}


X = torch.randn(7, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1

TORCH = _vectors("weight", "bias", "running_mean", "running_var") | {
    "num_batches_tracked": torch.tensor(5)
}
KERAS = _vectors("gamma", "beta", "moving_mean", "moving_variance")
STDDEV = _vectors("moving_stddev", seed=2)
RENORM = _vectors("renorm_mean", "renorm_stddev", seed=3)
WEIGHTS = {
    "renorm_mean_weight": torch.tensor(0.7, dtype=torch.float64),
    "renorm_stddev_weight": torch.tensor(0.6, dtype=torch.float64),
}
CROSSQ = _vectors("ra_mean", "ra_var", "scale", "bias") | {"steps": torch.tensor(9)}


def _evaluated(mean: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (X - mean) / sigma * weight + bias


EPS = 1e-3
KERAS_RENORM = KERAS | STDDEV | {"moving_variance": STDDEV["moving_stddev"].square() - EPS}
CASES: dict[str, tuple[dict[str, Tensor], str | None, Tensor]] = {
    "torch": (
        TORCH, None,
        _evaluated(TORCH["running_mean"], (TORCH["running_var"] + EPS).sqrt(), TORCH["weight"], TORCH["bias"]),
    ),
    "inplace_abn": (
        TORCH, "inplace_abn",
        _evaluated(
            TORCH["running_mean"], (TORCH["running_var"] + EPS).sqrt(), TORCH["weight"].abs() + EPS, TORCH["bias"]
        ),
    ),
    "keras": (
        KERAS, None,
        _evaluated(KERAS["moving_mean"], (KERAS["moving_variance"] + EPS).sqrt(), KERAS["gamma"], KERAS["beta"]),
    ),
    "keras with renormalisation": (
        KERAS_RENORM | RENORM, None,
        _evaluated(KERAS["moving_mean"], STDDEV["moving_stddev"], KERAS["gamma"], KERAS["beta"]),
    ),
    "keras with the averages of training": (
        {k: KERAS[k] for k in ("gamma", "beta")} | RENORM | WEIGHTS, "keras",
        _evaluated(RENORM["renorm_mean"] / 0.7, RENORM["renorm_stddev"] / 0.6, KERAS["gamma"], KERAS["beta"]),
    ),
    "keras without gamma and beta": (
        {k: KERAS[k] for k in ("moving_mean", "moving_variance")}, None,
        _evaluated(
            KERAS["moving_mean"], (KERAS["moving_variance"] + EPS).sqrt(), torch.ones(()), torch.zeros(())
        ),
    ),
    "crossq": (
        CROSSQ, None,
        _evaluated(CROSSQ["ra_mean"], (CROSSQ["ra_var"] + EPS).sqrt(), CROSSQ["scale"], CROSSQ["bias"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "layer_of", [nn.BatchNorm1d, SyncBatchNorm, SyncBatchRenorm], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_what_it_was_there(name, layer_of):
    state, source, expected = CASES[name]
    layer = layer_of(C, eps=EPS, dtype=torch.float64).eval()
    assert layer(X).ne(expected).any()
    adopted = adopt_state_dict(layer, state, source=source)
    assert_close(layer(X), expected, torch.float64, "y")
    assert adopted.layers == {"": name.split()[0]}
    counted = {"torch": 5, "inplace_abn": 5, "crossq": 9}.get(name, 0)
    assert int(layer.num_batches_tracked) == counted
    assert ("no counter" in str(adopted)) == (counted == 0)


def test_sigma_is_kept_where_eps_is_another():
    """Renormalisation averages sigma itself, with whatever eps is in it."""
    state, source, expected = CASES["keras with renormalisation"]
    layer = SyncBatchRenorm(C, eps=1e-5, dtype=torch.float64).eval()
    adopted = adopt_state_dict(layer, state, source=source)
    assert_close(layer(X), expected, torch.float64, "y")
    assert "eps is" not in str(adopted)


NOTES = [
    (SyncBatchNorm(C), KERAS, None, "'': eps is 1e-05 here, and 0.001 in Keras by default"),
    (SyncBatchNorm(C), CROSSQ, None, "'': eps is 1e-05 here, and 0.001 in CrossQ by default"),
    (SyncBatchRenorm(C), CROSSQ, None, 'averages variances; running_average="var" goes on so'),
    (SyncBatchRenorm(C), TORCH, None, "'': the schedule's clock stands at 5; if that was batch normalisation, set"),
    (SyncBatchNorm(C), TORCH, "inplace_abn", "'': weight = abs(weight) + 1e-05 (2 were negative); the activation must"),
    (SyncBatchNorm(C), KERAS_RENORM | RENORM, None, "renorm_mean and renorm_stddev were left out: evaluation used"),
    (SyncBatchNorm(C), KERAS_RENORM, None, "'': running_var = stddev^2 - 1e-05, which keeps sigma whatever eps was"),
    (SyncBatchNorm(C), {k: v for k, v in TORCH.items() if k[0] != "n"}, None, "'': num_batches_tracked = 0, since the"),
    (SyncBatchNorm(C), {k: v for k, v in KERAS.items() if k != "beta"}, None, "bias = 0, since the state has no beta"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "state", "source", "note"), NOTES, ids=[note for *_, note in NOTES]
)
def test_it_says_what_it_changed_and_what_no_state_dict_says(layer, state, source, note):
    assert note in str(adopt_state_dict(layer, state, source=source))


def test_a_plain_state_dict_needs_no_note():
    assert str(adopt_state_dict(SyncBatchNorm(C), TORCH)) == "1 batch norms as torch"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("name", ["digits_resnet", "tied", "torch's SyncBatchNorm"])
def test_whole_models(name, prefix):
    """torch's, its SyncBatchNorm's, apex's and mmcv's entries have the same names; wrappers put
    some before them.
    """
    torch.manual_seed(1)
    theirs = ARCHITECTURES[name]()
    theirs(torch.randn(4, 3, 16, 16))
    torch.manual_seed(2)
    model = ARCHITECTURES[name]()
    model(torch.randn(4, 3, 16, 16))
    convert(model, SyncBatchNorm, sync="lagged")
    adopted = adopt_state_dict(
        model, {prefix + key: value for key, value in theirs.state_dict().items()}
    )
    assert set(adopted.layers.values()) == {"torch"}
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(model.eval()(x), theirs.eval()(x))


def test_a_tied_layer_is_read_under_both_names():
    model = ARCHITECTURES["tied"]()
    state = model.state_dict()
    state |= {key: torch.full((4,), -2.0) for key in ("norm.weight", "again.norm.weight")}
    adopt_state_dict(model, state, source="inplace_abn")
    assert torch.equal(model.norm.weight, torch.full((4,), 2.0 + 1e-5))


def test_timms_layer_with_an_activation():
    """Its entries are torch's: into one that was converted, or into a batch norm that an activation
    follows.
    """
    theirs = NormAct(C)
    theirs(torch.randn(3, C, 2, 2))
    converted, apart = (
        nn.Sequential(convert(NormAct(C))),
        nn.Sequential(SyncBatchNorm(C), nn.SiLU()),
    )
    x = torch.randn(3, C, 2, 2)
    for model in (converted, apart):
        adopt_state_dict(model, {f"0.{key}": value for key, value in theirs.state_dict().items()})
        assert torch.equal(model.eval()(x), theirs.eval()(x))


def test_arrays_under_keras_own_names():
    model = nn.Sequential(nn.Linear(C, C), SyncBatchNorm(C, eps=EPS))
    entries = {f"1/{key}:0": value.numpy() for key, value in KERAS.items()}
    adopted = adopt_state_dict(
        model, {**entries, "0/weight": torch.eye(C).numpy(), "0/bias": torch.zeros(C).numpy()}
    )
    assert adopted.layers == {"1": "keras"}
    expected = CASES["keras"][2]
    assert_close(model.double().eval()(X), expected, torch.float32, "y")


def _without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in names}


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    (_without(TORCH, "running_var"), None, "got nothing for '1.running_var'. Rename"),
    (TORCH | {"gain": torch.ones(C)}, None, "got '1.gain', which the model does not have."),
    (
        TORCH | {"weight": torch.ones(C + 1)},
        None,
        "got '1.weight' of shape (5,), which is (4,) in the model",
    ),
    (
        KERAS | {"running_mean": torch.ones(C), "moving_mean": torch.ones(3)},
        None,
        "'1.running_mean' of shape (3,)",
    ),
    (_without(CROSSQ, "ra_var"), None, "nothing for '1.running_var'"),
    (
        TORCH | {"num_batches_tracked": torch.ones(2)},
        None,
        "got '1.num_batches_tracked' of shape (2,), which is () in the model",
    ),
    (
        CROSSQ,
        "torch",
        "`source` must be what the state is of, got 'torch' for '1' with ['bias', 'ra_mean', "
        "'ra_var'",
    ),
    (
        TORCH,
        "keras",
        "`source` must be what the state is of, got 'keras' for '1' with ['bias', "
        "'num_batches_tracked'",
    ),
    (
        TORCH,
        "tensorflow",
        '`source` must be "torch" or "inplace_abn" or "keras" or "crossq", got \'tensorflow\'',
    ),
    (
        RENORM | {k: 0 * v for k, v in WEIGHTS.items()},
        None,
        "got renorm_mean_weight = 0. Train first.",
    ),
    (
        RENORM | {k: v / 0 for k, v in WEIGHTS.items()},
        None,
        "got renorm_mean_weight = inf. Train first.",
    ),
    *(
        (
            RENORM | {k: v.expand(shape) for k, v in WEIGHTS.items()},
            None,
            f"must hold one number as renorm_mean_weight, got shape {shape}. Give",
        )
        for shape in ((2,), (0,), (C,))
    ),
]


@pytest.mark.parametrize(("state", "source", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_changed(state, source, message):
    model = nn.Sequential(nn.Linear(C, C), SyncBatchNorm(C))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    entries = {f"1.{key}": value for key, value in state.items()} | {
        "0.weight": torch.full((C, C), 3.0), "0.bias": torch.full((C,), 3.0)
    }  # fmt: skip
    given = dict(entries)
    with pytest.raises(InputError, match=re.escape(message)):
        adopt_state_dict(model, entries, source=source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert entries == given


def _module(prefix: str = "", **more: Any) -> dict[str, Any]:
    return {prefix + k: v for k, v in nn.BatchNorm1d(C).state_dict().items()} | more


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"epoch": 3, "state_dict": _module()},
            "got dict with dict under 'state_dict'. Pass state['state_dict'].",
        ),
        ({"model_state_dict": _module("module."), "best": 0.5}, "Pass state['model_state_dict']."),
        # Random states and those of an optimizer are tensors by name, too.
        (
            {"rng": {"cpu": torch.zeros(9)}, "ema": {"shadow": _module()}},
            "Pass state['ema']['shadow']. Nothing",
        ),
        (
            {"net": _module(), "all": _module() | _module("b.")},
            "Pass state['all'] or state['net']. Nothing",
        ),
        (
            {"model": nn.BatchNorm1d(C)},
            "got dict with BatchNorm1d under 'model'. Pass state['model'].state_dict().",
        ),
        (nn.BatchNorm1d(C), "got BatchNorm1d. Pass state.state_dict(). Nothing was changed."),
        ("runs/last.pt", "got str. Load the file, and pass what state_dict() gave."),
        (
            {"optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": []}},
            "pass what state_dict() gave.",
        ),
        (_module(hparams={"lr": 0.1}), "got dict with dict under 'hparams'. Load the file"),
        (
            {0: torch.zeros(C)},
            "`state` must be a state dict, tensors or arrays by name, got dict. Load",
        ),
    ],
    ids=str,
)
def test_what_is_no_state_dict_is_an_error_that_says_where_one_lies(state, message):
    layer = SyncBatchNorm(C)
    with pytest.raises(InputError, match=re.escape(message)):
        adopt_state_dict(layer, state)


class _WithExtraState(nn.Sequential):
    def get_extra_state(self) -> dict[str, str]:
        return {"made": "by hand"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.seen = state


def _adopt_sharded(shard: Callable[..., Any]) -> tuple[str, bool]:
    model = nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    shard(model)
    with pytest.raises(InputError) as caught:
        adopt_state_dict(model, state)
    return str(caught.value), bool((model[1].running_mean == 0).all())


@pytest.mark.parametrize("is_second", [False, True])
def test_a_sharded_model_is_refused_before_anything_is_changed(pool, is_second):
    how = fully_shard if is_second else FullyShardedDataParallel
    options = {} if is_second else {"device_id": torch.device("cpu")}
    for said, is_unchanged in pool(2).run(_adopt_sharded, partial(how, **options)):
        assert said.startswith("`model` must not be sharded, got one of FSDP. Adopt the state bef")
        assert is_unchanged


def test_extra_state_is_handed_on():
    model = _WithExtraState(nn.BatchNorm1d(C))
    adopt_state_dict(model, model.state_dict())
    assert model.seen == {"made": "by hand"}


def test_part_of_a_state_is_filled_and_the_rest_named():
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.BatchNorm1d(C, affine=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {f"1.{name}": value for name, value in KERAS.items()}
    state |= {"0.weight": torch.ones(9, 3), "head.bias": torch.ones(2)}
    with pytest.raises(InputError, match=r"head\.bias"):
        adopt_state_dict(model, state)
    adopted = adopt_state_dict(model, state, partial=True)
    assert adopted.layers == {"1": "keras"}
    assert adopted.left.missing == (
        "0.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked"
    )  # fmt: skip
    assert adopted.left.unexpected == ("head.bias",)
    assert adopted.left.reshaped == ("0.weight (9, 3) for (4, 3)",)
    assert str(adopted).endswith("1 of other shapes: 0.weight (9, 3) for (4, 3)")
    got = model.state_dict()
    assert torch.equal(got["1.running_var"], KERAS["moving_variance"].float())
    assert all(torch.equal(got[name], before[name]) for name in before if name[0] != "1")
    with pytest.raises(InputError, match=re.escape("entries that fit the model, got head.bias")):
        adopt_state_dict(model, {"head.bias": torch.ones(2)}, partial=True)
