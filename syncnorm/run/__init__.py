"""Commands and launchers: processes that train, and everything that starts and watches them.

A launcher starts one process per rank, with RANK, WORLD_SIZE and so on in its environment (`env`).
Under every launcher the rank gets to `worker.train_in`, which calls `syncnorm.train.loop.train`:

    launcher   command                       a rank runs           restarted by
    torchrun   torchrun -m syncnorm train    worker.run_worker     torchrun's agent
    local      syncnorm train                worker.run_launched   local
    Ray        syncnorm submit               ray.worker.work       Ray Train, ray.driver

    process                     files
    the command                 use (options, export), arguments, resume, in_process, interrupt; one each of
                                dry_run, verify, doctor, bench, diagnose, recalibrate, evaluate,
                                predict (of samples), merge
    a program, a notebook       fit, given (its objects), notebook (progress)
    launcher, this machine      local (a run), own_workers (one piece of work), processes,
                                machine (devices, memory), failures (their cause)
    worker                      worker, joining (the others), entering (the run's folder), watchdog
                                (stop signals, stuck limit, log)
    any of them                 request (a run as it is asked for), env (environment variables), folder
                                (a run's folder), ending (`exit.json`), errors
    doctor's two processes      loopback

    the command, for Ray        ray.cli, ray.client (job server), ray.submit (jobs), ray.environment
    sweeps                      ray.space (values of keys), ray.sweep (trials), ray.results,
                                ray.tune (driver)
    driver of a Ray job         ray.driver, ray.cluster (capacity), ray.verify (`syncnorm verify`)
    Ray Train's controller      ray.resize (save before the number of workers changes)
    worker, thread of an actor  ray.worker
    all of Ray's                ray.job (the job's description)

Exit status: 0 done, 1 failed, 2 bad input, 75 saved and resumable, 128 + n ended by signal n.
"""

from syncnorm.system import require_posix

require_posix("syncnorm.run")
