"""The entrypoint of a Ray job, for platforms that submit jobs themselves:

    python launch/ray_train.py configs/digits.yaml [key=value ...]

`run_dir` must be on a file system that all machines of the cluster share. Give the job
RAY_JOB_STOP_WAIT_TIME_S=120 in its runtime environment: Ray otherwise kills after 3 seconds what it
stops, and nothing is saved.
"""

import sys

from syncnorm.run.ray.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
