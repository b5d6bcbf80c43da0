"""A machine that runs the PTX of Triton's kernels on tensors of the CPU, and sees what they do wrong.

Triton's own interpreter runs a program as one thing. Here a block has its threads, at the addresses
that they would have. These are errors, with the kernel and the line of its PTX:

- an access outside of the storages of the given tensors, or of shared memory,
- one at an address that is no multiple of its size, a vector's included,
- a number that one thread writes and another reads or writes with no barrier between, in shared and
  in global memory; and between programs, which no barrier is between,
- a read of shared memory that nobody has written,
- a barrier or a shuffle that not all threads of the block or the warp reach together.

Threads go side by side, one instruction after the other, and programs one by one: what is found
does not depend on the order. Not shown are ptxas and its machine code, times, streams, what a GPU's
memory reorders between programs, and how it rounds a product that is added to: here twice. Where
threads of a warp write one place at once, any may win; here the last. Any other instruction than
those of `ptx_opcodes`, or another form of them, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.unit.ptx_memory import WARP, Clock, Memory, PtxError
from tests.unit.ptx_opcodes import TYPES, bf16, handler, listed
from tests.unit.triton_ahead import Ptx, ptx

# Where shared memory begins, among its own addresses.
_SHARED = 0x1000
_TOGETHER = {
    "warp": r"shfl|redux|bar\.warp",
    "block": r"bar\.sync|(ld|st)matrix",
}


class Instruction(NamedTuple):
    line: int
    text: str
    guard: str
    """The predicate of the threads that run it, or nothing."""
    is_negated: bool
    op: str
    operands: tuple[str, ...]
    together: str
    """Who must come to it at once: a warp, a block, or nobody."""


@lru_cache
def parse(text: str) -> tuple[list[Instruction], dict[str, int], dict[str, str]]:
    """Instructions, places of labels, and types of registers, of a module with one kernel."""
    instructions, labels, types, is_body = [], {}, {}, False
    for number, line in enumerate(text.splitlines(), 1):
        statement = line.partition("//")[0].strip()
        if statement == "}":
            break
        if register := re.match(r"\.reg \.(\w+)\s+%([a-z]+)<", statement):
            types[register[2]] = register[1]
        elif label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label[1]] = len(instructions)
        elif is_body and statement and statement[0] != ".":
            parts = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*);", statement)
            assert parts is not None, statement
            operands = re.findall(r"[{\[][^}\]]*[}\]]|[^\s,]+", parts[4])
            together = next((who for who, ops in _TOGETHER.items() if re.match(ops, parts[3])), "")
            guard = parts[2] or "", bool(parts[1])
            instructions.append(
                Instruction(number, statement, *guard, parts[3], tuple(operands), together)
            )
        is_body |= statement == "{"
    return instructions, labels, types


class Machine:
    """The blocks of a launch, one after the other."""

    def __init__(self, code: Ptx, args: list[int], memories: list[Memory], clock: Clock) -> None:
        self.code, self.args, self.memories, self.clock = code, args, memories, clock
        self.instructions, self.labels, self.types = parse(code.text)
        self.threads = clock.threads

    def run(self, program: int, programs: int) -> None:
        self.clock.start(program)
        self.me = self.clock.first + np.arange(self.threads, dtype=np.int32)
        shared = np.zeros(self.code.shared, np.uint8)
        self.shared = Memory("shared memory", _SHARED, shared, self.clock, is_shared=True)
        self.registers: dict[str, np.ndarray] = {}
        self.names = {
            "%tid.x": np.arange(self.threads),
            "%ctaid.x": np.full(self.threads, program),
            "%nctaid.x": np.full(self.threads, programs),
            "global_smem": np.full(self.threads, _SHARED),
        }
        # The next instruction of each thread.
        where, end = np.zeros(self.threads, int), len(self.instructions)
        while (where < end).any():
            at, active = self._next(where[where < end], where)
            is_whole, to = active.all(), None
            while to is None:
                to = self._step(self.instructions[at], active)
                at += 1
                if not is_whole:
                    break
            where[active] = at
            if to is not None:
                where[self.lanes] = to

    def _next(self, places: np.ndarray, where: np.ndarray) -> tuple[int, np.ndarray]:
        """What some threads can do: those that are behind, but for those that wait for others."""
        for at in np.unique(places):
            active = self._complete(self.instructions[at], where == at)
            if active.any():
                return int(at), active
        raise self._error(self.instructions[places.min()], "is not reached by all threads together")

    def _complete(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        """Those of some threads for which all are there that must be."""
        if not (together := instruction.together):
            return lanes
        size = WARP if together == "warp" else self.threads
        return np.repeat(lanes.reshape(-1, size).all(1), size)

    def _step(self, instruction: Instruction, active: np.ndarray) -> int | None:
        """Run an instruction in some threads; returns where those go that jump, `self.lanes`."""
        self.clock.now += 1
        self.lanes = active
        if instruction.guard:
            self.lanes = active & (self.registers[instruction.guard] ^ instruction.is_negated)
        if instruction.op == "ret":
            return len(self.instructions)
        if instruction.op in ("bra", "bra.uni"):
            return self.labels[instruction.operands[0]]
        try:
            if (self._complete(instruction, self.lanes) != self.lanes).any():
                raise PtxError("is not reached by all threads together")
            do, groups = handler(instruction.op)
            do(self, *groups, *instruction.operands)
        except PtxError as error:
            raise self._error(instruction, str(error)) from None
        except Exception as error:
            what = f"is not known in this form: {type(error).__name__}: {error}"
            raise self._error(instruction, what) from error
        return None

    def _error(self, instruction: Instruction, what: str) -> PtxError:
        return PtxError(f"{self.code.kernel}, line {instruction.line}: {instruction.text} {what}")

    # Operands.

    def value(self, name: str, kind: str) -> np.ndarray:
        """The numbers of an operand, one for each thread."""
        if kind == "bf16":
            return (self.value(name, "b16").astype(np.uint32) << 16).view(np.float32)
        if name in self.registers:
            return _resized(self.registers[name], TYPES[kind])
        if name in self.names:
            return self.names[name].astype(TYPES[kind])
        if name.startswith("%"):
            raise PtxError(f"takes {name}, which has no value")
        number = int(name[2:], 16) if name[:2] in ("0f", "0d") else int(name.rstrip("U"), 0)
        if kind == "pred":
            return np.full(self.threads, number != 0)
        size = TYPES[kind].itemsize
        return np.full(self.threads, number % 2 ** (8 * size), f"u{size}").view(TYPES[kind])

    def assign(self, name: str, values: np.ndarray, kind: str) -> None:
        """Set a register of the threads at work."""
        if name == "_":
            return
        if kind == "bf16":
            values, kind = bf16(values), "b16"
        of = TYPES[self.types[name.rstrip("0123456789")[1:]]]
        values = _resized(values.astype(TYPES[kind]), of.str.replace("i", "u"))
        if not self.lanes.all():
            values = np.where(self.lanes, values, self.registers.get(name, np.zeros_like(values)))
        self.registers[name] = values

    def bytes_of(self, names: str, kind: str) -> np.ndarray:
        """Those of one or several operands, (threads, size)."""
        each = [self.value(name, kind)[:, None].view(np.uint8) for name in listed(names)]
        return np.concatenate(each, 1)

    def assign_bytes(self, names: str, raw: np.ndarray, kind: str) -> None:
        numbers = np.ascontiguousarray(raw).view(TYPES[kind])
        for name, column in zip(listed(names), numbers.T, strict=True):
            self.assign(name, column, kind)

    def addressed(self, space: str, operand: str) -> tuple[Memory, np.ndarray, np.ndarray]:
        """A memory, the addresses there of the threads at work, and their numbers."""
        found = re.fullmatch(r"\[\s*([%\w.]+)(?:\s*\+\s*(-?\d+))?\s*\]", operand)
        assert found is not None
        base = self.value(found[1], "u64" if space == "global" else "u32")
        places = base[self.lanes].astype(np.int64) + int(found[2] or 0)
        if space == "shared" or not places.size:
            return self.shared, places, self.me[self.lanes]
        for memory in self.memories:
            if memory.has(places[0]):
                return memory, places, self.me[self.lanes]
        raise PtxError(f"is at {places[0]:#x}, which is of no tensor")


def _resized(values: np.ndarray, of: Any) -> np.ndarray:
    """The same bits as another type, in a register of another size the low ones."""
    if values.dtype.itemsize != np.dtype(of).itemsize:
        kind = "i" if values.dtype.kind == "i" else "u"
        values = np.ascontiguousarray(values).view(f"{kind}{values.dtype.itemsize}")
        values = values.astype(f"{kind}{np.dtype(of).itemsize}")
    return np.ascontiguousarray(values).view(of)


def run(code: Ptx, args: list[Any], programs: int) -> None:
    """Run the programs of a launch one after the other."""
    clock, numbers = Clock(WARP * code.warps), []
    memories: dict[int, Memory] = {}
    for i, each in enumerate(args):
        if isinstance(each, torch.Tensor):
            raw = each.new_empty(0, dtype=torch.uint8).set_(each.untyped_storage())
            memory = Memory(f"argument {i}", raw.data_ptr(), raw.numpy(), clock)
            memories.setdefault(raw.data_ptr(), memory)
        numbers.append(each.data_ptr() if isinstance(each, torch.Tensor) else each)
    # Behind them are two of Triton's own, which such kernels do not use.
    machine = Machine(code, [*numbers, 0, 0], list(memories.values()), clock)
    with np.errstate(all="ignore"):
        for program in range(programs):
            machine.run(program, programs)


def launcher(arch: int, change: Callable[[Ptx], Ptx] = lambda code: code) -> Callable[..., None]:
    """In place of `launch._launch`, for tensors of the CPU; with a change to what is run."""

    def launch(
        kernel: Any, programs: int, of: torch.device, tensors: Any, numbers: Any, warps: int = 4
    ) -> None:
        args = (*tensors, *numbers)
        given = [v for p, v in zip(kernel.params, args) if not p.is_constexpr and v is not None]
        run(change(ptx(kernel, args, warps, arch)), given, programs)

    return launch
