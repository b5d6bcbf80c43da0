"""A stand-in for a GPU: the tests of CUDA where there is none.

    python -m drills.stand_in                           the tests that are marked `cuda`
    python -m drills.stand_in COMMAND ...               a command, such as -m syncnorm train digits
    python -m drills.stand_in --without-triton ...      with torch's operators in place of kernels
    python -m drills.stand_in --host-time               what a layer costs the host

It needs a build of torch for CUDA (`nox --session stand_in` installs one), gcc and nm.

    cuda.c        CUDA's libraries: the device's memory is the host's, and a kernel does nothing
    nccl.c        NCCL: collectives in shared memory, each of which waits for all ranks
    batch_norm.py the operators of torch.nn.SyncBatchNorm, which no CPU has
    operators.py  what kernels would do: torch's own of the CPU, Triton's in its interpreter
    start/        installs these in every process that Python starts

What runs is torch's own code for CUDA down to its libraries: allocator, pinned memory, streams and
events, autograd's thread for the device, DistributedDataParallel, process groups. Triton's kernels
are compiled for an H100 and launched, too. An operator that would make the host wait is seen, and
one that is given tensors of both devices. What does not run is any kernel of a GPU: nothing is said
about their numbers, times and races, and compiled models compute nothing. A graph that is replayed
calls again what was called while it was captured.
"""
