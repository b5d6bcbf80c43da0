"""Drills: random sequences of calls, and runs that are killed, against what should come of them."""
