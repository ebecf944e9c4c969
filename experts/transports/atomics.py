"""Atomic words and futexes on shared memory, for numba code.

Addresses are int64 byte addresses in this process's memory; words are 32 bits, as Linux futexes are.
Source of the wait protocol: U. Drepper, "Futexes Are Tricky", 2011; futex(2).
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from placement.compiled import compiled

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)
_FUTEX_WAIT = 0  # not the _PRIVATE forms: the waker is another process
_FUTEX_WAKE = 1

_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _word_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(32).as_pointer())


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """The uint32 at `address`; no later access moves before this one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word_pointer(builder, args[0]), ordering="acquire", align=4)

    return types.uint32(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the uint32 `value` at `address`; a load_acquire that sees it also sees every earlier write."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _word_pointer(builder, args[0]), ordering="release", align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the uint32 at `address`, sequentially consistent; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word_pointer(builder, args[0]), args[1], ordering="seq_cst")

    return types.uint32(types.int64, types.uint32), codegen


@intrinsic
def full_fence(typingctx: Any) -> Any:
    """Order all earlier accesses before all later ones, across processes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _timespec_ns(typingctx: Any) -> Any:
    """CLOCK_MONOTONIC in nanoseconds, without allocating memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, i32 = ir.IntType(64), ir.IntType(32)
        spec = builder.alloca(ir.ArrayType(i64, 2))
        pointer = builder.bitcast(spec, ir.IntType(8).as_pointer())
        signature_ir = ir.FunctionType(i32, [i32, ir.IntType(8).as_pointer()])
        clock_gettime = builder.module.globals.get("clock_gettime") or ir.Function(
            builder.module, signature_ir, "clock_gettime"
        )
        builder.call(clock_gettime, [i32(1), pointer])
        zero = i32(0)
        seconds = builder.load(builder.gep(spec, [zero, zero]))
        nanoseconds = builder.load(builder.gep(spec, [zero, i32(1)]))
        return builder.add(builder.mul(seconds, i64(1_000_000_000)), nanoseconds)

    return types.int64(), codegen


@intrinsic
def _futex_wait(typingctx: Any, address: Any, expected: Any, timeout_ns: Any) -> Any:
    """futex(2) FUTEX_WAIT with a relative timeout; returns immediately if the word is no longer `expected`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        spec = builder.alloca(ir.ArrayType(i64, 2))
        zero, one = ir.IntType(32)(0), ir.IntType(32)(1)
        billion = i64(1_000_000_000)
        builder.store(builder.sdiv(args[2], billion), builder.gep(spec, [zero, zero]))
        builder.store(builder.srem(args[2], billion), builder.gep(spec, [zero, one]))
        call_type = ir.FunctionType(i64, [i64] * 7)
        syscall = builder.module.globals.get("syscall") or ir.Function(builder.module, call_type, "syscall")
        expected = builder.zext(args[1], i64)
        arguments = [i64(_SYS_FUTEX), args[0], i64(_FUTEX_WAIT), expected, builder.ptrtoint(spec, i64), i64(0), i64(0)]
        return builder.call(syscall, arguments)

    return types.int64(types.int64, types.uint32, types.int64), codegen


@compiled()
def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds, as time.monotonic_ns() reads it."""
    return _timespec_ns()


@compiled()
def wake(address: int) -> None:
    """Wake one sleeper on the word at `address`."""
    _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, 1, 0, 0, 0)


@compiled()
def wait_while_equal(address: int, sleeping: int, seen: int, spin_ns: int, timeout_ns: int) -> int:
    """Wait until the word at `address` differs from `seen`; returns its value, which is `seen` after a timeout.

    Yields the core for `spin_ns`. Then sets the word at `sleeping`, which tells the other side to wake this one, and
    sleeps in the kernel. Runs without the GIL.
    """
    deadline_ns = now_ns() + timeout_ns
    value = load_acquire(address)
    if value != seen:
        return value
    spin_until_ns = now_ns() + spin_ns
    while now_ns() < spin_until_ns:
        _sched_yield()
        value = load_acquire(address)
        if value != seen:
            return value
    store_release(sleeping, types.uint32(1))
    full_fence()
    value = load_acquire(address)
    while value == seen:
        left_ns = deadline_ns - now_ns()
        if left_ns <= 0:
            break
        _futex_wait(address, types.uint32(seen), left_ns)
        value = load_acquire(address)
    store_release(sleeping, types.uint32(0))
    return value


@compiled()
def publish(address: int, value: int, sleeping: int) -> None:
    """Set the word at `address` and wake the other side if it sleeps."""
    store_release(address, types.uint32(value))
    full_fence()
    if load_acquire(sleeping) != 0:
        wake(address)


@compiled()
def ring(address: int, sleeping: int) -> None:
    """Add 1 to the word at `address` and wake its sleeper."""
    fetch_add(address, types.uint32(1))
    full_fence()
    if load_acquire(sleeping) != 0:
        wake(address)


@compiled()
def load_word(address: int) -> int:
    """`load_acquire` for Python callers."""
    return load_acquire(address)


@functools.cache
def warm_up() -> None:
    """Compile everything here, or load it from the cache, so that no dispatch pays the second that it takes."""
    words = np.zeros(2, np.uint32)
    address, sleeping = int(words.ctypes.data), int(words.ctypes.data) + 4
    ring(address, sleeping)
    publish(address, 2, sleeping)
    wait_while_equal(address, sleeping, load_word(address), 0, 0)
