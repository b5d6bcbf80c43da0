"""Imported by the process whose forks are the tests' commands and the ranks of their pools."""

import contextlib
import importlib

from syncnorm.run import env

# Some is read where torch is imported.
env.set_for_launcher(["train"])
for name in (
    "torch._dynamo",
    "torch._dynamo.backends.debugging",  # of a first compilation
    "torch.distributed.run",
    "syncnorm._public",
    "syncnorm.cli",
    "syncnorm.run.local",
    "syncnorm.testing",
    "syncnorm.verify",
    "tests.train.runs",
):
    importlib.import_module(name)
# Takes half as long as torch, in each rank that runs an example.
with contextlib.suppress(ImportError):
    importlib.import_module("sklearn.datasets")
