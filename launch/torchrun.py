"""Train under torchrun, on one node or many:

    torchrun --nproc-per-node 2 launch/torchrun.py configs/digits.yaml [key=value ...]

The same as `torchrun --nproc-per-node 2 -m syncnorm train configs/digits.yaml`, for platforms that
want a script.
"""

import sys

from syncnorm.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
