"""Tests and figures of a machine with an NVIDIA GPU, by one command: `python -m benchmarks.gpu`.

    __main__.py     runs the parts, one after the other, and keeps what each has found
    part.py         what the parts share: how long they may take, and the rows that they write
    timing.py       clocks, and groups of processes
    machine.py      the card and the versions
    outcomes.py     a plugin of pytest that writes down each test's outcome
    step.py         a training step of ResNet-50, by normalisation layer
    primitives.py   the kernels against the bandwidth of a copy, and torch's own
    layers.py       microseconds of small layers
    table.py        the Markdown table

Each part is a process of its own, so that one that breaks the device, or hangs, is one part lost.
Needs torch >= 2.11 with its Triton, numpy, pytest and hypothesis; no network, nothing installed.
"""
