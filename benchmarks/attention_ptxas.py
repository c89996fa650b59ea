"""Registers, spills and serialised wgmma of the Hopper attention kernels; needs no GPU.

    python -m benchmarks.attention_ptxas --plugin .../jax_plugins/xla_cuda13/xla_cuda_plugin.so

Every shipped form of every kernel is lowered for CUDA, compiled to PTX by the Mosaic compiler in
JAX's CUDA plugin, and put through `ptxas`. The plugin is in the wheel `jax_cuda13_pjrt` (0.11.2 or
newer: older ones cannot do it without a GPU); `ptxas` of CUDA 13 and a C compiler have to be on the
path. The driver is replaced by `cuda_stub.c`.

What it says: whether values leave the registers (spill bytes), and whether ptxas runs matrix
products one after the other (its warnings C75xx). What it does not say: how fast a kernel is.
Writes `results/attention_ptxas.json`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

STUB = Path(__file__).with_name("cuda_stub.c")
DUMP = "MOSAIC_GPU_DUMP_TO"  # set in the process that compiles
PASSES = {"forward": ("forward",), "split": ("dq", "dkv"), "fused": ("fused",)}  # their kernels
COLUMNS = (
    Column("kernel", "Kernel"),
    Column("head_dim", "Head dim"),
    Column("mask", "Mask"),
    Column("registers", "Registers"),
    Column("spill_bytes", "Spill stores, bytes"),
    Column("serialised", "wgmma serialised"),
    Column("barriers", "bar.sync"),
    Column("products", "wgmma"),
)


def main() -> None:
    options = parse_options(
        __doc__, list(PASSES), plugin="path of xla_cuda_plugin.so, from the wheel jax_cuda13_pjrt"
    )
    plugin = options.more["plugin"]
    missing = [tool for tool in ("cc", "ptxas") if shutil.which(tool) is None]
    if not plugin or not Path(plugin).is_file() or missing:
        sys.exit(f"--plugin is the file xla_cuda_plugin.so; got {plugin}. Not found: {missing}")
    if DUMP not in os.environ:
        sys.exit(_run_with_stub())
    compiled = [row for name in options.chosen for row in _report(name, plugin)]
    if options.save:
        version = re.search(r"release ([\d.]+)", _output("ptxas", "--version"))
        environment = describe_environment("no accelerator; for sm_90a")
        environment["ptxas"] = version[1] if version else "unknown"
        ResultsTable(
            title="Hopper attention kernels as ptxas sees them (bfloat16, shipped block sizes)",
            command="python -m benchmarks.attention_ptxas --plugin xla_cuda_plugin.so",
            environment=environment, columns=COLUMNS, rows=tuple(compiled),
        ).save("attention_ptxas")  # fmt: skip


def _run_with_stub() -> int:
    """This program again, in a process that finds the stub where the driver would be."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(STUB)], check=True)
        dumps = Path(folder, "dumps")
        dumps.mkdir()
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", DUMP: str(dumps), "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.attention_ptxas", *sys.argv[1:]]
        return subprocess.run(command, env=environment, check=False).returncode


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _report(name: str, plugin: str) -> Iterator[dict[str, Any]]:
    """Rows of the kernels of a pass."""
    from alpa_lite.runtime.kernels.flash.block_sizes import HEAD_DIMS, MASK_CLASSES
    from alpa_lite.runtime.kernels.flash.hopper_dkv import FUSED_DIM

    for dim in (FUSED_DIM,) if name == "fused" else HEAD_DIMS:
        for mask in MASK_CLASSES:
            lowered = _lower(name, dim, mask)
            for kernel, text in zip(PASSES[name], lowered, strict=True):
                case = {"kernel": kernel, "head_dim": dim, "mask": mask}
                row = {**case, **_ptxas(text, plugin)}
                print(row, flush=True)
                yield row


def _lower(name: str, dim: int, mask: str) -> list[bytes]:
    """The Mosaic modules of a pass, in the order of its kernels; sizes are whole tiles."""
    from jax.experimental.mosaic.gpu import core as mosaic

    from alpa_lite.runtime.kernels.flash.block_sizes import FUSED, SPLIT
    from benchmarks.attention_lowering import Configuration, lower_pass

    configuration = Configuration(
        head_dim=dim, dtype="bfloat16", mask=mask, softcap=None,
        kind=FUSED if name == "fused" else SPLIT, semantics="Lane",
    )  # fmt: skip
    mosaic.KNOWN_KERNELS.clear()
    lower_pass(configuration, forward=name == "forward", q_len=4096, kv_len=4096)
    return list(mosaic.KNOWN_KERNELS.values())


@functools.cache
def _compiler(plugin: str) -> Any:
    function = ctypes.CDLL(plugin).MosaicGpuCompile
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    return function


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the plugin prints about the driver that it does not have."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _ptxas(kernel: bytes, plugin: str) -> dict[str, Any]:
    folder = Path(os.environ[DUMP])
    before = set(folder.iterdir())
    with _quiet():
        _compiler(plugin)(kernel, len(kernel))  # fails when it loads the result, after ptxas
    new = set(folder.iterdir()) - before
    reports = [path.read_text() for path in new if path.suffix == ".ptxas"]
    sources = [path.read_text() for path in new if path.suffix == ".ptx"]
    if not reports:
        raise RuntimeError("the plugin wrote no report of ptxas; is it 0.11.2 or newer?")
    text, source = "\n".join(reports), "\n".join(sources)
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", text)), default=None),
        "spill_bytes": max(map(int, re.findall(r"(\d+) bytes spill stores", text)), default=None),
        "serialised": ", ".join(sorted(set(re.findall(r"C75\d+", text)))) or "no",
        "barriers": source.count("bar.sync"),
        "products": source.count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    main()
