"""`syncnorm doctor`: on this machine, and judging facts of machines that lack something."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from syncnorm.run.doctor import Check, diagnose, exit_status, judge, render
from syncnorm.run.env import Tuning, read_tuning
from syncnorm.run.loopback import try_loopback
from syncnorm.run.machine import Facts, existing_folder

GIB = 2**30
GOOD = Facts(
    python=(3, 11, 7),
    torch_version="2.13.0+cpu",
    backends=("gloo",),
    cuda_devices=(),
    nvidia_devices=0,
    cores=2.0,
    threads=2,
    free_memory=8.0 * GIB,
    run_dir=Path("runs"),
    folder=Path("/home"),
    is_writable=True,
    free_disk=100 * GIB,
    fsync_seconds=0.002,
    shared_memory=None,
    host_name="here",
    host_error="",
    loopback_error=None,
    extras={"train": "0.8.0", "report": "3.11.2", "tensorboard": "2.21.0", "ray": "2.60.0"},
    has_glibc=True,
    tuning=Tuning(
        missing_malloc={"MALLOC_TOP_PAD_": "7"}, is_under_torchrun=False, shares_store=True
    ),
)
TORCHRUN = replace(GOOD.tuning, is_under_torchrun=True)


def test_this_machine(tmp_path):
    checks = {check.name: check for check in diagnose(tmp_path / "runs")}
    for name in ("python", "torch", "backends", "disk", "run folder", "gloo pair", "extra train"):
        assert checks[name].status != "fail", checks[name]
    assert "gloo" in checks["backends"].detail
    assert checks["gloo pair"].detail == "two processes have pooled a sum"
    assert checks["run folder"].detail == f"{tmp_path / 'runs'}, to be made in {tmp_path}"
    assert checks["cores"].detail.startswith(f"{len(os.sched_getaffinity(0))}, ")
    assert list(tmp_path.iterdir()) == []


def test_a_good_machine_has_no_fault():
    checks = judge(GOOD)
    assert {check.status for check in checks} == {"ok"}
    assert {check.remedy for check in checks} == {""}
    assert exit_status(checks) == 0


@pytest.mark.parametrize(
    ("change", "name", "status", "detail", "remedy"),
    [
        ({"python": (3, 10, 4)}, "python", "fail", "3.10.4", "Use Python 3.11"),
        (
            {"torch_version": "2.9.1+cu128"},
            "torch",
            "fail",
            "2.9.1+cu128",
            "pip install 'torch>=2.11'",
        ),
        ({"backends": ()}, "backends", "fail", "none", "with gloo"),
        ({"cuda_devices": ("H200",)}, "backends", "fail", "gloo", "with nccl"),
        ({"nvidia_devices": 4}, "cuda", "warn", "none of 4", "CUDA_VISIBLE_DEVICES"),
        ({"threads": 64}, "cores", "warn", "2, and 64 threads", "export OMP_NUM_THREADS=2"),
        (
            {"cores": 0.5, "threads": 2},
            "cores",
            "warn",
            "0.5, and 2 threads",
            "export OMP_NUM_THREADS=1",
        ),
        ({"free_memory": 1.0 * GIB}, "memory", "warn", "1.0 GiB", "fewer workers"),
        ({"free_memory": 0.3 * GIB}, "memory", "fail", "0.3 GiB", "fewer workers"),
        (
            {"cuda_devices": ("H200",), "shared_memory": GIB // 16},
            "/dev/shm",
            "warn",
            "0.06 GiB",
            "--shm-size=1g",
        ),
        ({"cuda_devices": ("H200",)}, "/dev/shm", "warn", "none", "--shm-size=1g"),
        ({"folder": None}, "run folder", "fail", "runs", "Set run_dir"),
        ({"is_writable": False}, "run folder", "fail", "runs", "Set run_dir"),
        ({"free_disk": GIB}, "disk", "warn", "1.0 GiB", "checkpoint.keep"),
        ({"free_disk": 0}, "disk", "fail", "0.0 GiB", "checkpoint.keep"),
        ({"fsync_seconds": 0.25}, "fsync", "warn", "250.0 ms", "checkpoint.every"),
        ({"host_error": "not known"}, "host name", "warn", "here: not known", "/etc/hosts"),
        (
            {"loopback_error": "RuntimeError: x"},
            "gloo pair",
            "fail",
            "RuntimeError: x",
            "GLOO_SOCKET_IFNAME",
        ),
        (
            {"extras": {"train": None}},
            "extra train",
            "fail",
            "is not installed",
            "pip install 'syncnorm[train]'",
        ),
        (
            {"extras": {"ray": None}},
            "extra ray",
            "warn",
            "is not installed",
            "pip install 'syncnorm[ray]'",
        ),
        (
            {"tuning": TORCHRUN},
            "malloc",
            "warn",
            "not set: MALLOC_TOP_PAD_",
            "export MALLOC_TOP_PAD_=7",
        ),
        (
            {"tuning": TORCHRUN},
            "restarts",
            "warn",
            "of before",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(change, name, status, detail, remedy):
    facts = replace(GOOD, **change)
    (check,) = [check for check in judge(facts) if check.name == name]
    assert check.status == status
    assert detail in check.detail
    assert remedy in check.remedy
    assert exit_status([check]) == (status == "fail")


def test_what_is_right_under_torchrun():
    tuning = Tuning(missing_malloc={}, is_under_torchrun=True, shares_store=False)
    checks = {check.name: check.status for check in judge(replace(GOOD, tuning=tuning))}
    assert checks["malloc"] == checks["restarts"] == "ok"


def test_other_systems_have_another_malloc():
    assert "malloc" not in {
        check.name for check in judge(replace(GOOD, has_glibc=False, tuning=TORCHRUN))
    }


def test_a_file_in_the_way_of_the_run_folder(tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert existing_folder(tmp_path / "taken") is None
    assert existing_folder(tmp_path / "taken" / "below") is None
    assert existing_folder(tmp_path / "free" / "below") == tmp_path


def test_render():
    checks = [
        Check("one", "ok", "fine"),
        Check("longer", "warn", "slow", "hurry"),
        Check("two", "fail", "gone", "buy"),
    ]
    assert render(checks).splitlines() == [
        "ok    one     fine",
        "warn  longer  slow",
        "              -> hurry",
        "fail  two     gone",
        "              -> buy",
        "1 ok, 1 warn, 1 fail",
    ]


def test_a_pair_that_cannot_meet_says_why(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert "nowhere0" in (try_loopback() or "")


def test_a_pair_has_a_deadline():
    assert try_loopback(deadline_seconds=0.01) == "no sum within 0.01 seconds"


def test_the_environment(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    tuning = read_tuning()
    assert tuning.missing_malloc == {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
    }
    assert (tuning.is_under_torchrun, tuning.shares_store) == (False, True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert (read_tuning().is_under_torchrun, read_tuning().shares_store) == (True, False)
