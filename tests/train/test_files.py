"""Files that are whole or absent, folders with one writer, and metrics."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from syncnorm.errors import ConfigError
from syncnorm.run.ending import read_exit
from syncnorm.run.folder import check_resumable, lock, write_config
from syncnorm.run.watchdog import Watchdog, open_log
from syncnorm.train.config.file import load_config
from syncnorm.train.files import (
    check_output,
    only_writer,
    open_regular,
    remove,
    write_text_whole,
    written_whole,
)
from syncnorm.train.metrics import MetricsFile, last_step, read_events


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a"
    write_text_whole(path, "old")
    write_text_whole(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_text_whole(path, "old")

    def half():
        with written_whole(path) as file:
            file.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_user_asks_for_replaces_no_device_and_no_pipe(tmp_path):
    pipe, stdout, link = (tmp_path / name for name in ("pipe", "stdout", "link"))
    os.mkfifo(pipe)
    stdout.symlink_to("/proc/self/fd/1")
    link.symlink_to("new")
    for path in (Path("/dev/null"), Path("/dev/stdout"), pipe, stdout):
        with pytest.raises(ConfigError, match=r"`--page` must be a file, got .*, a device or a"):
            check_output(path, "--page")
    for path in (link, tmp_path, tmp_path / "new"):
        check_output(path)
    link.with_name("new").touch()
    check_output(link)


def test_only_a_regular_file_is_opened(tmp_path):
    regular, link, folder, pipe = (
        tmp_path / name for name in ("regular", "link", "folder", "pipe")
    )
    regular.write_bytes(b"content")
    link.symlink_to(regular)
    folder.mkdir()
    os.mkfifo(pipe)  # to open it would wait for a writer
    with open_regular(regular) as file:
        assert file.read() == b"content"
    for path in (link, folder, pipe):
        with pytest.raises(OSError, match="Not a regular file"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


def test_a_link_is_removed_and_what_it_points_to_is_not(tmp_path):
    kept, link, folder = tmp_path / "kept", tmp_path / "link", tmp_path / "folder"
    kept.mkdir()
    (kept / "file").write_text("kept")
    link.symlink_to(kept)
    folder.mkdir()
    (folder / "link").symlink_to(kept)
    for path in (link, folder, tmp_path / "absent"):
        remove(path)
    assert list(tmp_path.iterdir()) == [kept]
    assert (kept / "file").read_text() == "kept"


def test_one_writer_at_a_time(tmp_path):
    with only_writer(tmp_path):
        with pytest.raises(BlockingIOError, match=f"Somebody else is writing there: '{tmp_path}'"):
            with only_writer(tmp_path):
                pass
    with only_writer(tmp_path):
        pass


def test_a_dead_writer_keeps_nobody_out(tmp_path):
    def hold():
        with only_writer(tmp_path):
            is_in.send(None)
            signal.pause()

    said, is_in = multiprocessing.Pipe(duplex=False)
    with forked(hold):
        assert said.poll(20)
        with pytest.raises(BlockingIOError), only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        pass


def test_a_process_forked_meanwhile_does_not_hold_the_lock(tmp_path):
    with contextlib.ExitStack() as stack:
        with only_writer(tmp_path):
            stack.enter_context(forked(signal.pause))
        with only_writer(tmp_path):
            pass


@contextlib.contextmanager
def forked(run):
    """A child that runs `run` until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_metrics_are_json_lines_also_when_a_loss_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write("step", step=1, loss=0.5)
    metrics.write("step", step=2, loss=float("nan"))
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"event": "step", "step": 1, "loss": 0.5}
    assert second["loss"] == "nan"
    assert last_step(path) == 2


