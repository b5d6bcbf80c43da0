"""Training on a Ray cluster: the command, the job, its driver and its workers."""
