"""Build the stand-in's libraries, and run the tests of CUDA or another command with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.__main__ import test_files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "stand_in"
SITE = Path(torch.__file__).parents[1]
# Whose kernels nobody runs: those of torch's compiler, those that a graph replays, and those that
# torch.nn.SyncBatchNorm has for CUDA alone.
LEFT_OUT = {f"tests/cuda/test_compile{of}.py" for of in ("", "_ranks", "_models")}
NAMES = ["32_bits"]
# Tensors and steps for which the interpreter takes too long.
SLOW = ["sizes_of_networks", "takes_no_memory", "ten_thousand", "long_sum", "many_layers"]
# What docs/cuda.md takes back, and the least memory.
NOT_WITHOUT_TRITON = ["exact-on-integers", "takes_no_memory"]
OPTIONS = ["-q", "-m", "cuda", "-o", "addopts=", "-p", "no:cacheprovider"]
# Functions of the driver that are looked for by their names.
DRIVER = """
cuInit cuDevicePrimaryCtxRetain cuCtxSetCurrent cuCtxGetLimit cuCtxSetLimit cuModuleLoad cuLaunchKernel
cuLaunchKernelEx cuModuleUnload cuFuncSetAttribute cuFuncSetCacheConfig
cuOccupancyMaxActiveClusters cuTensorMapEncodeTiled
"""


def build() -> Path:
    """Compile the libraries into one, which is loaded before those that it stands in for."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [HERE / "cuda.c", HERE / "nccl.c"]
    written = set(re.findall(r"\b(\w+)[()]", "".join(each.read_text() for each in sources)))
    rest = sorted(_called() - written)
    (BUILD / "rest.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in rest))
    # torch's own, which are without their inner parts.
    headers = [each.parent for each in SITE.glob("nvidia/*/include/cuda_runtime_api.h")]
    headers.append(SITE / "triton" / "backends" / "nvidia" / "include")
    library = BUILD / "libcuda.so.1"  # the name by which the driver is loaded
    command = ["gcc", "-shared", "-fPIC", "-O1", *[f"-I{each}" for each in headers]]
    command += ["-o", library, f"-Wl,-soname,{library.name}", *sources, BUILD / "rest.c"]
    subprocess.run([*command, "-ldl", "-lpthread", "-lrt"], check=True)
    return library


def _called() -> set[str]:
    """The functions of CUDA, cuBLAS and NCCL that torch's libraries call."""
    libraries = sorted((SITE / "torch" / "lib").glob("lib*.so"))
    text = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", *libraries],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {*DRIVER.split(), *re.findall(r" U ((?:__)?(?:cuda|cublas|nccl)\w+)", text)}


def main() -> int:
    if torch.version.cuda is None:
        sys.exit("torch must be a build for CUDA here: see `nox --session stand_in`.")
    given, names = sys.argv[1:], [*NAMES, *SLOW]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(build())}
    if given[:1] == ["--without-triton"]:
        given, names = given[1:], [*NAMES, *NOT_WITHOUT_TRITON]
        environment["STAND_IN_TRITON"] = "0"
    environment["TRITON_LIBCUDA_PATH"] = str(BUILD)
    start = HERE / "start"
    if given == ["--host-time"]:  # without what kernels would do
        given, start = ["-m", "drills.stand_in.host_time"], ROOT
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [start, ROOT]))
    tests = [each for each in test_files() if each not in LEFT_OUT]
    options = [*OPTIONS, "-k", " and ".join(f"not {name}" for name in names)]
    command = [sys.executable, *(given or ["-m", "pytest", *options, *tests])]
    return subprocess.run(command, cwd=None if given else ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
