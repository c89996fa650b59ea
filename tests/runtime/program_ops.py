"""The ops that random programs are made of, each writing one expression of a random form.

Two rules keep a comparison in float32 meaningful. Values stay of order one. And what jumps
(comparisons, `argmax`, `argsort`, the trip count of a `while`) reads *exact* values only: inputs
that were moved about but never computed with, so that no rounding can tip them.
"""

from __future__ import annotations

import math

from hypothesis import strategies as st

from tests.runtime.program_writer import DIMS, Value, Writer, op


@op
def elementwise(w: Writer) -> None:
    v = w.pick()
    if w.maybe():
        exact = ("-{}", "jax.nn.relu({})", "jnp.clip({}, -0.5, 0.5)", "jax.lax.stop_gradient({})")
        w.emit(w.choose(exact).format(v.name), exact=v.exact)
        return
    computed = (
        "jnp.tanh({})", "jnp.sin({})", "jax.nn.gelu({})", "jnp.exp(jnp.minimum({}, 1.0))",
        "0.5 * jnp.square({})", "jax.nn.silu({})", "jnp.log1p(jnp.abs({}))", "1.0 - {}",
        "jax.nn.softplus({})", "jnp.sqrt(1.0 + {0} * {0})", "jax.lax.erf({})", "{} ** 3 / 4.0",
    )  # fmt: skip
    w.emit(w.choose(computed).format(v.name))


@op
def binary(w: Writer) -> None:
    a = w.pick()

    def fits(b: Value) -> bool:
        return b is not a and all(
            x == y or 1 in (x, y) for x, y in zip(a.shape[::-1], b.shape[::-1], strict=False)
        )

    b = w.pick(fits)
    other = b.name if b else w.weight(*a.shape[w.choose(range(a.rank + 1)) :])
    forms = (
        "{} + {}", "{} - {}", "{} * {}", "{} / (1.5 + jnp.abs({}))", "jnp.maximum({}, {})",
        "jnp.minimum({}, {})", "jnp.arctan2({}, 2.0 + jnp.abs({}))",
    )  # fmt: skip
    w.emit(w.choose(forms).format(a.name, other))


@op
def broadcast(w: Writer) -> None:
    v = w.pick()
    at, n = w.choose(range(v.rank + 1)), w.choose(DIMS)
    shape = (*v.shape[:at], n, *v.shape[at:])
    w.emit(f"jnp.broadcast_to(jnp.expand_dims({v.name}, {at}), {shape})", exact=v.exact)


