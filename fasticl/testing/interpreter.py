"""Triton's interpreter as a test bed: kernels run on CPU tensors, one program after the other, in NumPy.

``TRITON_INTERPRET=1`` must be set before triton is imported first; then :func:`install` repairs what is wrong there:
bfloat16 arithmetic and reductions (they act on the bit patterns), rounding to bfloat16 (truncated) and TF32 (not done),
inline assembly (refused) and autotuning over several configurations (asks for a driver). :func:`checked` adds what a
GPU would not tell: which reads and writes leave the tensors of the launch, and which programs touch the same bytes.

It proves indexing, masks and rounding. It does not prove the memory model within a program, nor speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import autotuner
from triton.runtime import interpreter as base

Twin = Callable[..., np.ndarray | tuple[np.ndarray, ...]]


_BITS = np.array([bin(i).count("1") for i in range(1 << 16)], np.int32)


def _popc(x: np.ndarray) -> np.ndarray:
    """popc.b32"""
    return _BITS[x & 0xFFFF] + _BITS[(x >> 16) & 0xFFFF]


def _prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: bytes 0 to 3 of ``low``, 4 to 7 of ``high``; with bit 3 of its nibble, a byte's sign eight times."""
    source = low.astype(np.uint32).astype(np.uint64) | high.astype(np.uint32).astype(np.uint64) << np.uint64(32)
    result = np.zeros(source.shape, np.uint32)
    for i in range(4):
        nibble = (selector >> (4 * i)).astype(np.uint64)
        byte = ((source >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & np.uint64(8), (byte >> 7) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * i)
    return result.view(np.int32)


_twins: dict[str, Twin] = {"popc.b32 $0, $1;": _popc, "prmt.b32 $0, $1, $2, $3;": _prmt}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_FLOAT_METHODS = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt")


class OutOfBoundsError(RuntimeError):
    """A launch read or wrote memory of none of its tensors."""


class RaceError(RuntimeError):
    """A program wrote what another one reads or writes, without an atomic."""


def active() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


def twin(assembly: str) -> Callable[[Twin], Twin]:
    """Registers the NumPy function that does what an inline assembly text does, on arrays of its operands."""

    def register(function: Twin) -> Twin:
        _twins[assembly] = function
        return function

    return register


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """What the tensor cores see of float32: the lowest 13 bits are ignored."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass
class _Access:
    """Lanes of one load or store: where they begin, how many bytes each takes, and the program.

    ``time``: how many ordering atomics the launch had done before.
    """

    addresses: np.ndarray
    size: int
    program: int
    time: int

    def bytes(self) -> np.ndarray:
        return (np.unique(self.addresses)[:, None] + np.arange(self.size, dtype=np.uint64)).ravel()


@dataclass
class _Memory:
    """Where the tensors of a launch begin and end, and who touched which bytes."""

    begins: np.ndarray
    ends: np.ndarray
    reads: list[_Access] = field(default_factory=list)
    writes: list[_Access] = field(default_factory=list)
    atomics: list[tuple[int, set[int]]] = field(default_factory=list)  # that order: programs and addresses
    outside: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: list[Any]) -> _Memory:
        tensors = [a.base if hasattr(a, "block_shape") else a for a in arguments]  # of a tensor descriptor, its tensor
        spans = [(t.data_ptr(), _span(t)) for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        begins = np.array([begin for begin, _ in spans], np.uint64)
        return cls(begins, begins + np.array([span for _, span in spans], np.uint64))

    def access(self, kind: str, pointers: Any, mask: np.ndarray, program: tuple[int, int, int]) -> np.ndarray:
        """Records an access; returns the mask without what is out of bounds."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        mask = np.broadcast_to(mask.astype(bool), pointers.data.shape)
        addresses = pointers.data[mask]
        if addresses.size and not self._inside(addresses.min(), addresses.max(), size).any():  # not all in one tensor
            inside = self._inside(pointers.data[..., None], pointers.data[..., None], size).any(-1)
            if (wrong := mask & ~inside).any():
                first = int(pointers.data[wrong][0])
                self.outside.append(
                    f"program {program}: {kind} of {size} bytes at {first:#x}, {self._where(first)}; "
                    f"{int(wrong.sum())} of {int(mask.sum())} lanes are outside"
                )
            mask = mask & inside
            addresses = pointers.data[mask]
        number = (program[0] << 42) + (program[1] << 21) + program[2]
        if kind == "ordering atomic":
            self.atomics.append((number, set(addresses.tolist())))
        elif addresses.size and kind != "atomic":
            access = _Access(addresses, size, number, len(self.atomics))
            (self.writes if kind == "store" else self.reads).append(access)
        return mask

    def _inside(self, first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
        return (first >= self.begins) & (last + np.uint64(size) <= self.ends)

    def _where(self, address: int) -> str:
        beyond = [address - int(end) for end in self.ends if address >= end]
        before = [int(begin) - address for begin in self.begins if address < begin]
        if beyond and (not before or min(beyond) <= min(before)):
            return f"{min(beyond)} bytes past the end of a tensor"
        return f"{min(before)} bytes before a tensor" if before else "across the end of a tensor"

    def check(self) -> None:
        if self.outside:
            raise OutOfBoundsError("\n".join(self.outside[:10]))
        if not self.writes:
            return
        writes, by = _by_address(self.writes)
        writers = np.array([access.program for access in self.writes])[by]
        clash = (writes[1:] == writes[:-1]) & (writers[1:] != writers[:-1])
        if clash.any():
            i = int(clash.argmax())
            self._race("both write", writes[i], writers[i], writers[i + 1], clash)
        near = [r for r in self.reads if r.addresses.min() <= writes[-1] and r.addresses.max() + 8 > writes[0]]
        if near:
            reads, read_by = _by_address(near)
            readers = np.array([access.program for access in near])[read_by]
            found = np.searchsorted(writes, reads, side="right") - 1  # the last write there
            clash = (writes[found] == reads) & (writers[found] != readers)
            pairs = np.stack([by[found], read_by], 1)
            for write, read in np.unique(pairs[clash], axis=0) if self.atomics else ():
                if self._ordered(self.writes[write], near[read]):
                    clash &= (pairs != (write, read)).any(1)
            if clash.any():
                i = int(clash.argmax())
                self._race("write and read", reads[i], writers[found[i]], readers[i], clash)

    def _ordered(self, write: _Access, read: _Access) -> bool:
        """Whether the writer's atomic after the write was followed by the reader's, on one address, before the read."""
        told: set[int] = set()
        for program, addresses in self.atomics[write.time : read.time]:
            if program == write.program:
                told |= addresses
            elif program == read.program and told & addresses:
                return True
        return False

    def _race(self, what: str, address: int, first: int, second: int, clash: np.ndarray) -> None:
        programs = [(int(p) >> 42, int(p) >> 21 & 0x1FFFFF, int(p) & 0x1FFFFF) for p in (first, second)]
        raise RaceError(f"programs {programs[0]} and {programs[1]} {what} {int(address):#x}; {int(clash.sum())} bytes")


def _span(t: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


def _by_address(accesses: list[_Access]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes by address, and which access touched each; of one address by program, then in time."""
    touched = [access.bytes() for access in accesses]
    addresses = np.concatenate(touched)
    by = np.repeat(np.arange(len(accesses)), [a.size for a in touched])
    order = np.lexsort((by, np.array([access.program for access in accesses])[by], addresses))
    return addresses[order], by[order]


_checking = False
_memory: _Memory | None = None


@contextmanager
def checked() -> Iterator[None]:
    """Within it a launch raises :class:`OutOfBoundsError` or :class:`RaceError` at its end.

    An access out of bounds is reported and not done. Bounds are those of the tensors that the launch was given; gaps
    between the rows of a view count as inside. Atomics race with nothing; what one program wrote before an atomic of
    acquire and release, another may read after its own on the same address. That a barrier parts a program's stores
    from such an atomic is not seen.
    """
    global _checking
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before


# ---- repairs ---------------------------------------------------------------------------------------------------------


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, base.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(value: Any) -> Any:
    return base.TensorHandle(from_bfloat16(value.data), tl.float32) if _is_bfloat16(value) else value


def _rounded(handle: Any) -> Any:
    return base.TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def _through_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method on bfloat16 operands: computed in float32, rounded once. Comparisons stay boolean."""

    @wraps(method)
    def wrapped(self: Any, *operands: Any) -> Any:
        if operands[-1] in _BITWISE or not any(map(_is_bfloat16, operands)):
            return method(self, *operands)
        result = method(self, *map(_widened, operands))
        return result if result.data.dtype == np.bool_ else _rounded(result)

    return wrapped


def _repair_arithmetic() -> None:
    builder = base.InterpreterBuilder
    for name in _FLOAT_METHODS:
        setattr(builder, name, _through_float32(getattr(builder, name)))

    cast_impl, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return source
        if target.scalar == tl.bfloat16:
            return _rounded(cast_impl(self, source, tl.float32) if source.dtype.scalar != tl.float32 else source)
        widened = _widened(source)
        return widened if target.scalar == tl.float32 and widened is not source else cast_impl(self, widened, target)

    def float_to_float(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        def operand(h: Any) -> Any:
            if h.dtype.scalar == tl.float32 and precision == base._ir.INPUT_PRECISION.TF32:
                return base.TensorHandle(to_tf32(h.data), tl.float32)
            if h.dtype.scalar == tl.float16:  # products of halves are exact in float32
                return base.TensorHandle(h.data.astype(np.float32), tl.float32)
            return _widened(h)

        result = dot(self, operand(a), operand(b), _widened(c), precision, imprecise)
        return _rounded(result) if _is_bfloat16(c) else result

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, float_to_float, create_dot

    apply = base.ReduceScanOpInterface.apply

    def apply_in_float32(self: Any, input: Any) -> Any:
        if not isinstance(input, tuple):
            return apply_in_float32(self, (input,))[0]
        narrow = [x.dtype.scalar == tl.bfloat16 for x in input]
        if not any(narrow):
            return apply(self, input)
        wide = tuple(
            self.to_tensor(from_bfloat16(x.handle.data), tl.float32) if n else x
            for x, n in zip(input, narrow, strict=True)
        )
        results = []
        for result, n in zip(apply(self, wide), narrow, strict=False):
            if n and result.dtype.scalar == tl.float32:
                bits = to_bfloat16(result.handle.data)
                result = self.to_tensor(bits if result.type.is_block() else bits.item(), tl.bfloat16)
            results.append(result)
        return tuple(results)

    base.ReduceScanOpInterface.apply = apply_in_float32


class _Results:
    """What the semantics expect of an inline assembly operation."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, i: int) -> Any:
        return self.handles[i]


def _repair_assembly() -> None:
    def create_inline_asm(
        self: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
    ) -> _Results:
        if assembly not in _twins:
            raise NotImplementedError(f"inline assembly has no twin (fasticl.testing.interpreter.twin): {assembly!r}")
        outputs = _twins[assembly](*(value.data for value in values))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if len(outputs) != len(types):
            raise ValueError(f"twin: expected {len(types)} results, got {len(outputs)}")
        return _Results(
            [
                base.TensorHandle(np.asarray(output).astype(base._get_np_dtype(type.scalar)), type.scalar)
                for output, type in zip(outputs, types, strict=True)
            ]
        )

    base.InterpreterBuilder.create_inline_asm = create_inline_asm


_configuration = 0


@contextmanager
def configuration(index: int) -> Iterator[None]:
    """Within it autotuned kernels run their ``index``-th configuration (modulo how many they have), else the first."""
    global _configuration
    before, _configuration = _configuration, index
    try:
        yield
    finally:
        _configuration = before


def _repair_autotuning() -> None:
    run = autotuner.Autotuner.run

    def run_one(self: Any, *args: Any, **kwargs: Any) -> Any:
        configurations = self.configs
        self.configs = [configurations[_configuration % len(configurations)]]
        try:
            return run(self, *args, **kwargs)
        finally:
            self.configs = configurations

    autotuner.Autotuner.run = run_one


def _watch_memory() -> None:
    builder, executor = base.InterpreterBuilder, base.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def seen(self: Any, kind: str, pointers: Any, mask: Any) -> Any:
        if _memory is None:
            return mask
        present = np.ones(pointers.data.shape, bool) if mask is None else mask.data
        return base.TensorHandle(_memory.access(kind, pointers, present, self.grid_idx), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(self, pointers, seen(self, "load", pointers, mask), *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return store(self, pointers, value, seen(self, "store", pointers, mask), *rest, **options)

    def atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, semantic: Any, scope: Any) -> Any:
        kind = "ordering atomic" if semantic == base._ir.MEM_SEMANTIC.ACQUIRE_RELEASE else "atomic"
        return atomic(self, operation, pointers, value, seen(self, kind, pointers, mask), semantic, scope)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw = atomic_rmw

    call = executor.__call__

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _memory
        if not _checking:
            return call(self, *args, **kwargs)
        _memory = memory = _Memory.of([*args, *kwargs.values()])
        try:
            result = call(self, *args, **kwargs)
        except Exception:
            memory.check()  # names the cause, if there is one
            raise
        finally:
            _memory = None
        memory.check()
        return result

    executor.__call__ = checked_call


def _patch_the_language_once() -> None:
    """A device function called by a kernel would patch triton.language again, at each call: half of a test's time."""
    patch, executor = base._patch_lang, base.GridExecutor
    call = executor.__call__
    running = False

    def patch_once(function: Any) -> Any:
        return base._LangPatchScope() if running and function.__globals__.get("tl") is tl else patch(function)

    def running_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        scope = patch(self.fn)
        running = True
        try:
            return call(self, *args, **kwargs)
        finally:
            running = False
            scope.restore()

    base._patch_lang, executor.__call__ = patch_once, running_call


_installed = False


def install() -> None:
    """Repairs the interpreter, once.

    Raises:
        RuntimeError: this process does not interpret.
    """
    global _installed
    if not active():
        raise RuntimeError("TRITON_INTERPRET: expected 1 before the first import of triton, got it unset")
    if not _installed:
        _repair_arithmetic()
        _repair_assembly()
        _repair_autotuning()
        _watch_memory()
        if hasattr(base, "_LangPatchScope"):
            _patch_the_language_once()
        _installed = True
