"""The machine code of a GPU, as NVIDIA's tools in Triton's package print it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _printed(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its local memory, where spills go."""
    text = _printed(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def loop_over_memory(cubin: bytes) -> list[str]:
    """The instructions, without their guards, of the innermost loop with the most loads."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in _printed(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(code)
        elif statement := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            jump = re.match(r"BRA.*`\((\.L_\S+?)\)", statement[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(code)))
            code.append(statement[1])
    inner = [
        code[first : last + 1]
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    return max(inner, key=lambda body: sum(each.startswith("LDG") for each in body))


def loads(loop: list[str]) -> tuple[list[int], int]:
    """Where a loop loads 16 bytes, and where it first uses any of them."""
    places = [i for i, each in enumerate(loop) if each.startswith("LDG.E.128")]
    first_use = len(loop)
    for place in places:
        to = int(re.findall(r"\bR(\d+)", loop[place])[0])
        loaded = {f"R{i}" for i in range(to, to + 4)}
        for i, each in enumerate(loop[place + 1 : first_use], place + 1):
            if loaded & set(re.findall(r"\bR\d+", each.partition(",")[2])):
                first_use = i
    return places, first_use
