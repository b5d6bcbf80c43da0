"""Getting the trainer started: on this machine, or as one worker of a launcher."""
