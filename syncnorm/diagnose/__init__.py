"""Measures of a model on batches: what normalisation does to it, and whether training is healthy.

Each file but these is one measure: a function of a `Problem` (a model, batches, a loss) that
returns plain numbers, the same on all workers and on any number of them.

    problem     batches and passes: losses and gradients of all workers together
    state       the model as it was, whatever a measure has done to it
    observe     sums of what enters the normalisation layers
    population  statistics of the data in place of running ones
    diagnosis   all measures, one after the other, and the time that they will take
    advice      sentences from the numbers
"""

from syncnorm.diagnose.advice import advise
from syncnorm.diagnose.diagnosis import MEASURES, Diagnosis, diagnose
from syncnorm.diagnose.problem import Forward, Problem

__all__ = ["MEASURES", "Diagnosis", "Forward", "Problem", "advise", "diagnose"]
