"""Send a training run to a Ray cluster as a job, and follow it:

    python launch/ray_submit.py configs/digits.yaml [key=value ...] [--address http://HOST:PORT]

The same as `syncnorm submit configs/digits.yaml`, for platforms that want a script. `--help` has
the options.
"""

import sys

from syncnorm.__main__ import main

if __name__ == "__main__":
    main(["submit", *sys.argv[1:]])
