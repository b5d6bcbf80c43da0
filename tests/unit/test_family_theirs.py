"""The family against other people's code, run in one process: timm, and the authors' repositories.

    pip install --no-deps timm
    SYNCNORM_AUTHORS=FOLDER python -m pytest tests/unit/test_family_theirs.py

FOLDER holds clones of the repositories that `AUTHORS` names; what is not there is skipped. Where
ours departs, the test says how.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncnorm.family import (
    MABN,
    BalancedBatchNorm,
    BatchChannelNorm,
    EvoNorm,
    OnlineNorm,
    PowerNorm,
    RegionNorm,
    ScaledWeightStandardization,
    UnifiedNorm,
    WeightStandardization,
)
from syncnorm.family.plain import clip_gradients_adaptively_

AUTHORS = {
    "hikvision-research/Unified-Normalization": (
        "image_classification/models/unified_normalization/unified_normalization.py"
    ),
    "megvii-model/MABN": "MABN.py",
    "sIncerass/powernorm": "fairseq/modules/norms/mask_powernorm.py",
    "Cerebras/online-normalization": "online-norm/numpy_on/online_norm_2d.py",
    "joe-siyuan-qiao/Batch-Channel-Normalization": "imagenet/models/layers.py",
    "lvyilin/AdaB2N": "models/utils/adab2n.py",
    "geekyutao/RN": "rn.py",
}
C = 4


def authors(repository: str) -> Any:
    """Import an author's file from a clone."""
    folder = os.environ.get("SYNCNORM_AUTHORS")
    if folder is None:
        pytest.skip("SYNCNORM_AUTHORS names no folder of the authors' repositories")
    path = Path(folder) / repository.split("/")[1] / AUTHORS[repository]
    if not path.exists():
        pytest.skip(f"no clone of github.com/{repository} in SYNCNORM_AUTHORS")
    return _load(path)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"theirs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timm(name: str) -> Any:
    """Import a module of timm's without the package, which imports torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    root = Path(spec.submodule_search_locations[0])
    folders = {"": root, ".layers": root / "layers", ".utils": root / "utils"}
    for package, folder in folders.items():
        bare = ModuleType(f"timms_own{package}")
        bare.__path__ = [str(folder)]
        sys.modules.setdefault(bare.__name__, bare)
    return importlib.import_module(f"timms_own.{name}")


def batches(steps: int, *shape: int, outlier: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Batches and cotangents, float64; the values of one are large."""
    torch.manual_seed(3)
    made = [
        (torch.randn(*shape).double() + 0.3, torch.randn(*shape).double()) for _ in range(steps)
    ]
    if outlier is not None:
        made[outlier][0].mul_(30)
    return made


def fill(*modules: nn.Module) -> None:
    """Give weight and bias values that are nothing special, the same to all."""
    for module in modules:
        torch.manual_seed(4)
        for name in ("weight", "bias"):
            with torch.no_grad():
                value = getattr(module, name)
                value.add_(0.3 * torch.randn(value.numel()).double().view(value.shape))


def take(layer: Any, x: Tensor, g: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Take a step's forward and backward pass: the output and the gradient of the input."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, *args)
    y.backward(g)
    assert x.grad is not None
    return y.detach(), x.grad


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["b0", "b1", "b2"])
def test_evo_norm_is_timms(variant):
    """timm takes variances in float32 whatever the input is."""
    theirs = getattr(timm("layers.evo_norm"), f"EvoNorm2d{variant.upper()}")(C, eps=1e-3)
    ours = EvoNorm(C, variant, eps=1e-3)
    fill(ours, theirs)
    for x, g in batches(4, 5, C, 6, 3):
        mine, other = take(ours, x.float(), g.float()), take(theirs, x.float(), g.float())
        for a, b in zip(mine, other, strict=True):
            close(a, b, 1e-5)
        for name, parameter in theirs.named_parameters():
            close(ours.get_parameter(name).grad, parameter.grad, 2e-5)
        close(ours.running_var, theirs.running_var, 1e-6)
    x = batches(1, 5, C, 6, 3)[0][0].float()
    close(ours.eval()(x), theirs.eval()(x), 1e-5)


def test_standardised_weights_are_timms():
    """The scaled ones but for eps, the least of I var here and a sum with var there."""
    theirs, weight = timm("layers.std_conv"), torch.randn(C, 3, 3, 3).double()
    x = torch.randn(2, 3, 5, 5).double()
    plain = theirs.StdConv2d(3, C, 3, eps=1e-3).double()
    scaled = theirs.ScaledStdConv2d(3, C, 3, gamma=1.7, eps=1e-12, bias=False).double()
    for layer in (plain, scaled):
        layer.weight.data.copy_(weight)
    convolve = torch.nn.functional.conv2d
    close(convolve(x, WeightStandardization(1e-3)(weight), padding=1), plain(x))
    own = ScaledWeightStandardization(C, gamma=1.7).double()
    close(convolve(x, own(weight), padding=1), scaled(x))


