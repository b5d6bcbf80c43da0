"""What is done with a run once it has trained, one file each; `syncnorm.run` has the commands.

load.py         its model, ready to be used on raw inputs
evaluate.py     its metrics on one of its sets, or on other data
predict.py      its predictions, as rows
export.py       its model for programs that do not know syncnorm
merge.py        one network of those of two runs
recalibrate.py  population statistics in place of running ones
diagnose.py     how it trains; parts.py takes a step apart for it
"""
