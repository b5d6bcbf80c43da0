"""CrossQ with our batch renormalisation in place of sb3-contrib's.

    python examples/crossq_pendulum.py

Needs sb3-contrib (and with it stable-baselines3 and gymnasium). A random policy gets about -1200, a
good one -150.
"""

import torch
from sb3_contrib import CrossQ
from stable_baselines3.common.evaluation import evaluate_policy

from syncnorm.integrations.crossq import convert_policy

torch.set_num_threads(1)
STEPS = 2500

# %%
model = CrossQ(
    "MlpPolicy", "Pendulum-v1", learning_starts=200, batch_size=128, seed=0,
    policy_kwargs={"net_arch": {"pi": [64, 64], "qf": [128, 128]}, "renorm_warmup_steps": 300},
)  # fmt: skip
convert_policy(model.policy)
print(model.policy.actor.latent_pi[0])

# %%
for when in ("before", "after"):
    if when == "after":
        model.learn(STEPS)
    mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=5, warn=False)
    print(f"episode return {when} {STEPS} steps: {mean:.0f} (standard deviation {std:.0f})")
