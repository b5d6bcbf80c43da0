"""CrossQ's batch renormalisation replaced, in the real sb3-contrib."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.frameworks import frameworks

with_frameworks = frameworks("sb3_contrib")

WARMUP, N, C = 3, 64, 4


def _layers(warmup_steps: int = WARMUP) -> tuple[nn.Module, nn.Module]:
    """Theirs and its copy that became ours."""
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    from syncnorm.integrations.crossq import convert_policy

    theirs = nn.Sequential(BatchRenorm1d(C, warmup_steps=warmup_steps)).double()
    return theirs, convert_policy(copy.deepcopy(theirs))


def _batches(steps: int) -> list[Tensor]:
    """Their mean drifts, so that the running statistics lag, and corrections are large."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(N, C, generator=g, dtype=torch.float64) * 2 + step for step in range(steps)]


def _worst(theirs: nn.Module, ours: nn.Module, steps: int = 8) -> float:
    outputs = [(theirs(x), ours(x)) for x in _batches(steps)]
    return max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in outputs)


def test_training_is_theirs_but_for_the_unbiased_variance_and_the_running_statistics_are_theirs():
    theirs, ours = _layers()
    assert _worst(theirs, ours) < 1.0 / N
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], value, torch.float64, name)
    x = _batches(1)[0]
    assert_close(ours.eval()(x), theirs.eval()(x), torch.float64, "evaluation")


def test_a_variance_of_the_size_of_eps_is_normalised_as_in_the_paper():
    """Theirs adds eps to var / r^2 after the warm-up."""
    theirs, ours = _layers(warmup_steps=-1)
    eps, running_var = ours[0].eps, 0.004
    ours[0].running_var.fill_(running_var)
    theirs[0].ra_var.fill_(running_var)
    x = torch.randn(4096, C, dtype=torch.float64) * 0.03
    y = ours(x)
    assert_close(y, x / (running_var + eps) ** 0.5, torch.float64, "sigma_B r is the running one")
    assert theirs(x).std() > 1.1 * y.std()


def test_the_warm_up_ends_with_the_same_batch():
    """The negative control of the test above: one batch later is far off."""
    assert _worst(_layers(WARMUP)[0], _layers(WARMUP + 1)[1]) > 10.0 / N


def test_numbers_and_tensors_stay_and_their_state_dicts_go_both_ways():
    theirs, ours = _layers()
    for x in _batches(2):
        theirs(x)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert int(ours[0].num_batches_tracked) == 2
    ours(_batches(1)[0])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs[0].ra_mean, ours[0].running_mean)
    again = copy.deepcopy(ours)
    assert list(dict(again.named_parameters())) == ["0.weight", "0.bias"], "the optimizer's order"


def test_layers_without_parameters_are_refused_before_anything_is_changed():
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    from syncnorm.integrations.crossq import convert_policy

    model = nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3, affine=False))
    with pytest.raises(
        InputError,
        match=r"`policy` must have layers with affine=True, got BatchRenorm1d\(.* at '1'",
    ):
        convert_policy(model)
    assert type(model[0]) is BatchRenorm1d


def test_a_policy_trains_and_is_saved_and_loaded(tmp_path):
    from sb3_contrib import CrossQ

    from syncnorm.integrations.crossq import CrossQRenorm, convert_policy

    small = {"net_arch": {"pi": [16], "qf": [16]}, "renorm_warmup_steps": 10}
    model = CrossQ(
        "MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=16, policy_kwargs=small, seed=0
    )
    model.learn(30)
    observations = model.replay_buffer.sample(16).observations

    def acts(model: CrossQ) -> Tensor:
        model.policy.set_training_mode(False)
        return model.policy.actor(observations, deterministic=True)

    before, parameters = acts(model), list(model.critic.parameters())
    convert_policy(model.policy)
    assert_close(acts(model), before, torch.float32, "actions")
    held = [p for group in model.critic.optimizer.param_groups for p in group["params"]]
    assert (
        [id(p) for p in held]
        == [id(p) for p in parameters]
        == [id(p) for p in model.critic.parameters()]
    )
    layers = [m for m in model.policy.modules() if isinstance(m, CrossQRenorm)]
    counts = [int(m.num_batches_tracked) for m in layers]
    model.learn(30, reset_num_timesteps=False)
    assert all(int(m.num_batches_tracked) > count for m, count in zip(layers, counts, strict=True))
    assert not torch.equal(acts(model), before)
    model.save(tmp_path / "model")
    loaded = CrossQ.load(tmp_path / "model")
    assert not any(isinstance(m, CrossQRenorm) for m in loaded.policy.modules())
    assert_close(acts(loaded), acts(model), torch.float32, "actions of the saved model")
