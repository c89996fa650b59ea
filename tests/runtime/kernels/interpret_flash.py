"""Runs one case of the Hopper kernels in JAX's GPU interpreter, on threads, looking for races.

    python interpret_flash.py CASE          prints `correct` and whether there were races
    python interpret_flash.py CASE planted  the same without a barrier that the dk/dv kernel needs

A process of its own, because a kernel whose barriers do not match hangs in it.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from alpa_lite import compat
from alpa_lite.runtime.kernels.flash import hopper, hopper_dkv
from alpa_lite.runtime.kernels.flash.block_sizes import DEFAULTS, FUSED, SPLIT
from tests.runtime.kernels.flash_cases import Case, assert_close

COMMON = {"batch": 1, "kv_heads": 1, "heads": 1, "dtype": "bfloat16", "head_dim": 64}
# Two tiles of queries, three of keys in two slots of shared memory, whole, cut and unseen ones.
CASES = {
    "causal": (Case(**COMMON | {"q_len": 150, "kv_len": 192, "causal": True, "q_offset": 64}), SPLIT),
    "masks": (
        Case(
            **COMMON | {"q_len": 100, "kv_len": 150, "heads": 2, "window": (60, 20),
                        "segments": True, "softcap": 3.0, "kv_offset": 30}
        ),
        SPLIT,
    ),
    "unseen": (
        Case(**COMMON | {"q_len": 128, "kv_len": 128, "causal": True, "q_offset": -70, "head_dim": 96}),
        SPLIT,
    ),
    "wide": (
        Case(**COMMON | {"q_len": 128, "kv_len": 128, "dtype": "float16", "head_dim": 256}), SPLIT,
    ),
    "fused": (
        Case(**COMMON | {"q_len": 128, "kv_len": 128, "heads": 2, "causal": True, "head_dim": 128}),
        FUSED,
    ),
}  # fmt: skip


def blocks_of(head_dim, kind, dq_block_kv):
    blocks = DEFAULTS[head_dim]
    return replace(
        blocks,
        forward=replace(blocks.forward, block_kv=64),
        backward=replace(blocks.backward, kind=kind, dq_block_kv=dq_block_kv),
    )


def leave_out_barrier():
    """The kernel's own source, but a warpgroup overwrites keys that the other may still read."""
    source = Path(hopper_dkv.__file__).read_text()
    planted = source.replace("if shared or fused:", "if False:")
    assert planted != source
    exec(compile(planted, hopper_dkv.__file__, "exec"), vars(hopper_dkv))


def main(name, planted):
    if planted:
        leave_out_barrier()
    case, kind = CASES[name]
    options = {
        # Blocks of keys that differ between the two backward kernels, in one of the cases.
        "blocks": blocks_of(case.head_dim, kind, dq_block_kv=192 if name == "masks" else 64),
        "interpret": compat.gpu_interpreter(detect_races=True),
    }
    arrays = q, k, v, dout, dlse, ids = case.arrays()
    spec, ids = case.spec_and_ids(q, k, v, ids)
    rest = (*case.offsets(), *ids)
    out, lse = jax.block_until_ready(
        jax.jit(partial(hopper.forward, spec, **options))(q, k, v, *rest)
    )
    races = compat.gpu_interpreter_found_races()
    delta = (out.astype("float32") * dout.astype("float32")).sum(-1).swapaxes(1, 2) - dlse
    backward = jax.jit(partial(hopper.backward, spec, **options))
    gradients = jax.block_until_ready(backward(q, k, v, lse, delta, dout, *rest))
    races |= compat.gpu_interpreter_found_races()
    print("races" if races else "no races", flush=True)  # noqa: T201
    assert_close(case, (out, lse, *gradients), case.expected(arrays))
    print("correct")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], "planted" in sys.argv[2:])