@op
def repeat(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis = w.axis(v)
    reps = tuple(2 if d == axis else 1 for d in range(v.rank))
    forms = (f"jnp.repeat({v.name}, 2, axis={axis})", f"jnp.tile({v.name}, {reps})")
    w.emit(w.choose(forms), exact=v.exact)


@op
def dot(w: Writer) -> None:
    """An einsum of a value with another or with a weight: batched, transposed, contracted."""
    a = w.pick(lambda v: v.rank > 0)
    if a is None:
        return
    letters = "abcd"[: a.rank]
    sizes = dict(zip(letters, a.shape, strict=True))
    b = w.pick(lambda v: v.rank > 0) if w.maybe() else None
    if b is None:
        shared = [x for x in letters if w.maybe()]
        new = "xy"[: w.choose((0, 1, 1, 2) if shared else (1, 2))]
        sizes.update((x, w.choose(DIMS)) for x in new)
        of_b = w.shared.draw(st.permutations([*shared, *new]))
        name = w.weight(*(sizes[x] for x in of_b))
    else:
        of_b, name = [], b.name
        for i, n in enumerate(b.shape):
            same = [x for x in letters if sizes[x] == n and x not in of_b]
            of_b.append(w.choose([*same, "wxyz"[i]]))
            sizes[of_b[-1]] = n
    both = [x for x in letters if x in of_b]
    contracted = [x for x in both if w.choose((True, True, False))]
    free = [x for x in dict.fromkeys([*letters, *of_b]) if x not in contracted]
    out = w.shared.draw(st.permutations(free))
    scale = math.prod(sizes[x] for x in contracted) ** -0.5
    subscripts = f"{letters},{''.join(of_b)}->{''.join(out)}"
    w.emit(f"{scale:.3f} * jnp.einsum({subscripts!r}, {a.name}, {name})")


@op
def transpose(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 1)
    if v is not None:
        axes = tuple(w.shared.draw(st.permutations(range(v.rank))))
        w.emit(f"jnp.transpose({v.name}, {axes})", exact=v.exact)


@op
def reshape(w: Writer) -> None:
    """Merge neighbours, split a dim, flatten, or add and drop dims of size 1."""
    v = w.pick()
    shapes = [(*v.shape, 1), (1, *v.shape), (v.size,), tuple(n for n in v.shape if n > 1)]
    for d in range(v.rank):
        before, n, after = v.shape[:d], v.shape[d], v.shape[d + 1 :]
        shapes += [(*before, k, n // k, *after) for k in (2, 4, 8) if n % k == 0 and n > k]
        if after:
            shapes += [(*before, n * after[0], *after[1:])] * 2
    w.emit(f"jnp.reshape({v.name}, {w.choose(shapes)})", exact=v.exact)


@op
def reduction(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axes = tuple(d for d in range(v.rank) if w.maybe()) or (w.axis(v),)
    options = f"axis={axes}, keepdims={w.maybe()}"
    if w.maybe():
        w.emit(f"jnp.{w.choose(('max', 'min'))}({v.name}, {options})", exact=v.exact)
        return
    forms = (
        "0.3 * jnp.sum({}, {})", "jnp.mean({}, {})", "jnp.prod(1.0 + 0.1 * jnp.tanh({}), {})",
        "jax.nn.logsumexp({}, {})", "jnp.sqrt(jnp.var({}, {}) + 0.1)",
    )  # fmt: skip
    w.emit(w.choose(forms).format(v.name, options))


@op
def normalize(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis = w.axis(v)
    forms = (
        "jax.nn.softmax({0}, axis={1})", "jax.nn.log_softmax({0}, axis={1})",
        "jax.nn.standardize({0}, axis={1}, epsilon=0.1)",
        "{0} * jax.lax.rsqrt(0.1 + jnp.mean({0} * {0}, axis={1}, keepdims=True))",
    )  # fmt: skip
    w.emit(w.choose(forms).format(v.name, axis))


@op
def concatenate(w: Writer) -> None:
    a = w.pick(lambda v: v.rank > 0)
    if a is None:
        return
    axis = w.axis(a)
    rest = (*a.shape[:axis], *a.shape[axis + 1 :])
    b = w.pick(lambda b: b.rank == a.rank and (*b.shape[:axis], *b.shape[axis + 1 :]) == rest)
    assert b is not None
    forms = [f"jnp.concatenate([{a.name}, {b.name}], axis={axis})"]
    if a.shape == b.shape:
        forms.append(f"jnp.stack([{a.name}, {b.name}], axis={axis})")
    w.emit(w.choose(forms), exact=a.exact and b.exact)


@op
def slices(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    parts = []
    for n in v.shape:
        start, stride = w.choose((0, 0, 1)), w.choose((1, 1, 2))
        stop = n if w.maybe() else max(start + 1, n // 2)
        whole = n == 1 or w.maybe()
        parts.append(":" if whole else f"{start}:{stop}:{stride}")
    if w.maybe():
        parts[w.axis(v)] = "0"
    w.emit(f"{v.name}[{', '.join(parts)}]", exact=v.exact)


@op
def split(w: Writer) -> None:
    v = w.pick(lambda v: any(n % 2 == 0 for n in v.shape))
    if v is not None:
        axis = w.choose([d for d, n in enumerate(v.shape) if n % 2 == 0])
        w.emit(f"tuple(jnp.split({v.name}, 2, axis={axis}))", exact=v.exact)


@op
def pad(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis = w.axis(v)
    forms = [
        f"jnp.pad({v.name}, {tuple((w.choose((0, 1)), w.choose((0, 0, 2))) for _ in v.shape)})",
        f"jnp.flip({v.name}, {axis})",
        f"jnp.roll({v.name}, {w.choose((1, 3, -2))}, axis={axis})",
    ]
    config = tuple(
        (w.choose((0, 1, 2)), w.choose((0, -1)) if n > 1 else 0, w.choose((0, 0, 1)))
        for n in v.shape
    )
    forms.append(f"jax.lax.pad({v.name}, 0.5, {config})")
    w.emit(w.choose(forms), exact=v.exact)


@op
def dynamic_slice(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis = w.axis(v)
    n = v.shape[axis]
    start = w.indices(low=-2, high=n + 2)  # out of range starts are clamped
    size = w.choose((1, max(1, n // 2), n))
    if w.maybe():
        call = f"jax.lax.dynamic_slice_in_dim({v.name}, {start}, {size}, axis={axis})"
        w.emit(call, exact=v.exact)
        return
    update = w.weight(*(size if d == axis else m for d, m in enumerate(v.shape)))
    call = f"jax.lax.dynamic_update_slice_in_dim({v.name}, {update}, {start}, axis={axis})"
    w.emit(call, exact=v.exact)


def _gather_mode(w: Writer) -> str:
    return w.choose(('mode="clip"', 'mode="fill", fill_value=0.25'))


@op
def embedding(w: Writer) -> None:
    table = w.weight(w.choose((4, 8, 16)), *(w.choose(DIMS) for _ in range(w.choose((0, 1, 1, 2)))))
    index = w.indices(*(w.choose(DIMS) for _ in range(w.choose((1, 2)))), low=-3, high=20)
    forms = ("jnp.take({}, {}, axis=0, {})", "{}.at[{}].get({})")
    w.emit(w.choose(forms).format(table, index, _gather_mode(w)), exact=True)


@op
def gather(w: Writer) -> None:
    """Along any axis, by two indices at once, or row by row."""
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis, mode = w.axis(v), _gather_mode(w)
    index = w.indices(w.choose(DIMS), low=-3, high=v.shape[axis] + 3)
    forms = [f"jnp.take({v.name}, {index}, axis={axis}, {mode})"]
    if v.rank > 1:
        n = w.choose(DIMS)
        i = w.indices(n, low=-1, high=v.shape[0] + 1)
        j = w.indices(n, low=-1, high=v.shape[1] + 1)
        rows = w.indices(v.shape[0], w.choose((1, 4)), low=-1, high=v.shape[1] + 1)
        forms.append(f"{v.name}.at[{i}, {j}].get({mode})")
        forms.append(f"jax.vmap(lambda r, i: r.at[i].get({mode}))({v.name}, {rows})")
    w.emit(w.choose(forms), exact=v.exact)


@op
def take_along_axis(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis = w.axis(v)
    shape = tuple(w.choose((1, 4, 8)) if d == axis else n for d, n in enumerate(v.shape))
    index = w.indices(*shape, low=-2, high=v.shape[axis] + 3)
    call = f"jnp.take_along_axis({v.name}, {index}, axis={axis}, {_gather_mode(w)})"
    w.emit(call, exact=v.exact)


@op
def scatter_add(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis, count = w.axis(v), w.choose(DIMS)
    mode = w.choose(("drop", "clip"))
    index = w.indices(count, low=-3, high=v.shape[axis] + 3)
    rows = w.weight(*(count if d == axis else n for d, n in enumerate(v.shape)))
    at = ", ".join([*[":"] * axis, index])
    forms = [f"{v.name}.at[{at}].add({rows}, mode={mode!r})"]
    segments = w.indices(v.shape[0], low=-1, high=6)
    forms.append(f"jax.ops.segment_sum({v.name}, {segments}, num_segments=4)")
    if v.rank > 1:
        i = w.indices(count, low=-1, high=v.shape[0] + 1)
        j = w.indices(count, low=-1, high=v.shape[1] + 1)
        values = w.weight(count, *v.shape[2:])
        forms.append(f"{v.name}.at[{i}, {j}].add({values}, mode={mode!r})")
    w.emit(w.choose(forms))


@op
def scatter(w: Writer) -> None:
    """Other scatters; what overwrites has no index twice."""
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    n = v.shape[0]
    rows = sorted(w.shared.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=min(n, 3))))
    new = w.weight(len(rows), *v.shape[1:])
    forms = [f"{v.name}.at[jnp.array({rows})].set({new})", f"{v.name}.at[{rows[0]}].set({new}[0])"]
    if v.exact:  # the gradients of these jump where two values meet
        forms.append(f"{v.name}.at[jnp.array({rows})].max({new})")
    w.emit(w.choose(forms), exact=v.exact)


@op
def cumulative(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    options = f"axis={w.axis(v)}, reverse={w.maybe()}"
    if w.maybe():
        w.emit(f"jax.lax.{w.choose(('cummax', 'cummin'))}({v.name}, {options})", exact=v.exact)
        return
    forms = (
        "0.3 * jax.lax.cumsum({}, {})", "jax.lax.cumlogsumexp({}, {})",
        "jax.lax.cumprod(1.0 + 0.1 * jnp.tanh({}), {})",
    )  # fmt: skip
    w.emit(w.choose(forms).format(v.name, options))


@op
def sort(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis = w.axis(v)
    forms = [f"jnp.sort({v.name}, axis={axis}, descending={w.maybe()})"]
    if v.exact:
        forms.append(f"jnp.argsort({v.name}, axis={axis})")
        other = w.pick(lambda u: u.shape == v.shape)
        assert other is not None
        pair = f"({v.name}, {other.name})"
        forms.append(f"tuple(jax.lax.sort({pair}, dimension={axis}, num_keys=1))")
        w.emit(w.choose(forms), exact=v.exact and other.exact)
        return
    w.emit(w.choose(forms))


@op
def top_k(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0)
    if v is not None:
        k = w.choose(range(1, min(4, v.shape[-1]) + 1))
        found = f"jax.lax.top_k({v.name}, {k})"
        w.emit(f"tuple({found})" if v.exact else f"{found}[0]", exact=v.exact)


@op
def argmax(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 0 and v.exact)
    if v is not None:
        w.emit(f"jnp.{w.choose(('argmax', 'argmin'))}({v.name}, axis={w.axis(v)})", exact=True)


@op
def mask(w: Writer) -> None:
    """`where` under a mask made of iotas, of comparisons or of given labels."""
    v = w.pick(lambda v: v.rank > 0)
    if v is None:
        return
    axis, shape = w.axis(v), v.shape
    labels = w.indices(shape[axis], low=0, high=3)
    spread = tuple(range(axis)) + tuple(range(axis + 1, v.rank))
    conditions = [
        f"jax.lax.broadcasted_iota(jnp.int32, {shape}, {axis}) % 3 > 0",
        f"jnp.expand_dims({labels}, {spread}) == 1",
        f"jnp.expand_dims(jnp.arange({shape[axis]}) < 2, {spread})",
    ]
    if v.rank > 1:
        conditions.append(f"jnp.arange({shape[-2]})[:, None] >= jnp.arange({shape[-1]})")
    if v.exact:
        conditions += [f"{v.name} > 0.1", f"jnp.isfinite({v.name}) & ({v.name} < 0.3)"]
    w.emit(f"jnp.where({w.choose(conditions)}, {v.name}, {w.choose((0.0, -0.5))})", exact=v.exact)


@op
def booleans(w: Writer) -> None:
    v = w.pick(lambda v: v.exact)
    if v is None:
        return
    (positive,) = w.emit(f"{v.name} > 0.0", exact=True, keep=False)
    axes = tuple(d for d in range(v.rank) if w.maybe())
    forms = ("jnp.any({}, {})", "jnp.all({}, {})", "jnp.sum({}, {})", "jnp.logical_not({})[None]")
    w.emit(w.choose(forms).format(positive.name, axes), exact=True)


@op
def integers(w: Writer) -> None:
    """Integer arithmetic and reductions, then one-hot or back to floats."""
    index = w.indices(*(w.choose(DIMS) for _ in range(w.choose((1, 2)))), low=-5, high=12)
    forms = (
        "jax.nn.one_hot({} % 8, 8)", "({} * 3 // 2).astype(jnp.float32) / 8.0",
        "jnp.sum({}, axis=0)", "jnp.max({}, axis=-1)", "jnp.cumsum({}, axis=0)",
        "jnp.bincount(jnp.ravel({}) % 8, length=8)", "jnp.sort({}, axis=0)", "({} & 3) | 4",
    )  # fmt: skip
    w.emit(w.choose(forms).format(index), exact=True)


@op
def diagonals(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > 1)
    if v is not None:
        forms = ("jnp.tril({})", "jnp.triu({}, 1)", "jnp.diagonal({}, axis1=-2, axis2=-1)")
        w.emit(w.choose(forms).format(v.name), exact=v.exact)


@op
def convolution(w: Writer) -> None:
    v = w.pick(lambda v: v.rank in (3, 4))
    spatial = v.rank - 2 if v else 1
    name, shape = (v.name, v.shape) if v else (w.weight(4, 8, 8), (4, 8, 8))
    channels = shape[-1]
    groups = w.choose([g for g in (1, 1, 2, 4) if channels % g == 0])
    kernel = w.weight(
        *(w.choose((1, 2, 3)) for _ in range(spatial)), channels // groups,
        groups * w.choose((1, 2, 4)),
    )  # fmt: skip
    letters = "WHD"[:spatial]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    options = (
        [f"padding={w.choose(('SAME', 'VALID'))!r}"]
        if min(shape[1:-1]) >= 3
        else ["padding='SAME'"]
    )
    options.append(f"window_strides={(w.choose((1, 1, 2)),) * spatial}")
    options.append(f"rhs_dilation={(w.choose((1, 1, 2)),) * spatial}" if shape[1] >= 8 else "")
    options += [f"feature_group_count={groups}", f"dimension_numbers={numbers}"]
    text = ", ".join(o for o in options if o)
    w.emit(f"0.3 * jax.lax.conv_general_dilated({name}, {kernel}, {text})")


@op
def pooling(w: Writer) -> None:
    v = w.pick(lambda v: v.rank in (3, 4))
    if v is None:
        return
    window = (1, *(2,) * (v.rank - 2), 1)
    strides = window if w.maybe() else (1,) * v.rank
    rest = f"{window}, {strides}, 'SAME'"
    if v.exact and w.maybe():
        call = f"jax.lax.reduce_window({v.name}, -jnp.inf, jax.lax.max, {rest})"
        w.emit(call, exact=v.exact)
        return
    w.emit(f"0.3 * jax.lax.reduce_window({v.name}, 0.0, jax.lax.add, {rest})")


@op
def factorization(w: Writer) -> None:
    """Primitives without a sharding rule: no device can compute a part of their result."""
    v = w.pick(lambda v: v.rank > 1)
    if v is None:
        return
    n = v.shape[-2]
    (square,) = w.emit(
        f"jnp.eye({n}) + 0.1 * {v.name} @ jnp.swapaxes({v.name}, -1, -2)", keep=False
    ) or (None,)
    if square is not None:
        forms = (
            "jnp.linalg.cholesky({0})",
            "jnp.linalg.inv({0})",
            "jax.scipy.linalg.solve_triangular(jnp.tril({0}), {0}, lower=True)",
        )
        w.emit(w.choose(forms).format(square.name))


@op
def ragged_dot(w: Writer) -> None:
    """Groups of rows times a matrix each; rows beyond the last group give zeros."""
    v = w.pick(lambda v: v.rank == 2)
    name, (m, k) = (v.name, v.shape) if v else (w.weight(8, 4), (8, 4))
    groups = w.choose((1, 2, 4))
    sizes = [w.choose(range(m // groups + 1)) for _ in range(groups)]
    weight = w.weight(groups, k, w.choose(DIMS))
    w.emit(f"0.5 * jax.lax.ragged_dot({name}, {weight}, jnp.array({sizes}, jnp.int32))")
