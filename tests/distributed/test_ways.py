"""What ranks compute and send with is what their environment says.

`nox --session ways` runs tests of the package without the native library, with it on some workers
only, and without shared memory; this one says whether it does.
"""

from __future__ import annotations

import torch

from syncnorm.comm import groups, shared
from syncnorm.maths import kernels
from tests import ways


def _has() -> tuple[bool, bool]:
    """True if this rank has the native kernels, and if it shares memory with the others."""
    group = groups.statistics_group()
    assert group is not None
    is_native = kernels.fused_for(torch.ones(2, 3)) is kernels.native
    return is_native, shared.segment_of(group) is not None


def test_ranks_have_what_their_environment_says(pool):
    has_library = [kernels.native.is_usable(torch.ones(1))] * 2
    has_library[1] &= not ways.is_mixed()
    is_shared = ways.refusal() == ""
    assert pool(2).run(_has) == [(each, is_shared) for each in has_library]
