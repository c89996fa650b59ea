"""Small random stage problems for brute force, and large ones shaped like language models."""

import math

import numpy as np

from alpa_lite.passes.inter_op import (
    StageProblem,
    Submesh,
    gpipe_in_flight,
    one_f_one_b_in_flight,
    submesh_shapes,
)

GIB = 2.0**30


def random_problem(seed: int) -> StageProblem:
    """At most 5 layers, 3 submeshes, 2 options; ties, forbidden stages and any budget."""
    rng = np.random.default_rng(seed)
    num_hosts, devices_per_host = [(1, 4), (2, 2), (2, 4), (1, 8), (3, 1)][rng.integers(5)]
    shapes = submesh_shapes(num_hosts, devices_per_host)
    num_submeshes = int(rng.integers(1, min(3, len(shapes)) + 1))
    chosen = sorted(rng.choice(len(shapes), num_submeshes, replace=False).tolist())
    num_options = int(rng.integers(1, 3))
    num_layers = int(rng.integers(1, 6 if num_submeshes * num_options <= 4 else 5))
    num_rows = num_layers * (num_layers + 1) // 2
    classes = np.full((num_layers, num_layers), -1)
    classes[np.triu_indices(num_layers)] = rng.permutation(num_rows)
    if rng.random() < 0.4:  # identical layers: only the length matters
        first, last = np.indices(classes.shape)
        classes = np.where(last >= first, last - first, -1)
    if rng.random() < 0.2:
        classes[rng.integers(num_layers), -1] = -1
    shape = (num_rows, num_submeshes, num_options)
    with_ties = rng.random() < 0.3

    def numbers(*size, high=10.0):
        return rng.integers(0, 6, size) * 1.0 if with_ties else rng.random(size) * high

    devices = np.array([shapes[index].num_devices for index in chosen])[:, None]
    latency_s = numbers(*shape) / devices ** rng.choice([0.0, 0.5, 1.0])
    latency_s[rng.random(shape) < rng.choice([0.0, 0.2])] = math.inf
    boundary_s = numbers(num_layers - 1, num_submeshes, num_submeshes, high=rng.choice([0.0, 2, 9]))
    boundary_s[rng.random(boundary_s.shape) < rng.choice([0.0, 0.15])] = math.inf
    return StageProblem(
        num_hosts=num_hosts,
        devices_per_host=devices_per_host,
        submeshes=tuple(shapes[index] for index in chosen),
        range_class=classes,
        latency_s=latency_s,
        fixed_bytes=numbers(*shape),
        in_flight_bytes=numbers(*shape, high=4.0),
        per_step_s=numbers(*shape, high=rng.choice([0.0, 3.0, 30.0])),
        boundary_s=boundary_s,
        memory_budget_bytes=float(rng.choice([math.inf, 4.0, 8.0, 14.0])),
        num_microbatches=int(rng.choice([1, 2, 3, 8])),
        in_flight=[one_f_one_b_in_flight, gpipe_in_flight][rng.integers(2)],
    )


def uniform_problem(
    latency_s,
    *,
    num_layers,
    submeshes,
    hosts=1,
    devices=4,
    microbatches=4,
    boundary_s=0.0,
    fixed=0.0,
    in_flight=0.0,
    per_step_s=0.0,
    budget=math.inf,
) -> StageProblem:
    """Identical layers, one option: `latency_s[m]` per layer; the bytes are per layer, too."""
    shapes = tuple(Submesh(*shape) for shape in submeshes)
    length = np.arange(1, num_layers + 1, dtype=float)[:, None, None]
    first, last = np.indices((num_layers, num_layers))
    size = len(shapes)
    ones = np.ones((1, size, 1))
    return StageProblem(
        num_hosts=hosts,
        devices_per_host=devices,
        submeshes=shapes,
        range_class=np.where(last >= first, last - first, -1),
        latency_s=length * np.array(latency_s, dtype=float)[None, :, None],
        fixed_bytes=length * fixed * ones,
        in_flight_bytes=length * in_flight * ones,
        per_step_s=length * per_step_s * ones,
        boundary_s=np.full((num_layers - 1, size, size), boundary_s),
        memory_budget_bytes=budget,
        num_microbatches=microbatches,
    )


def model_problem(
    num_blocks, num_hosts, devices_per_host=8, *, microbatches=64, budget=80 * GIB, hidden=16384
) -> StageProblem:
    """A dense decoder: embedding, identical blocks, head; options are tensor parallel x remat.

    Costs are rough but have the right shape: 989 TFLOP/s at 45 %, 450 GB/s within a host and 50
    GB/s per device between hosts, 18 bytes of state per parameter sharded over the data axis.
    """
    num_layers = num_blocks + 2
    first, last = np.indices((num_layers, num_layers))
    has_embedding, has_head = first == 0, last == num_layers - 1
    blocks = last - first + 1 - has_embedding - has_head
    key = np.where(last >= first, (blocks * 2 + has_embedding) * 2 + has_head, -1)
    keys, rows = np.unique(key, return_inverse=True)
    rows = rows.reshape(key.shape) - 1
    keys = keys[1:]
    blocks, embedding, head = keys // 4, keys // 2 % 2, keys % 2
    vocabulary, tokens = 128_000, 8192 * 2048 / microbatches
    matrix = hidden * vocabulary
    parameters = blocks * 12.0 * hidden**2 + (embedding + head) * matrix
    flops = 6 * tokens * (blocks * (12 * hidden**2 + 8192 * hidden) + head * matrix)
    shapes = submesh_shapes(num_hosts, devices_per_host)
    options = [(tp, remat) for tp in (1, 2, 4, 8) for remat in (0, 1)]
    size = (len(keys), len(shapes), len(options))
    latency, fixed, held, per_step = (np.full(size, math.inf), *np.zeros((3, *size)))
    for m, shape in enumerate(shapes):
        for o, (tp, remat) in enumerate(options):
            if tp > shape.devices_per_host:
                continue
            dp = shape.num_devices // tp
            if dp > tokens / 8192:
                continue
            link = 450e9 if shape.num_hosts == 1 else 50e9
            compute = flops * (4 / 3 if remat else 1) / (shape.num_devices * 989e12 * 0.45)
            reduced = 4 * 2 * 2 * tokens / dp * hidden * (tp - 1) / tp / 450e9
            latency[:, m, o] = compute + blocks * reduced + 2e-5 * (blocks + 1)
            fixed[:, m, o] = parameters / tp * (2 + 16 / dp)
            kept = 2.0 * hidden * tokens / dp * (1 if remat else 14)
            held[:, m, o] = (blocks + embedding) * kept / tp
            per_step[:, m, o] = 2 * 2 * parameters / tp * (dp - 1) / dp / link
    counts = np.array([shape.num_devices for shape in shapes])
    moved = 2 * 2 * tokens * hidden / np.minimum(counts[:, None], counts[None, :]) / 50e9
    return StageProblem(
        num_hosts=num_hosts,
        devices_per_host=devices_per_host,
        submeshes=shapes,
        range_class=rows,
        latency_s=latency,
        fixed_bytes=fixed,
        in_flight_bytes=held,
        per_step_s=per_step,
        boundary_s=np.broadcast_to(moved, (num_layers - 1, *moved.shape)).copy(),
        memory_budget_bytes=budget,
        num_microbatches=microbatches,
    )
