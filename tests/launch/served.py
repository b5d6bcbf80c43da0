"""Imported by the process whose forks are the tests' commands and the ranks of their pools."""

import importlib

from syncnorm.run import env

# Some is read where torch is imported.
env.set_for_launcher(["train"])
for name in ("torch._dynamo", "torch.distributed.run", "syncnorm.testing", "syncnorm._public"):
    importlib.import_module(name)
for name in ("syncnorm.cli", "syncnorm.run.local", "syncnorm.train.loop"):
    importlib.import_module(name)
