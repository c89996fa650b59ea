"""Random shardings over some of the 8 virtual devices, for hypothesis."""

import jax
import numpy as np
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_SHAPES = {
    1: [(1,), (1, 1)],
    2: [(2,), (1, 2), (2, 1)],
    3: [(3,)],
    4: [(4,), (2, 2), (1, 4)],
    6: [(6,), (2, 3)],
    8: [(8,), (2, 4), (4, 2), (2, 2, 2)],
}
DIMS = (1, 2, 3, 4, 6, 8, 12, 16, 24)


@st.composite
def array_shapes(draw) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.sampled_from(DIMS), max_size=3)))


@st.composite
def shardings_of(draw, shape, devices, axis_names="xyz") -> NamedSharding:
    """A layout of an array of this shape over these devices."""
    mesh_shape = draw(st.sampled_from(MESH_SHAPES[len(devices)]))
    mesh = Mesh(np.array(devices).reshape(mesh_shape), tuple(axis_names[: len(mesh_shape)]))
    dims: list[list[str]] = [[] for _ in shape]
    counts = [1] * len(shape)
    for name in draw(st.permutations(mesh.axis_names)):
        size = mesh.shape[name]
        fitting = [d for d, n in enumerate(shape) if n % (counts[d] * size) == 0]
        d = draw(st.sampled_from([None, *fitting]))
        if d is not None:
            dims[d].append(name)
            counts[d] *= size
    spec = PartitionSpec(*(tuple(names) or None for names in dims))
    return NamedSharding(mesh, spec)


@st.composite
def shardings(draw) -> tuple[tuple[int, ...], NamedSharding]:
    """A shape, and a layout of it over the first few devices."""
    shape = draw(array_shapes())
    count = draw(st.sampled_from(sorted(MESH_SHAPES)))
    return shape, draw(shardings_of(shape, jax.devices()[:count]))
