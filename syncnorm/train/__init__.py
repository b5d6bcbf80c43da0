"""The trainer: configuration, data, models, and the loop over them.

A run goes through the files in this order:

    config/       file.py reads YAML (strict_yaml.py) and overrides, schema.py checks every key,
                  messages.py writes the errors; callables.py imports code that a key names
    workers.py    the workers, and the placement of a step, whose rules are `syncnorm.placement`
    setup.py      builds a `Setup` of what follows: data, task, model, DDP, optimizer (optim.py,
                  parameters.py), the moving average (average.py, with renewal.py)
    data/         from files or a callable to the batches of a step; its own page has the files
    task/         the loss of a batch and the metrics, as sums and counts
    build_model.py
                  the network: of models.py, of packages.py or a callable; norm.py gives it its
                  layers, weights.py the weights it begins with, efficiency.py a cheaper step
    trial.py      tries the task on a few samples; memory.py refuses a step that would not fit
    step.py       one optimizer step: `training_step`, from forward to the new parameters;
                  step_notes.py is what the workers tell each other of it, scaling.py for float16
    loop.py       `train`: epochs of steps, evaluation, checkpoints, until the end or a stop;
                  callbacks.py has the points where code of the user's is called
    checkpoint/   capture.py gathers the state and restores it, of the same_run.py alone; saver.py
                  writes in the background, store.py keeps the folders, snapshot.py is the format
    recorder.py   records it all: metrics.jsonl (metrics.py), the screen (header.py, display.py),
                  predictions.py, loggers/; storage/ copies a run's folder elsewhere
    finished/     what is done with a run once it has trained; report/ is its page

Beside the path: diagnose.py (warnings of the first step, the origin of a NaN), buffers.py (a
model's own buffers, digests), unused.py (parameters without a part in the loss), waiting.py (what
the first worker does while the others wait), files.py (whole files or none).

`syncnorm.run` starts the processes that call `loop.train`.
"""

from syncnorm.system import require_posix

require_posix("syncnorm.train")