def raise_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_metrics_that_cannot_be_written_are_lost_with_one_word(caplog, tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", raise_full)
        for step in range(3):
            metrics.write("step", step=step)
    (message,) = caplog.messages
    assert message == f"{path}: cannot be written, the run goes on without: No space left on device"
    metrics.write("step", step=3)
    assert last_step(path) == 3


def test_a_line_that_is_cut_off_by_a_full_disk_leaves_the_next_one_whole(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write("step", step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        metrics.write("step", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.write("step", step=3)
    (message,) = caplog.messages
    assert message.endswith("cannot be written, the run goes on without: File too large")
    events, torn = read_events(path)
    assert [event["step"] for event in events] == [1, 3]
    assert torn == 0


def _log_to(path):
    root = logging.getLogger()
    before = root.handlers[:]
    open_log(path, is_first=False)
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        (".tmp-config.yaml", lambda folder: write_text_whole(folder / "config.yaml", "run: 1\n")),
        ("metrics.jsonl", lambda folder: MetricsFile(folder / "metrics.jsonl").write("step")),
        ("run.lock", lock),
        ("logs/rank-0.log", lambda folder: _log_to(folder / "logs/rank-0.log")),
        ("stacks-0.txt", lambda folder: Watchdog(60, folder / "stacks-0.txt").close()),
    ],
    ids=["config", "metrics", "lock", "log", "stacks"],
)
def test_a_link_in_a_runs_folder_leads_nowhere(name, write, tmp_path):
    """The folder may be somebody else's, and the file at the other end one that a shell reads."""
    other, folder = tmp_path / "other", tmp_path / "run"
    other.write_text("alias ll=ls")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(other)
    with contextlib.suppress(ConfigError):  # of a lock
        write(folder)
    assert other.read_text() == "alias ll=ls"
    # What is refused stays for somebody to look at; in place of others the file is written.
    assert (folder / name).is_symlink() == (name in ("metrics.jsonl", "run.lock"))


def test_a_pipe_in_a_runs_folder_is_not_waited_for(tmp_path):
    for name in ("metrics.jsonl", "exit.json", "run.lock"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="Not a regular file"):
        read_events(tmp_path / "metrics.jsonl")
    assert last_step(tmp_path / "metrics.jsonl") == 0
    MetricsFile(tmp_path / "metrics.jsonl").write("step", step=1)
    assert read_exit(tmp_path) is None
    with pytest.raises(
        ConfigError, match=r"must be writable, its run.lock too: Not a regular file"
    ):
        lock(tmp_path)
    for name in ("log", "stacks"):
        os.mkfifo(tmp_path / name)
    _log_to(tmp_path / "log")
    Watchdog(60, tmp_path / "stacks").close()


def test_a_record_that_is_a_link_is_read_and_not_resumed(tmp_path):
    config = load_config("digits", [])
    write_config(config, tmp_path)
    (tmp_path / "kept").write_text('{"event": "step", "step": 7}\n')
    (tmp_path / "metrics.jsonl").symlink_to("kept")
    assert last_step(tmp_path / "metrics.jsonl") == 7
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"metrics.jsonl' must be a file, .*, got a link"):
            check_resumable(config, tmp_path)
        (tmp_path / "kept").unlink(missing_ok=True)  # then it leads nowhere


@pytest.mark.parametrize("left", ["", '{"event": "step", "step": 1}\n'])
@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ('{"event": "st', ""),
        ("[" * 100_000, ""),
        ('{"event": "stop"}', '{"event": "stop"}\n'),  # as an editor leaves it
    ],
    ids=["torn", "deep", "whole"],
)
def test_a_line_that_a_killed_run_has_left_without_its_end(tmp_path, left, last, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(left + last)
    MetricsFile(path).write("step", step=2)
    assert path.read_text() == left + kept + '{"event": "step", "step": 2}\n'


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5_000, "[1]", '{"step": 7}', "\xff"])
def test_lines_that_are_no_events(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n\n' + line + "\n", encoding="latin-1")
    assert read_events(path) == ([{"event": "step", "step": 1}], 1)
    assert last_step(path) == 1


def test_nothing_on_record(tmp_path):
    assert last_step(tmp_path / "metrics.jsonl") == 0


def test_a_worker_that_does_not_write():
    MetricsFile(None).write("step", step=1)
