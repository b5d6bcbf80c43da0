"""Loggers that a configuration of a test names."""

import json
import threading

IN_HAND = threading.Event()


class Keeps:
    """Writes what it gets into the run's folder."""

    def __init__(self, run, *, file="kept.jsonl"):
        self._path = run.folder / file
        started = {"name": run.name, "tags": list(run.tags), "lr": run.config["train"]["lr"]}
        self._write(started | {"before": run.recall("keeps")})
        run.remember("keeps", "id-1")

    def _write(self, what):
        with self._path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def log(self, step, figures):
        self._write({"step": step, **figures})

    def close(self):
        self._write("closed")


class Raises:
    """Raises in one of its methods."""

    def __init__(self, run, *, method):
        self._method = method
        self._raise("__init__")

    def _raise(self, method):
        if method == self._method:
            raise RuntimeError(f"no {method}\ntoday")

    def log(self, step, figures):
        self._raise("log")

    def close(self):
        self._raise("close")
