"""`syncnorm doctor`: on this machine, and its checks given values of machines that lack something."""

import os
import tomllib
from pathlib import Path

import pytest
import torch

from syncnorm.run.doctor import (
    Check,
    check_backends,
    check_cores,
    check_cuda,
    check_disk,
    check_environment,
    check_extra,
    check_fsync,
    check_gloo_pair,
    check_host_name,
    check_machine,
    check_memory,
    check_messages,
    check_native,
    check_python,
    check_run_folder,
    check_shared_memory,
    check_torch,
    existing_folder,
    exit_status,
    render,
)
from syncnorm.run.env import Tuning, read_tuning, set_for_nccl
from syncnorm.run.loopback import try_loopback

ROOT = Path(__file__).parents[2]
GIB = 2**30
RUNS, HOME = Path("runs"), Path("/home")
UNSET = Tuning(missing_malloc={"MALLOC_TOP_PAD_": "7"}, is_under_torchrun=True, shares_store=True)
BY_HAND = Tuning(missing_malloc=UNSET.missing_malloc, is_under_torchrun=False, shares_store=True)


def test_this_machine(tmp_path):
    checks = {check.name: check for check in check_machine(tmp_path / "runs")}
    for name in ("python", "torch", "backends", "disk", "run folder", "gloo pair", "extra train"):
        assert checks[name].status != "fail", checks[name]
    assert "gloo" in checks["backends"].detail
    assert checks["gloo pair"].detail == "two processes have pooled a sum"
    assert checks["run folder"].detail == f"{tmp_path / 'runs'}, to be made in {tmp_path}"
    assert checks["cores"].detail.startswith(f"{len(os.sched_getaffinity(0))}, ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    whole = project["optional-dependencies"]["all"][0].removeprefix("syncnorm[").removesuffix("]")
    extras = [
        f"extra {name}" for name in whole.split(",") if name != "cuda" or torch.cuda.is_available()
    ]
    assert list(checks) == [
        "python", "torch", "backends", "cuda", "cores", "memory", "/dev/shm", "run folder", "disk", "fsync",
        "host name", "gloo pair", "native library", "shared messages", *extras,
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (check_python, ((3, 11, 7),)),
        (check_torch, ("2.13.0+cpu",)),
        (check_torch, ("2.11.0",)),
        (check_backends, (["gloo"], [])),
        (check_backends, (["gloo", "nccl"], ["H200"])),
        (check_cuda, ([], 0)),
        (check_cuda, (["H200"], 1)),
        (check_cores, (2.0, 2)),
        (check_memory, (8.0 * GIB,)),
        (check_shared_memory, (None, [])),
        (check_shared_memory, (GIB, ["H200"])),
        (check_run_folder, (RUNS, HOME, True)),
        (check_disk, (100 * GIB,)),
        (check_host_name, ("here", "")),
        (check_gloo_pair, (None,)),
        (check_extra, ("train", "0.8.0")),
        (check_native, (True, "x86-64-v3")),
        (check_messages, ("",)),
        (check_extra, ("ray", "2.60.0")),
    ],
)
def test_a_good_machine_has_no_fault(check, values):
    found = check(*values)
    assert (found.status, found.remedy) == ("ok", "")
    assert exit_status([found]) == 0


def test_checks_that_ask_nothing_here():
    assert list(check_environment(BY_HAND, has_glibc=True)) == []
    assert list(check_fsync(None)) == []
    assert [check.status for check in check_fsync(0.002)] == ["ok"]


@pytest.mark.parametrize(
    ("check", "values", "status", "detail", "remedy"),
    [
        (check_python, ((3, 10, 4),), "fail", "3.10.4", "Use Python 3.11"),
        (check_torch, ("2.9.1+cu128",), "fail", "2.9.1+cu128", "pip install 'torch>=2.11'"),
        (check_backends, ([], []), "fail", "none", "with gloo"),
        (check_backends, (["gloo"], ["H200"]), "fail", "gloo", "with nccl"),
        (check_cuda, ([], 4), "warn", "none of 4", "CUDA_VISIBLE_DEVICES"),
        (check_cores, (2.0, 64), "warn", "2, and 64 threads", "export OMP_NUM_THREADS=2"),
        (check_cores, (0.5, 2), "warn", "0.5, and 2 threads", "export OMP_NUM_THREADS=1"),
        (check_memory, (1.0 * GIB,), "warn", "1.0 GiB", "fewer workers"),
        (check_memory, (0.3 * GIB,), "fail", "0.3 GiB", "fewer workers"),
        (check_shared_memory, (GIB // 16, ["H200"]), "warn", "0.06 GiB", "--shm-size=1g"),
        (check_shared_memory, (None, ["H200"]), "warn", "none", "--shm-size=1g"),
        (check_run_folder, (RUNS, None, False), "fail", "runs", "Set run_dir"),
        (check_run_folder, (RUNS, HOME, False), "fail", "runs", "Set run_dir"),
        (check_disk, (GIB,), "warn", "1.0 GiB", "checkpoint.keep"),
        (check_disk, (0,), "fail", "0.0 GiB", "checkpoint.keep"),
        (check_host_name, ("here", "not known"), "warn", "here: not known", "/etc/hosts"),
        (check_gloo_pair, ("RuntimeError: x",), "fail", "RuntimeError: x", "GLOO_SOCKET_IFNAME"),
        (check_extra, ("train", None), "fail", "not installed", "pip install 'syncnorm[train]'"),
        (check_native, (False, "not built"), "warn", "not built", "C compiler"),
        (check_messages, ("not on darwin",), "warn", "not on darwin", "over gloo"),
        (check_extra, ("ray", None), "warn", "not installed", "pip install 'syncnorm[ray]'"),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(check, values, status, detail, remedy):
    found = check(*values)
    assert found.status == status
    assert detail in found.detail
    assert remedy in found.remedy
    assert exit_status([found]) == (status == "fail")


def test_a_slow_disk():
    (found,) = check_fsync(0.25)
    assert (found.status, found.detail) == ("warn", "250.0 ms for a small file")
    assert "checkpoint.every" in found.remedy


def test_what_is_wrong_under_torchrun():
    malloc, restarts = check_environment(UNSET, has_glibc=True)
    assert (malloc.name, malloc.status) == ("malloc", "warn")
    assert malloc.detail == "not set: MALLOC_TOP_PAD_"
    assert malloc.remedy == "export MALLOC_TOP_PAD_=7"
    assert (restarts.name, restarts.status) == ("restarts", "warn")
    assert "of before" in restarts.detail
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in restarts.remedy


def test_what_is_right_under_torchrun():
    tuning = Tuning(missing_malloc={}, is_under_torchrun=True, shares_store=False)
    found = {check.name: check.status for check in check_environment(tuning, has_glibc=True)}
    assert found == {"malloc": "ok", "restarts": "ok"}


def test_other_systems_have_another_malloc():
    assert [check.name for check in check_environment(UNSET, has_glibc=False)] == ["restarts"]


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


def test_nccl_launches_in_order_unless_the_user_says_otherwise(monkeypatch):
    for given, expected in (("0", "0"), (None, "1")):
        monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", given or "")
        if given is None:
            monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT")
        set_for_nccl()
        assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == expected
