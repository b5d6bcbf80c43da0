"""What the instructions do that the kernels are made of, in all threads at once.

A function is given the machine, the groups of its pattern, and the operands as they are written.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.unit.ptx_memory import WARP, PtxError

if TYPE_CHECKING:
    from tests.unit.ptx import Machine

TYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in ("bu", "uu", "si", "ff")
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("f", 8)
}
TYPES["pred"] = np.dtype(bool)
_HANDLERS: list[tuple[str, Callable[..., None]]] = []


def _opcode(pattern: str) -> Callable[[Any], Any]:
    return lambda do: _HANDLERS.append((pattern, do))


@cache
def handler(op: str) -> tuple[Callable[..., None], tuple[str, ...]]:
    for pattern, do in _HANDLERS:
        if found := re.fullmatch(pattern, op):
            return do, found.groups()
    raise PtxError("is not known here")


def listed(operand: str) -> list[str]:
    """The registers of a vector, or the one that it is."""
    return re.findall(r"[^\s,{}]+", operand)


def bf16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers, rounded to bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    wide = {"f4": np.float64, "f8": np.longdouble}.get(a.dtype.str[1:], a.dtype)
    return a.astype(wide) * b + c


_PLAIN: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": _fma,
    "fma": _fma,
    "div": _divide,
    "rem": np.fmod,
    "neg": operator.neg,
    "abs": operator.abs,
    "sqrt": np.sqrt,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    # Of a number and NaN, the number.
    "min": np.fmin,
    "max": np.fmax,
}


@_opcode(rf"({'|'.join(_PLAIN)})(?:\.rn|\.lo)?\.(\w+)")
def _plain(m: Machine, of: str, kind: str, to: str, *operands: str) -> None:
    m.assign(to, _PLAIN[of](*(m.value(each, kind) for each in operands)), kind)


@_opcode(r"(?:mul|mad)\.wide\.([su])32")
def _wide(m: Machine, sign: str, to: str, a: str, b: str, *c: str) -> None:
    product = m.value(a, sign + "32").astype(TYPES[sign + "64"]) * m.value(b, sign + "32")
    m.assign(to, product + (m.value(c[0], sign + "64") if c else 0), sign + "64")


@_opcode(r"(shl|shr)\.(\w+)")
def _shift(m: Machine, of: str, kind: str, to: str, a: str, by: str) -> None:
    move = np.left_shift if of == "shl" else np.right_shift
    values = m.value(a, kind)
    # In two parts: NumPy leaves open what a shift by all bits is.
    bits = np.minimum(m.value(by, "u32"), 8 * values.dtype.itemsize).astype(values.dtype)
    m.assign(to, move(move(values, bits // 2), bits - bits // 2), kind)


@_opcode(r"bfe\.([su]32)")
def _field(m: Machine, kind: str, to: str, a: str, start: str, length: str) -> None:
    up = 32 - int(start) - int(length)
    m.assign(to, (m.value(a, "u32") << up).view(TYPES[kind]) >> (32 - int(length)), kind)


@_opcode(r"prmt\.b32")
def _permute(m: Machine, to: str, a: str, b: str, picks: str) -> None:
    each = [int(picks.rstrip("U"), 0) >> 4 * i & 15 for i in range(4)]
    picked = m.bytes_of(f"{a}, {b}", "b32")[:, [i & 7 for i in each]]
    signs = np.where(picked > 127, 255, 0).astype(np.uint8)
    m.assign_bytes(to, np.where([i > 7 for i in each], signs, picked), "b32")


@_opcode(r"setp\.(eq|ne|lt|le|gt|ge)(u?)\.(\w+)")
def _compare(m: Machine, of: str, unordered: str, kind: str, to: str, a: str, b: str) -> None:
    left, right = m.value(a, kind), m.value(b, kind)
    is_nan = (left != left) | (right != right)
    result = getattr(operator, of)(left, right)
    m.assign(to, result | is_nan if unordered else result & ~is_nan, "pred")


@_opcode(r"selp\.(\w+)")
def _select(m: Machine, kind: str, to: str, a: str, b: str, where: str) -> None:
    m.assign(to, np.where(m.value(where, "pred"), m.value(a, kind), m.value(b, kind)), kind)


@_opcode(r"cvt(?:\.rn)?\.(b?f\d+)\.(\w+)|cvt\.([su]\d+)\.([su]\d+)")
def _convert(
    m: Machine, float_: str, of: str, integer: str, of_integer: str, to: str, a: str
) -> None:
    m.assign(to, m.value(a, of or of_integer), float_ or integer)


@_opcode(r"cvt\.rmi\.(f\d+)\.\1")
def _floor(m: Machine, kind: str, to: str, a: str) -> None:
    m.assign(to, np.floor(m.value(a, kind)), kind)


@_opcode(r"cvt\.rn\.(b?f16)x2\.f32")
def _convert_two(m: Machine, kind: str, to: str, high: str, low: str) -> None:
    pair = np.stack([m.value(each, "f32") for each in (low, high)], 1)
    m.assign_bytes(to, bf16(pair) if kind == "bf16" else pair.astype(np.float16), "b32")


@_opcode(r"mov\.(?:pred|[a-z](\d+))")
def _move(m: Machine, bits: str | None, to: str, a: str) -> None:
    """Also from several registers to one, or the other way round.

    LLVM packs a half that nobody reads from a register that nobody writes: here it is not a number.
    """
    of, kind = (f"b{int(bits) // len(listed(each))}" if bits else "pred" for each in (a, to))
    for each in listed(a) if bits == "32" and of == "b16" else ():
        if each.startswith("%") and each not in m.registers:
            m.assign(each, np.full(m.threads, 0x7FC1, np.uint16), of)
    m.assign_bytes(to, m.bytes_of(a, of), kind)


@_opcode(r"ld\.param\.(\w+)")
def _parameter(m: Machine, kind: str, to: str, name: str) -> None:
    m.assign(to, m.value(str(m.args[int(name.rpartition("_")[2][:-1])]), kind), kind)


@_opcode(r"ld\.(global|shared)(?:\.v[24])?\.(\w+)")
def _load(m: Machine, space: str, kind: str, to: str, address: str) -> None:
    raw = np.zeros((m.threads, TYPES[kind].itemsize * len(listed(to))), np.uint8)
    memory, places, me = m.addressed(space, address)
    raw[m.lanes] = memory.read(places, raw.shape[1], me)
    m.assign_bytes(to, raw, kind)


@_opcode(r"st\.(global|shared)(?:\.v[24])?\.(\w+)")
def _store(m: Machine, space: str, kind: str, address: str, values: str) -> None:
    memory, places, me = m.addressed(space, address)
    memory.write(places, m.bytes_of(values, kind)[m.lanes], me)


@_opcode(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def _matrices(m: Machine, of: str, turned: str | None, *operands: str) -> None:
    """Eight rows of 16 bytes for each register, at the addresses of eight lanes."""
    registers, address = operands if of == "ld" else operands[::-1]
    _, places, me = m.addressed("shared", address)

    def matrices(raw: np.ndarray) -> np.ndarray:
        each = np.ascontiguousarray(raw).view(np.uint16).reshape(-1, 8, 8)
        return np.ascontiguousarray(each.swapaxes(1, 2) if turned else each).view(np.uint8)

    for i, name in enumerate(listed(registers)):
        rows = np.arange(m.threads) % WARP // 8 == i
        if of == "ld":
            raw = m.shared.read(places[rows], 16, me[rows])
            m.assign_bytes(name, matrices(raw).reshape(m.threads, 4), "b32")
        else:
            raw = matrices(m.bytes_of(name, "b32")).reshape(-1, 16)
            m.shared.write(places[rows], raw, me[rows])


@_opcode(r"bar\.sync")
def _barrier(m: Machine, number: str) -> None:
    if number != "0":
        raise PtxError("is not the barrier of the whole block")
    m.clock.of_block = m.clock.now


@_opcode(r"bar\.warp\.sync")
def _warp_barrier(m: Machine, members: str) -> None:
    _must_be_warps(m, members)
    m.clock.of_warps[m.lanes] = m.clock.now


@_opcode(r"shfl\.sync\.(bfly|idx)\.b32")
def _shuffle(m: Machine, how: str, to: str, a: str, by: str, clamp: str, members: str) -> None:
    _must_be_warps(m, members, clamp)
    threads, lane = np.arange(m.threads), m.value(by, "u32") % WARP
    other = threads ^ lane if how == "bfly" else threads // WARP * WARP + lane
    m.assign(to, m.value(a, "b32")[other], "b32")


@_opcode(r"redux\.sync\.(max|min)\.([su]32)")
def _reduce(m: Machine, of: str, kind: str, to: str, a: str, members: str) -> None:
    _must_be_warps(m, members)
    most = getattr(np, of)(m.value(a, kind).reshape(-1, WARP), 1)
    m.assign(to, np.repeat(most, WARP), kind)


def _must_be_warps(m: Machine, members: str, clamp: str = "31") -> None:
    if (m.value(members, "s32")[m.lanes] != -1).any() or clamp != "31":
        raise PtxError("is of parts of warps")
