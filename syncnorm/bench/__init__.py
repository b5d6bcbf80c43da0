"""Comparison of normalisation layers on this machine, for `syncnorm bench`.

cases, candidates -> worker (on each rank: turns in interleaved rounds) -> runner (starts the
ranks, shares out the time) -> report (JSON), table, plot
"""
