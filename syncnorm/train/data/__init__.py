"""The data of a run, from files or a callable to the batches of a step.

    datasets.py     `Dataset`: images in memory as tensors; builtin.py has those with a name, whose
                    files paths.py finds and idx.py and cifar.py read
    splits.py       `Splits`: any map-style data sets; sources/ makes them of files, a format each
    feed.py         `MemoryFeed` of the one, `LoaderFeed` of the other: batches for the loop
    regimes.py      the order of an epoch's samples
    augment.py      random changes of images in a batch, augmented.py those of samples, mixing.py
                    of pairs; seeded.py and generators.py make them depend on the sample alone
    inputs.py       what a sample is before it is standardised, so that a model takes raw ones

and batches.py (batches of any shape), classes.py (targets that are classes), same.py (all workers
have the same data).
"""
