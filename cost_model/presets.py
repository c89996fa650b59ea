"""Known hardware: `parse_cluster("h100:4x8")`, every figure with its source.

Peaks are dense (no 2:4 sparsity). Efficiencies are those of large operations, so they flatter small
ones. Figures marked *assumed* have no published measurement behind them that we read; figures
for `cpu` are placeholders: measure with `alpa_lite.runtime.calibrate`.

How link figures came about, for GPU kinds:
- bandwidth within a host: bus bandwidth that nccl-tests report for large ring collectives;
- alpha within a host: 4.0 us, latency of NVLink under NCCL's Simple protocol and tree algorithm;
  between hosts: 14 us, the same for the network (NVIDIA/nccl, src/graph/tuning.cc);
- overhead per collective: measured floor of an 8-GPU all-reduce less its 2 log2(8) alphas. With it
  the formulas meet those all-reduce sweeps (32 KiB to 16 GiB) within 10-16 % on average and 30 %
  at worst;
- bandwidth between hosts: 12 GB/s per 100 Gbit/s of a device's network share (NCCL's constant).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from alpa_lite.cost_model.checks import ClusterError, show
from alpa_lite.cost_model.cluster import Cluster, DeviceSpec, Link

_ML_ENGINEERING = "github.com/stas00/ml-engineering"
_MATMUL_SOURCE = f"best shape found, {_ML_ENGINEERING}, accelerators chapter, MAMF table"
_NCCL_TESTS = f"nccl-tests, {_ML_ENGINEERING}, network chapter"
_NCCL_ALPHA = "alpha: NVIDIA/nccl src/graph/tuning.cc"
_HBM_EFFICIENCY = (
    "2.8 of 3.35 TB/s in coalesced loads on an H100 (mikamirai.com/blog/gpu-memory-bandwidth); "
    "assumed for the others"
)
_HBM_BYTES = "openxla/xla target_config/specs (device_memory_size)"
_OP_OVERHEAD = "assumed: about one kernel of a CUDA graph"
_NETWORK_BYTES_PER_S_PER_GBIT = 12e9 / 100

# Devices that one host of a kind can have; a larger number is a slip (`h100:32` for `h100:4x8`).
_MAX_PER_HOST: Mapping[str, int] = MappingProxyType(
    {
        "v100": 16,
        "a100-40": 16,
        "a100-80": 16,
        "h100": 8,
        "h200": 8,
        "h800": 8,
        "b200": 8,
        "cpu": 1024,
    }
)


def parse_cluster(spec: str) -> Cluster:
    """See `Cluster.parse`."""
    form = "KIND:HOSTSxDEVICES or KIND:DEVICES, for example h100:4x8 or cpu:8"
    match = re.fullmatch(r"([a-z0-9-]+):(?:([0-9]{1,6})x)?([0-9]{1,6})", spec.strip().lower())
    if match is None:
        raise ClusterError("", f"cluster {show(spec)} has not the form {form}, nor of a .json path")
    kind, hosts, devices = match[1], int(match[2] or 1), int(match[3])
    if kind not in _PRESETS:
        near = [known for known in _PRESETS if known.startswith(kind)]
        near = near or difflib.get_close_matches(kind, _PRESETS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(_PRESETS)
        raise ClusterError(
            "", f"cluster {show(spec)}: unknown kind {kind!r}, known are {known}{hint}"
        )
    if hosts < 1 or devices < 1:
        raise ClusterError("", f"cluster {show(spec)}: hosts and devices must be at least 1")
    if devices > _MAX_PER_HOST[kind]:
        raise ClusterError(
            "",
            f"cluster {show(spec)}: a {kind} host has at most {_MAX_PER_HOST[kind]} devices, found "
            f"{devices}; write hosts x devices per host, for example {kind}:4x8",
        )
    return _PRESETS[kind].resized(hosts, devices)


def cluster_presets() -> Mapping[str, Cluster]:
    """One host of 8 devices of every known kind; `device.sources` and `provenance` say whence."""
    return _PRESETS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """Link figures of one GPU kind; rates in bytes/s, times in seconds."""

    intra_name: str
    intra_bytes_per_s: float
    intra_source: str
    inter_gbit_per_s: float
    inter_alpha_s: float = 14e-6
    inter_source: str
    overhead_s: float
    overhead_source: str


def _gpu(kind: str, device: DeviceSpec, network: _Network) -> Cluster:
    common = {
        "hbm_bytes": _HBM_BYTES,
        "hbm_efficiency": _HBM_EFFICIENCY,
        "op_overhead_s": _OP_OVERHEAD,
    }
    device = dataclasses.replace(device, sources={**common, **device.sources})
    return Cluster(
        name=f"{kind}:1x8",
        num_hosts=1,
        devices_per_host=8,
        device=device,
        intra_host=Link(
            name=network.intra_name, alpha_s=4e-6, bytes_per_s=network.intra_bytes_per_s
        ),
        inter_host=Link(
            name=f"{network.inter_gbit_per_s:g} Gbit/s per device",
            alpha_s=network.inter_alpha_s,
            bytes_per_s=network.inter_gbit_per_s * _NETWORK_BYTES_PER_S_PER_GBIT,
        ),
        collective_overhead_s=network.overhead_s,
        provenance={
            "intra_host": f"{network.intra_source}; {_NCCL_ALPHA}",
            "inter_host": f"{network.inter_source}; {_NCCL_ALPHA}",
            "collective_overhead_s": network.overhead_source,
        },
    )


_V100 = _gpu(
    "v100",
    DeviceSpec(
        name="NVIDIA V100-SXM2-16GB",
        flops_per_s={"float16": 125e12, "bfloat16": 15.7e12, "float32": 15.7e12, "float64": 7.8e12},
        vector_flops_per_s=15.7e12,
        matmul_efficiency=0.80,
        hbm_bytes=16_935_682_048,
        hbm_bytes_per_s=900e9,
        hbm_efficiency=0.84,
        op_overhead_s=2e-6,
        sources={
            "flops_per_s": "NVIDIA V100 data sheet (SXM2). float32 is plain FP32: Volta has no "
            "TF32, nor bfloat16, which runs as float32",
            "matmul_efficiency": "assumed",
            "hbm_bytes_per_s": "NVIDIA V100 data sheet",
        },
    ),
    _Network(
        intra_name="NVLink 2 (hybrid cube mesh)", intra_bytes_per_s=120e9,
        intra_source="6 links of 20 GB/s, NVIDIA/nccl src/graph/topo.h",
        inter_gbit_per_s=25 / 8, inter_alpha_s=40e-6,
        inter_source="AWS p3.16xlarge, 25 Gbit/s per 8 GPUs, the testbed of Alpa (OSDI'22, "
        "section 8); alpha assumed (TCP)",
        overhead_s=20e-6, overhead_source="assumed as a100",
    ),
)  # fmt: skip

_A100_FLOPS = {
    "bfloat16": 312e12, "float16": 312e12, "float32": 156e12, "float64": 19.5e12, "int8": 624e12,
}  # fmt: skip


def _a100(
    kind: str, memory: str, hbm_bytes: int, bytes_per_s: float, gbit: float, net: str
) -> Cluster:
    return _gpu(
        kind,
        DeviceSpec(
            name=f"NVIDIA A100-SXM4-{memory}",
            flops_per_s=_A100_FLOPS,
            vector_flops_per_s=19.5e12,
            matmul_efficiency=0.869,
            hbm_bytes=hbm_bytes,
            hbm_bytes_per_s=bytes_per_s,
            hbm_efficiency=0.84,
            op_overhead_s=2e-6,
            sources={
                "flops_per_s": "NVIDIA A100 data sheet; float32 is TF32",
                "matmul_efficiency": f"271.2 of 312 TFLOP/s bfloat16, {_MATMUL_SOURCE}",
                "hbm_bytes_per_s": "NVIDIA A100 data sheet",
            },
        ),
        _Network(
            intra_name="NVLink 3", intra_bytes_per_s=235e9,
            intra_source=f"all-reduce at 16 GiB, {_NCCL_TESTS}",
            inter_gbit_per_s=gbit, inter_source=net,
            overhead_s=20e-6, overhead_source=f"floor of 44 us, {_NCCL_TESTS}",
        ),
    )  # fmt: skip


_HOPPER_FLOPS = {
    "bfloat16": 989e12, "float16": 989e12, "float32": 494.5e12, "float64": 67e12,
    "float8_e4m3fn": 1979e12, "float8_e5m2": 1979e12, "int8": 1979e12,
}  # fmt: skip


def _hopper(
    kind: str, name: str, hbm_bytes: int, hbm_bytes_per_s: float, intra: tuple[float, str]
) -> Cluster:
    return _gpu(
        kind,
        DeviceSpec(
            name=name,
            flops_per_s=_HOPPER_FLOPS,
            vector_flops_per_s=67e12,
            matmul_efficiency=0.803,
            hbm_bytes=hbm_bytes,
            hbm_bytes_per_s=hbm_bytes_per_s,
            hbm_efficiency=0.84,
            op_overhead_s=2e-6,
            sources={
                "flops_per_s": "NVIDIA H100 and H200 data sheets (SXM, halved where they quote "
                "sparsity); float32 is TF32",
                "matmul_efficiency": f"794.5 of 989 TFLOP/s bfloat16, {_MATMUL_SOURCE}",
                "hbm_bytes_per_s": f"NVIDIA {kind.upper()} data sheet",
            },
        ),
        _Network(
            intra_name="NVLink 4", intra_bytes_per_s=intra[0], intra_source=intra[1],
            inter_gbit_per_s=400, inter_source="one NDR or 400 GbE card per GPU, as in DGX H100",
            overhead_s=14e-6, overhead_source=f"floor of 38 us on H200, {_NCCL_TESTS}",
        ),
    )  # fmt: skip


_NVLINK_4 = (
    361e9, f"H200 ring all-gather at 16 GiB (all-reduce in the switch reaches 482), {_NCCL_TESTS}"
)  # fmt: skip
_NVLINK_4_REDUCED = 160e9, "DeepSeek-V3 technical report (arXiv 2412.19437), section 3.2.2"

_B200 = _gpu(
    "b200",
    DeviceSpec(
        name="NVIDIA B200-SXM",
        flops_per_s={
            "bfloat16": 2250e12, "float16": 2250e12, "float32": 1100e12, "float64": 40e12,
            "float8_e4m3fn": 4500e12, "float8_e5m2": 4500e12, "int8": 4500e12,
        },
        vector_flops_per_s=80e12,
        matmul_efficiency=0.776,
        hbm_bytes=191_514_411_008,
        hbm_bytes_per_s=7.7e12,
        hbm_efficiency=0.84,
        op_overhead_s=2e-6,
        sources={
            "flops_per_s": "NVIDIA Blackwell architecture brief (HGX B200, 1000 W), as tabulated "
            "in glennklockwood.com/garden/processors/B200; float32 is TF32",
            "matmul_efficiency": f"1745 of 2250 TFLOP/s bfloat16, {_MATMUL_SOURCE}",
            "hbm_bytes_per_s": "github.com/NVIDIA/dgxc-benchmarking README",
        },
    ),
    _Network(
        intra_name="NVLink 5", intra_bytes_per_s=682e9,
        intra_source=f"ring all-reduce at 8 GiB (in the switch it reaches 846), {_NCCL_TESTS}",
        inter_gbit_per_s=400, inter_source="one 400 Gbit/s card per GPU, as in DGX B200",
        overhead_s=24e-6, overhead_source=f"floor of 48 us, {_NCCL_TESTS}",
    ),
)  # fmt: skip

_CPU_SOURCE = "placeholder: rounded from one calibration of 8 virtual devices on 2 cores; calibrate"
_CPU = Cluster(
    name="cpu:1x8",
    num_hosts=1,
    devices_per_host=8,
    device=DeviceSpec(
        name="virtual CPU device",
        flops_per_s={"float32": 25e9, "float64": 12e9, "bfloat16": 25e9, "float16": 12e9},
        matmul_efficiency=1.0,
        hbm_bytes=8 * 2**30,
        hbm_bytes_per_s=6e9,
        hbm_efficiency=1.0,
        op_overhead_s=1e-6,
        sources=dict.fromkeys(("flops_per_s", "hbm_bytes_per_s", "op_overhead_s"), _CPU_SOURCE),
    ),
    intra_host=Link(name="shared memory", alpha_s=20e-6, bytes_per_s=2e9),
    inter_host=Link(name="between processes", alpha_s=200e-6, bytes_per_s=0.5e9),
    provenance=dict.fromkeys(("intra_host", "inter_host"), _CPU_SOURCE),
)

_PRESETS: Mapping[str, Cluster] = MappingProxyType(
    {
        "v100": _V100,
        "a100-40": _a100(
            "a100-40", "40GB", 42_331_013_120, 1555e9, 50,
            "AWS p4d, 4 cards of 100 Gbit/s per 8 GPUs",
        ),
        "a100-80": _a100(
            "a100-80", "80GB", 85_100_068_864, 2039e9, 200,
            "one HDR card per GPU, as in Selene (Narayanan et al., SC'21)",
        ),
        "h100": _hopper("h100", "NVIDIA H100-SXM-80GB", 84_942_979_072, 3350e9, _NVLINK_4),
        "h200": _hopper("h200", "NVIDIA H200-SXM-141GB", 151_397_597_184, 4800e9, _NVLINK_4),
        "h800": _hopper("h800", "NVIDIA H800-SXM-80GB", 84_942_979_072, 3350e9, _NVLINK_4_REDUCED),
        "b200": _B200,
        "cpu": _CPU,
    }
)  # fmt: skip
