"""Whether the present forward repeats another, or may be repeated, by activation checkpointing."""

from __future__ import annotations

import torch

from syncnorm import undocumented


def is_recomputing() -> bool:
    """True if this forward repeats an earlier one inside a backward pass, as checkpointing does.

    False in code that is being compiled, which does not know: see `compiled.unless_repeated`.
    """
    return not torch.compiler.is_compiling() and undocumented.backward_pass() != -1


def may_be_repeated() -> bool:
    """False if no activation checkpointing can repeat the forward that runs.

    Not for code that is being compiled, which does not know. Non-reentrant checkpointing sets hooks
    on what autograd saves; the re-entrant kind runs the first forward inside an autograd Function,
    where forward-mode gradients are off.
    """
    return undocumented.saved_tensor_hooks() is not None or not (
        torch.is_grad_enabled() and undocumented.is_forward_mode_enabled()
    )


def has_gradient_later() -> bool:
    """True in the first forward of a re-entrant checkpoint: its gradient is that of the repetition."""
    return any(
        undocumented.is_reentrant(each)
        for each, is_again in undocumented.checkpoints()
        if not is_again
    )