def test_adaptive_clipping_is_timms():
    torch.manual_seed(5)
    made = [nn.Parameter(torch.randn(3, 2, 2, 2) * 10.0**k) for k in (-4, 0)]
    other = [nn.Parameter(p.detach().clone()) for p in made]
    for p, q in zip(made, other, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    clip_gradients_adaptively_(made, 0.01, 1e-3)
    timm("utils.agc").adaptive_clip_grad(other, 0.01, 1e-3)
    for p, q in zip(made, other, strict=True):
        close(p.grad, q.grad, 1e-6)


@pytest.mark.parametrize("filtered", [False, True])
def test_unified_norm_is_the_authors(filtered, monkeypatch):
    """But for the gradient of the weight, which they multiply by r."""
    theirs = authors("hikvision-research/Unified-Normalization").UN1d(C, 3, 5, filtered).double()
    ours = UnifiedNorm(C, window=3, warmup=5, outlier_filtration=filtered).double()
    fill(ours, theirs)
    # Behind the 1,000 steps without r, too.
    for x, g in batches(1006, 2, C, 3, outlier=9):
        mine = take(ours, x, g)
        other = take(theirs, x.transpose(1, 2), g.transpose(1, 2))
        for a, b in zip(mine, other, strict=True):
            close(a, b.transpose(1, 2), 1e-8)
        close(ours.running_square, theirs.running_var, 1e-8)
        close(ours.bias.grad, theirs.bias.grad)
    assert int(theirs.skip_counter) > 0 or not filtered


def test_mabn_is_the_authors():
    theirs = authors("megvii-model/MABN").MABN2d(C, 2, 6, warmup_iters=5).double()
    ours = MABN(C, window=3, warmup=5).double()
    fill(ours, theirs)
    for x, g in batches(1006, 2, C, 3, 1):
        for a, b in zip(take(ours, x, g), take(theirs, x, g), strict=True):
            close(a, b, 1e-8)
        close(ours.running_square, theirs.running_var.flatten(), 1e-8)
        close(ours.weight.grad, theirs.weight.grad, 1e-8)
    close(ours.eval()(x), theirs.eval()(x), 1e-8)


def test_power_norm_is_the_authors_in_the_warm_up_and_by_psi_behind_it():
    """Behind it they divide the gradient by the batch's mean square, and z by psi."""
    theirs = authors("sIncerass/powernorm").MaskPowerNorm(C, warmup_iters=5).double()
    ours = PowerNorm(C, warmup=4).double()
    fill(ours, theirs)
    for step, (x, g) in enumerate(batches(8, 3, C, 2), start=1):
        mine = take(ours, x, g)
        order = (2, 0, 1)
        other = take(theirs, x.permute(order), g.permute(order))
        if step > 4:
            break
        close(mine[0].permute(order), other[0])
        close(mine[1].permute(order), other[1])
        close(ours.running_square, theirs.running_phi.flatten())
        close(ours.nu / 0.1, theirs.ema_gz.flatten())


def test_online_norm_is_the_authors():
    theirs = authors("Cerebras/online-normalization").Norm2d(C, 0.99, 0.9)
    ours = OnlineNorm(C, momentum=0.01, gradient_momentum=0.1, affine=False, guard=None).double()
    for x, g in batches(6, 5, C, 3, 2):
        y, dx = take(ours, x, g)
        close(y, torch.from_numpy(theirs(x.numpy())))
        close(dx, torch.from_numpy(theirs.backward(g.numpy())))
    kept = {"running_mean": "m", "running_var": "var", "u": "u", "v": "v"}
    for name, other in kept.items():
        close(ours.get_buffer(name), torch.from_numpy(getattr(theirs, other)))


def test_batch_channel_norm_is_the_authors():
    theirs = authors("joe-siyuan-qiao/Batch-Channel-Normalization").GN(C, 2).double()
    ours = BatchChannelNorm(C, 2).double()
    fill(ours, theirs.pbn)
    for x, g in batches(4, 5, C, 3, 2):
        for a, b in zip(take(ours, x, g), take(theirs, x, g), strict=True):
            close(a, b)
        close(ours.weight.grad, theirs.pbn.weight.grad)
        close(ours.group_weight.grad, theirs.weight.grad.flatten())
    close(ours.running_var, theirs.pbn.running_var)


def test_balanced_batch_norm_is_the_authors_where_every_task_is_there():
    tasks = torch.tensor([0, 0, 1, 2, 1, 0])
    theirs = authors("lvyilin/AdaB2N").AdaB2N(nn.BatchNorm2d(C), 3, 2, kappa=0.4).double()
    ours = BalancedBatchNorm(C, 3, kappa=0.4).double()
    fill(ours, theirs)
    with torch.no_grad():
        ours.psi.copy_(torch.tensor([0.4, -1.0, 2.0]))
        theirs.task_weight.copy_(ours.psi)
    counts = tasks.bincount().double()
    theirs.set_counts(tasks, counts[tasks], counts)
    theirs.cur_tasks.fill_(2)
    for x, g in batches(5, 6, C, 3, 2):
        for a, b in zip(take(ours, x, g, tasks), take(theirs, x, g), strict=True):
            close(a, b)
        close(ours.psi.grad, theirs.task_weight.grad)
        close(ours.balance_loss(), theirs.loss)
    close(ours.running_var, theirs.running_var)


def test_region_norm_is_the_authors_but_for_eps_and_the_places_of_a_bias():
    """They multiply eps by the regions' shares, and add both biases in every place."""
    theirs = authors("geekyutao/RN").RN_B(C).double()
    theirs.rn.bn_norm.eps = 1e-12
    ours = RegionNorm(C, eps=1e-12).double()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(2, C))
        theirs.foreground_gamma.copy_(ours.weight[0])
        theirs.background_gamma.copy_(ours.weight[1])
    for x, g in batches(3, 5, C, 3, 2):
        mask = (torch.rand(5, 1, 3, 2) < 0.4).double()
        for a, b in zip(take(ours, x, g, mask), take(theirs, x, g, mask), strict=True):
            close(a, b, 1e-8)
