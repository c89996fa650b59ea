"""Zero bubble: only the input half of a backward is waited for, so the weight half fills gaps.

Qi et al. 2023 (arXiv 2401.10241): ZB-H1 in section 2.1, ZB-V in section 6. Both are made for
forwards, input parts and weight parts that take about equally long; for others the lists stay as
they are and the simulator tells what they cost.
"""

from __future__ import annotations

from .placement import straight, v_shape
from .task import Schedule
from .task_list import TaskList


def make_zb_h1(num_meshes: int, num_microbatches: int) -> Schedule:
    """1F1B whose weight parts lag behind: a third of its bubble, and no more activations.

    Mesh `m` puts off the weight parts of its first `m` microbatches until the forwards run out.
    With 4 meshes, 4 microbatches (I input part, W weight part):

        mesh 0   F0 F1 F2 F3 I0 W0 I1 W1 I2 W2 I3 W3
        mesh 3   F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3
    """
    lists = []
    for mesh in range(num_meshes):
        new = TaskList(num_microbatches)
        for _ in range(num_meshes - mesh):
            new.forward(mesh)
        for _ in range(mesh):
            new.backward_input(mesh)
            new.forward(mesh)
        for _ in range(num_microbatches):
            new.backward_input(mesh)
            new.backward_weight(mesh)
            new.forward(mesh)
        lists.append(tuple(new.tasks))
    return Schedule("zb-h1", (straight(num_meshes),), (0,) * num_microbatches, tuple(lists))


def make_zbv(num_meshes: int, num_microbatches: int) -> Schedule:
    """Two stages per mesh in a V: no mesh ever waits between its first task and its last.

    The first backward starts on the mesh where the microbatches enter, so all meshes have equally
    many activations in flight, and no more bytes than 1F1B's first mesh. From `2 num_meshes - 1`
    microbatches on the V is full; with fewer the lists are those of that number, less the
    microbatches that do not exist.
    """
    full = max(num_microbatches, 2 * num_meshes - 1)
    lists = []
    for mesh in range(num_meshes):
        down, up = mesh, 2 * num_meshes - 1 - mesh
        new = TaskList(full)
        # Warm-up, until the first microbatches have come back up.
        for _ in range(2 * (num_meshes - mesh) - 1):
            new.forward(down)
        for _ in range(mesh):
            new.forward(up)
            new.forward(down)
        for _ in range(num_meshes - mesh):
            new.forward(up)
            new.backward_input(up)
            new.backward_weight(up)
        # Steady state: everything once for both stages. The forwards down are used up first.
        for _ in range(full - num_meshes):
            for stage in (down, up):
                new.forward(stage)
                new.backward_input(stage)
                new.backward_weight(stage)
        # Cool-down: input parts first, weight parts fill what is left.
        for _ in range(mesh):
            new.backward_input(down)
            new.backward_input(up)
        for _ in range(num_meshes - mesh):
            new.backward_input(down)
            new.backward_weight(down)
        for stage in (up, down):
            for _ in range(mesh):
                new.backward_weight(stage)
        lists.append(new.below(num_microbatches))
    return Schedule("zbv", (v_shape(num_meshes),), (0,) * num_microbatches, tuple(lists))
