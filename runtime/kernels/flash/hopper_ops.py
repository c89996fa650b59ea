"""The few operations of the Hopper kernels that JAX's GPU interpreter does not have.

A kernel is written once, against `Hardware` or `Interpreted`. They differ in matrix products,
register layouts and the reducing copy; indices, loops, barriers, copies and masks are the kernel's
own, and are what the interpreter tests and searches for races.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alpa_lite import compat
from alpa_lite.compat import mosaic_gpu as plgpu

Array = Any
WARPGROUP_ROWS = 64  # rows of one wgmma
SWIZZLE_BYTES = 128


class Product(NamedTuple):
    """`start + a @ b`, in float32.

    Attributes:
      a: a reference to shared memory, or a 16-bit value in registers.
      b: a reference to shared memory.
      transpose_a: take `a` transposed; of references only.
      transpose_b: take `b` transposed.
      start: what is added to; None for zero.
    """

    a: Any
    b: Any
    transpose_a: bool = False
    transpose_b: bool = False
    start: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result."""
        rows, cols = self.a.shape[self.transpose_a], self.b.shape[not self.transpose_b]
        return rows, cols


class Hardware:
    """Warpgroup products (`wgmma`) on register layouts that suit them."""

    interpreted = False

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """float32 zeros as a tile, or as one number for each row."""
        return self.full(shape, 0.0)

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        """Likewise, another value."""
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape: tuple[int, int], dim: int) -> Array:
        """Index along a dim, int32."""
        return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)

    def load_rows(self, ref: Any, in_shared: bool = True) -> Array:
        """A vector with an element for each row of a tile, from shared or global memory."""
        return compat.load_with_layout(ref, plgpu.Layout.WGMMA.reduce(1), optimized=in_shared)

    def load_cols(self, ref: Any, in_shared: bool = True) -> Array:
        """A vector with an element for each column of a tile, likewise."""
        return compat.load_with_layout(ref, plgpu.Layout.WGMMA.reduce(0), optimized=in_shared)

    def products(self, *products: Product) -> list[Array]:
        """All are issued, then all are waited for."""

        def issue(refs: Sequence[Any]) -> None:
            for product, ref in zip(products, refs, strict=True):
                _issue(ref, product)

        starts = [self.zeros(p.shape) if p.start is None else p.start for p in products]
        return list(pl.run_state(issue)(tuple(map(plgpu.ACC.init, starts))))

    def overlapped(
        self, first: Product, second: Product, state: Sequence[Array],
        use: Callable[[Array], Sequence[Array]],
    ) -> tuple[Array, list[Array]]:  # fmt: skip
        """`second`, and `use(first)` computed while `second` still runs.

        Args:
          first: issued first, without a start.
          second: issued behind it, with one.
          state: values of the shapes and dtypes of what `use` returns.
          use: of the result of `first`.
        """

        def body(refs: Any) -> None:
            total, *results = refs

            def issue(ref: Any) -> Array:
                _issue(ref, first)
                _issue(total, second)
                return plgpu.wgmma_accumulator_load(ref, wait_n=1)  # all but the last are done

            value = pl.run_scoped(issue, plgpu.ACC(first.shape, jnp.float32))
            for ref, result in zip(results, use(value), strict=True):
                ref[...] = result

        total, *results = pl.run_state(body)((plgpu.ACC.init(second.start), *state))
        return total, results

    def add_to_global(self, tile: Any, target: Any, value: Array) -> None:
        """Add `value` to float32 numbers in global memory, by way of the shared `tile`."""
        tile[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, target, reduction_op="add")


class Interpreted:
    """The same in plain JAX, one after the other."""

    interpreted = True

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """See `Hardware.zeros`."""
        return jnp.zeros(shape, jnp.float32)

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        """See `Hardware.full`."""
        return jnp.full(shape, value, jnp.float32)

    def iota(self, shape: tuple[int, int], dim: int) -> Array:
        """See `Hardware.iota`."""
        return lax.broadcasted_iota(jnp.int32, shape, dim)

    def load_rows(self, ref: Any, in_shared: bool = True) -> Array:
        """See `Hardware.load_rows`."""
        return ref[...]

    def load_cols(self, ref: Any, in_shared: bool = True) -> Array:
        """See `Hardware.load_cols`."""
        return ref[...]

    def products(self, *products: Product) -> list[Array]:
        """See `Hardware.products`."""
        return [_multiply(product) for product in products]

    def overlapped(
        self, first: Product, second: Product, state: Sequence[Array],
        use: Callable[[Array], Sequence[Array]],
    ) -> tuple[Array, list[Array]]:  # fmt: skip
        """See `Hardware.overlapped`."""
        value, total = self.products(first, second)
        return total, list(use(value))

    def add_to_global(self, tile: Any, target: Any, value: Array) -> None:
        """See `Hardware.add_to_global`; the interpreter has no reducing copy."""
        del tile
        target[...] = target[...] + value


Ops = Hardware | Interpreted


def shared_tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that `wgmma` and TMA can read: 8 rows by one swizzle, or half of one."""
    swizzle = SWIZZLE_BYTES
    while shape[-1] % (swizzle // jnp.dtype(dtype).itemsize):
        swizzle //= 2
    transforms = (
        plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _issue(target: Any, product: Product) -> None:
    a = compat.transposed_ref(product.a) if product.transpose_a else product.a
    b = compat.transposed_ref(product.b) if product.transpose_b else product.b
    plgpu.wgmma(target, a, b)


def _multiply(product: Product) -> Array:
    a = product.a if isinstance(product.a, jnp.ndarray) else product.a[...]
    b = product.b[...]
    a, b = a.T if product.transpose_a else a, b.T if product.transpose_b else b
    result = jnp.dot(a, b, preferred_element_type=jnp.float32)
    return result if product.start is None else product.start + result
