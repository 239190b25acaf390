"""Four-bit codes on NVIDIA GPUs: a few rows times a kernel, and dequantization.

Written in Pallas for Mosaic GPU. A program has 128 threads, each with the same few columns all the
way down its blocks, so that a warp reads whole lines of codes, and sums never leave a thread. A
codebook has 16 values: every lane holds one, and a warp shuffle looks 32 of them up at once.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from .._errors import first_line
from .._typing import Array
from ._codebook import CODEBOOKS, GROUP, dynamic_table

THREADS = 128
WIDTHS = (4, 2, 1)
"""Columns of a thread: bytes that it loads at once."""
ROWS = 32
"""Rows of bytes whose loads are under way at once."""
PROGRAMS = 400
"""Programs that keep an H200's 132 multiprocessors busy; more write more partial sums.

On an H200 16 microseconds for one row times 4096 x 14336, with 8 to 32 rows, 400 to 1,600 programs,
and values looked up in shared memory instead: instructions bound it, not memory.
"""
MOST_ROWS = 8
"""Rows of `x` up to which multiplying while reading takes less time than a dense kernel."""


class Blocks(NamedTuple):
    """What the kernels read: uint8 `(*stack, G, b/2, d_out)` and what scales it.

    As in `QuantizedTensor`, whole blocks alone; `nested_scales` and `offset` go with uint8 scales.
    """

    codes: Any
    scales: Any
    nested_scales: Any = None
    offset: Any = None


def tile_of(codes: Any) -> int | None:
    """Columns of a program; None for shapes that these kernels do not read."""
    rows, d_out = codes.shape[-2:]
    fitting = (THREADS * width for width in WIDTHS if d_out % (THREADS * width) == 0)
    return next(fitting, None) if rows % min(rows, ROWS) == 0 else None


@dataclasses.dataclass(frozen=True)
class Operations:
    """What Pallas has no words for, and differs between a GPU and its interpreter.

    load: `(ref, tile) -> (tile,)`. store: `(ref, (tile,))`. entries: 128 floats of a ref, one for
    each thread. look_up: `((tile,) bytes, entries) ->` values of the high and the low nibbles.
    gather: `(ref, (tile,) indices) -> (tile,)` floats. spread: an array laid out as loads are.
    """

    load: Callable[..., Any]
    store: Callable[..., Any]
    entries: Callable[..., Any]
    look_up: Callable[..., Any]
    gather: Callable[..., Any]
    spread: Callable[..., Any]


def product(
    x: Array, q: Blocks, format: str, *, on: Operations | None = None, interpret: Any = None
) -> Array:
    """`x·dequantize(q)` for a few rows `(n, d_in)`, reading each code once, summed in float32."""
    (n, _), (blocks, rows, d_out), tile = x.shape, q.codes.shape, tile_of(q.codes)
    assert tile is not None
    on, nested, step = on or GPU, q.offset is not None, min(rows, ROWS)
    split = _blocks_of_a_program(blocks, d_out // tile)

    def program(x_ref: Any, codes: Any, scales: Any, table: Any, *more: Any) -> None:
        *for_scales, out = more
        column, part = jax.lax.axis_index("columns") * tile, jax.lax.axis_index("parts")
        columns, entries = pl.ds(column, tile), on.entries(table)
        zero = on.spread(jnp.zeros(tile, jnp.float32))

        def block(i: Any, totals: Any) -> Any:
            g = part * split + i

            def some_rows(j: Any, sums: Any) -> Any:
                first, at = j * step, g * 2 * rows + j * step
                bytes_ = [on.load(codes.at[g, first + r, columns], tile) for r in range(step)]
                high_x, low_x = (
                    [[x_ref[t, at + half + r] for r in range(step)] for t in range(n)]
                    for half in (0, rows)
                )
                sums = list(sums)
                for r, byte in enumerate(bytes_):
                    high, low = on.look_up(byte, entries)
                    for t in range(n):
                        sums[t] = sums[t] + high * high_x[t][r].astype(jnp.float32)
                        sums[t] = sums[t] + low * low_x[t][r].astype(jnp.float32)
                return tuple(sums)

            sums = jax.lax.fori_loop(0, rows // step, some_rows, (zero,) * n)
            codes_of_scale = on.load(scales.at[g, columns], tile)
            if not nested:
                per_column = codes_of_scale.astype(jnp.float32)
                return tuple(t + s * per_column for t, s in zip(totals, sums, strict=True))
            group = _group(column, tile, g, blocks, on)
            per_column = _nested(codes_of_scale, group, for_scales, on)
            scaled = [t + s * per_column for t, s in zip(totals[:n], sums, strict=True)]
            return (*scaled, *(t + s for t, s in zip(totals[n:], sums, strict=True)))

        sums = jax.lax.fori_loop(0, split, block, (zero,) * (2 * n if nested else n))
        for t, total in enumerate(sums):
            on.store(out.at[part, t // n, t % n, columns], total)

    parts = blocks // split
    run = plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((parts, 1 + nested, n, d_out), jnp.float32),
        grid=(d_out // tile, parts),
        grid_names=("columns", "parts"),
        interpret=interpret,
    )
    sums = run(x, q.codes, q.scales, *_tables(q, format))
    if nested:
        # The mean absmax is added here, where XLA fuses it: as an argument of the kernel, one
        # float32 of a stack, it would be copied first.
        sums = sums * jnp.stack([jnp.float32(1), q.offset])[:, None, None]
    return jnp.sum(sums, axis=(0, 1)).astype(x.dtype)


def dense(
    q: Blocks, format: str, dtype: Any, *, on: Operations | None = None, interpret: Any = None
) -> Array:
    """The dense matrices `(*stack, d_in, d_out)`, `value(code) · absmax` rounded once."""
    *stack, blocks, rows, d_out = q.codes.shape
    tile = tile_of(q.codes)
    assert tile is not None
    on, layers, nested = on or GPU, math.prod(stack), q.offset is not None
    step = min(rows, ROWS)

    def program(codes: Any, scales: Any, table: Any, *more: Any) -> None:
        *for_scales, out = more
        column, g = jax.lax.axis_index("columns") * tile, jax.lax.axis_index("blocks")
        columns, entries = pl.ds(column, tile), on.entries(table)
        per_column = on.load(scales.at[g, columns], tile)
        if nested:
            *for_scales, offset = for_scales
            layer = g // blocks
            group = _group(column, tile, g - layer * blocks, blocks, on)
            groups = q.nested_scales.shape[-1]
            per_column = _nested(per_column, group + layer * groups, for_scales, on) + offset[layer]
        else:
            per_column = per_column.astype(jnp.float32)

        def some_rows(j: Any, carry: Any) -> Any:
            first = j * step
            bytes_ = [on.load(codes.at[g, first + r, columns], tile) for r in range(step)]
            for r, byte in enumerate(bytes_):
                for half, value in zip((0, rows), on.look_up(byte, entries), strict=True):
                    row = g * 2 * rows + half + first + r
                    on.store(out.at[row, columns], (value * per_column).astype(dtype))
            return carry

        jax.lax.fori_loop(0, rows // step, some_rows, 0)

    run = plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((layers * blocks * 2 * rows, d_out), dtype),
        grid=(d_out // tile, layers * blocks),
        grid_names=("columns", "blocks"),
        interpret=interpret,
    )
    offset = (q.offset.reshape(-1),) if nested else ()
    codes, scales = q.codes.reshape(-1, rows, d_out), q.scales.reshape(-1, d_out)
    return run(codes, scales, *_tables(q, format), *offset).reshape(*stack, -1, d_out)


def _blocks_of_a_program(blocks: int, tiles: int) -> int:
    """The most blocks, in equal parts, that leave `PROGRAMS` programs."""
    equal = (s for s in range(blocks, 0, -1) if blocks % s == 0)
    return next((s for s in equal if tiles * blocks // s >= PROGRAMS), 1)


def _tables(q: Blocks, format: str) -> tuple[Any, ...]:
    """The codebook, and what decodes nested scales: all float32, one dimension each."""
    table = np.tile(np.asarray(CODEBOOKS[format], np.float32), THREADS // 16)
    if q.offset is None:
        return (table,)
    return table, q.nested_scales.reshape(-1), dynamic_table(True)


def _group(column: Any, tile: int, block: Any, blocks: int, on: Operations) -> Any:
    """Which nested scale stands over one block of each column of a tile."""
    columns = on.spread(jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)) + column
    return (columns * blocks + block) // GROUP


def _nested(codes: Any, group: Any, refs: Any, on: Operations) -> Any:
    """Absmax less its mean, from nested scales and the values of their codes."""
    nested_scales, values = refs
    return on.gather(values, codes.astype(jnp.int32)) * on.gather(nested_scales, group)


_inline: Any = plgpu.inline_mgpu  # its types leave out that it passes a context


def _layout(tile: int) -> Any:
    return plgpu.Layout.WG_STRIDED((tile,), vec_size=tile // THREADS)


def _array(tile: int, dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct((tile,), dtype, layout=_layout(tile))


def _like(registers: Any, array: Any) -> Any:
    """Floats in the places of another array's elements."""
    placed = np.empty(len(registers), dtype=object)
    placed[:] = registers
    placed = placed.reshape(array.registers.shape)
    return mgpu.FragmentedArray(_registers=placed, _layout=array.layout, _is_signed=None)


