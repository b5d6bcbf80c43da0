"""Imports of the process whose forks are the tests' commands and the ranks of their pools."""

from syncnorm.run import env

# Some is read where torch is imported.
env.set_for_launcher(["train"])

import torch._dynamo
import torch.distributed.run

import syncnorm._public
import syncnorm.cli
import syncnorm.run.local
import syncnorm.testing
import syncnorm.train.loop
