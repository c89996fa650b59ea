"""Which mesh holds which stage."""

from __future__ import annotations


def straight(num_meshes: int) -> tuple[int, ...]:
    """One stage per mesh.

    >>> straight(3)
    (0, 1, 2)
    """
    return tuple(range(num_meshes))


def reverse(num_meshes: int) -> tuple[int, ...]:
    """One stage per mesh, against the order of the meshes.

    >>> reverse(3)
    (2, 1, 0)
    """
    return tuple(reversed(range(num_meshes)))


def looping(num_meshes: int, num_virtual: int) -> tuple[int, ...]:
    """`num_virtual` stages per mesh, around and around.

    >>> looping(3, 2)
    (0, 1, 2, 0, 1, 2)
    """
    return straight(num_meshes) * num_virtual


def v_shape(num_meshes: int) -> tuple[int, ...]:
    """Two stages per mesh, there and back, so that the first mesh also holds the last stage.

    The loss is computed where the first stage is, and the turn at the last mesh sends nothing.

    >>> v_shape(3)
    (0, 1, 2, 2, 1, 0)
    """
    return straight(num_meshes) + reverse(num_meshes)
