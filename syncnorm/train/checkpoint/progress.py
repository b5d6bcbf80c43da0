"""How far a run has come."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Position:
    """Where a run stands; readable from outside when it ends early.

    Args:
        epoch: the one under way or last done, from 1; 0 before the first.
        step_in_epoch: steps of it that are done.
        step: steps of the whole run that are done.
        loss_sum: sum of the losses of this epoch's steps so far.
        test_accuracy: after the last whole epoch, 0 to 1; None before.
        best_accuracy: the highest so far.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    test_accuracy: float | None = None
    best_accuracy: float | None = None

    def as_facts(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float."""
        return asdict(self)

    def become(self, facts: dict[str, Any]) -> None:
        """Take over what `as_facts` gave; TypeError or KeyError if it is something else."""
        for name, value in asdict(Position(**{name: facts[name] for name in asdict(self)})).items():
            setattr(self, name, value)
