"""The trainer: configuration, data, models, and the loop over them.

A run goes through the files in this order:

    config/       file.py reads YAML (strict_yaml.py) and overrides, schema.py checks every key,
                  messages.py writes the errors; callables.py imports code that a key names
    setup.py      builds a `Setup`: data set, model (models.py, norm.py), DDP, optimizer (optim.py),
                  the moving average (average.py)
    memory.py     refuses a step that would not fit into memory
    placement.py  the workers, and the placement of a step, whose rules are `syncnorm.placement`
    data/         datasets.py holds the images, augment.py changes them
    step.py       one optimizer step: `training_step`, from forward to the new parameters; notes.py
                  are what the workers tell each other of it
    loop.py       `train`: epochs of steps, evaluation, checkpoints, until the end or a stop
    checkpoint/   capture.py gathers the state and restores it, saver.py writes in the background,
                  store.py keeps the folders, snapshot.py is the format of one
    recorder.py   records it all: metrics.jsonl (metrics.py), the screen (header.py, display.py),
                  TensorBoard

Beside the path: diagnose.py (warnings of the first step, the origin of a NaN), buffers.py (a
model's own buffers, digests), unused.py (parameters without a part in the loss), files.py (whole
files or none), recalibrate.py, report/ (HTML page).

`syncnorm.run` starts the processes that call `loop.train`.
"""

from syncnorm.system import require_posix

require_posix("syncnorm.train")