def _floats(values: list[Any]) -> Any:
    """A vector register of scalars."""
    register = llvm.mlir_undef(ir.VectorType.get((len(values),), ir.F32Type.get()))
    for j, value in enumerate(values):
        register = vector.insert(value, register, dynamic_position=[], static_position=[j])
    return register


def _elements(register: Any) -> list[Any]:
    (n,) = ir.VectorType(register.type).shape
    return [vector.extract(register, dynamic_position=[], static_position=[j]) for j in range(n)]


def _load(ref: Any, tile: int) -> Any:
    @_inline(arg_types=(plgpu.RefType(),), return_type=_array(tile, ref.dtype))
    def load(_: Any, ref: Any) -> Any:
        signed = False if isinstance(ir.MemRefType(ref.type).element_type, ir.IntegerType) else None
        return mgpu.FragmentedArray.load_strided(ref, is_signed=signed, vec_size=tile // THREADS)

    return load(ref)


def _store(ref: Any, value: Any) -> None:
    @_inline(arg_types=(plgpu.RefType(), _layout(value.shape[0])), return_type=())
    def store(_: Any, ref: Any, value: Any) -> tuple[()]:
        value.store_untiled(ref, optimized=False)
        return ()

    store(ref, value)


def _look_up(codes: Any, entries: Any) -> tuple[Any, Any]:
    tile = codes.shape[0]
    result = _array(tile, jnp.float32)

    @_inline(arg_types=(_layout(tile), _layout(THREADS)), return_type=(result, result))
    def look_up(_: Any, codes: Any, entries: Any) -> tuple[Any, Any]:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        (register,), (mine,) = codes.registers.flat, entries.registers.flat
        (mine,) = _elements(mine)
        width = ir.VectorType(register.type).shape[0]
        word = mgpu.utils.bitcast(register, ir.IntegerType.get_signless(8 * width))
        word = word if width == 4 else arith.extui(i32, word)

        def value(shift: int) -> Any:
            lane = arith.shrui(word, mgpu.c(shift, i32)) if shift else word
            # Segments of 16 lanes: only the lowest four bits of the index are looked at.
            shuffle = "shfl.sync.idx.b32 $0, $1, $2, 0x100f, 0xffffffff;"
            return llvm.inline_asm(f32, [mine, lane], shuffle, "=f,f,r", asm_dialect=0)

        high, low = (_floats([value(8 * j + part) for j in range(width)]) for part in (4, 0))
        return _like([high], codes), _like([low], codes)

    return look_up(codes, entries)


def _gather(ref: Any, index: Any) -> Any:
    tile = index.shape[0]

    @_inline(arg_types=(plgpu.RefType(), _layout(tile)), return_type=_array(tile, jnp.float32))
    def gather(_: Any, ref: Any, index: Any) -> Any:
        def value(i: Any) -> Any:
            return memref.load(ref, [arith.index_castui(ir.IndexType.get(), i)])

        (register,) = index.registers.flat
        return _like([_floats([value(i) for i in _elements(register)])], index)

    return gather(ref, index)


def _spread(x: Any) -> Any:
    return plgpu.layout_cast(x, _layout(x.shape[0]))


GPU = Operations(
    load=_load,
    store=_store,
    entries=lambda ref: _load(ref, THREADS),
    look_up=_look_up,
    gather=_gather,
    spread=_spread,
)
PLAIN = Operations(
    load=lambda ref, tile: ref[...],
    store=lambda ref, value: ref.__setitem__(..., value),
    entries=lambda ref: ref[...],
    look_up=lambda codes, entries: tuple(
        entries[nibbles.astype(jnp.int32)] for nibbles in (codes >> 4, codes & 15)
    ),
    gather=lambda ref, index: ref[...][index],
    spread=lambda x: x,
)
"""What the operations mean, for the interpreter."""


@functools.cache
def why_not(format: str, scales: str, dtype: str) -> str | None:
    """Why this process does not use these kernels; None if it does.

    They are tried once for each format, type of scales and type of results, against NumPy.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:
        # Whoever asks may be tracing a program, in this thread.
        return elsewhere.submit(_tried, format, scales, dtype).result()


def _tried(format: str, scales: str, dtype: str) -> str | None:
    q, wanted = _trial(format, scales)
    x = np.random.default_rng(1).standard_normal((2, len(wanted)), np.float32)
    try:
        found = np.asarray(jax.jit(dense, static_argnums=(1, 2))(q, format, "float32"))
        if not np.allclose(found, wanted, rtol=1e-5, atol=1e-6):
            return "its kernels dequantized wrongly on trial"
        x = jnp.asarray(x, dtype)
        exact = np.asarray(x, np.float32) @ wanted
        off = np.asarray(jax.jit(product, static_argnums=2)(x, q, format), np.float32) - exact
        if not np.linalg.norm(off) <= 0.01 * np.linalg.norm(exact):
            return "its kernels multiplied wrongly on trial"
    except Exception as error:  # whatever it is, XLA has another path
        return f"it refuses the kernels: {first_line(error)}"
    return None


def _trial(format: str, scales: str) -> tuple[Blocks, np.ndarray]:
    """Random blocks of 64 values in 512 columns, and what they mean."""
    random, shape = np.random.default_rng(0), (4, 32, 512)
    codes = random.integers(0, 256, shape, np.uint8)
    values = np.asarray(CODEBOOKS[format], np.float32)[np.stack([codes >> 4, codes & 15], 1)]
    if scales == "uint8":
        of_scales = random.integers(0, 256, (4, 512), np.uint8)
        nested, offset = np.arange(1, 9, dtype=np.float32) / 2, np.float32(7)
        absmax = dynamic_table(True)[of_scales] * np.repeat(nested, GROUP).reshape(512, 4).T
        q, absmax = Blocks(codes, of_scales, nested, offset), absmax + offset
    else:
        q = Blocks(codes, jnp.asarray(random.uniform(1, 2, (4, 512)), scales))
        absmax = np.asarray(q.scales, np.float32)
    return q, (values * absmax[:, None, None]).reshape(-1, 512)
