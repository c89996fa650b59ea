"""What may be wrong with an installation: facts about it, and what they mean.

`gather` looks, `diagnose` judges; only the first touches the machine. Devices are counted by a
process of its own, so that a backend that hangs or aborts is a finding.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from alpa_lite.passes.intra_op.backends import available_solvers
from alpa_lite.virtual_devices import MIN_THREADS_PER_DEVICE, THREADS_PER_DEVICE

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""How bad a finding is: fine; fine for planning; in the way."""

PROBE_TIMEOUT_S: Final = 120.0

_PACKAGES = (
    "alpa-lite", "jax", "jaxlib", "flax", "optax", "pulp", "highspy", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu",
)  # fmt: skip
_GPU_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_ENVIRONMENT = (
    "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "PJRT_NPROC", "NPROC",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # fmt: skip
_NVIDIA = Path("/proc/driver/nvidia/gpus")

_PROBE = """
import json, jax
devices = jax.devices()
print(json.dumps([devices[0].platform, len(devices), devices[0].device_kind]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What JAX sees.

    Attributes:
      platform: `cpu`, `gpu`, `tpu`; `""` if JAX does not start.
      count: how many.
      kind: what the first is.
      error: why JAX does not start, else `""`.
    """

    platform: str
    count: int
    kind: str
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An installation and its machine.

    Attributes:
      python: version.
      packages: version by name, of those that are installed.
      jax_requirement: what alpa-lite asks for, `jax>=0.10.2,<0.13`; `""` if it is not installed.
      devices: what JAX sees.
      num_nvidia_gpus: that the driver shows.
      num_cpus: of the machine.
      environment: variables that matter, of those that are set.
      solvers: integer programming solvers that can be used.
    """

    python: tuple[int, ...]
    packages: Mapping[str, str]
    jax_requirement: str
    devices: Devices
    num_nvidia_gpus: int
    num_cpus: int
    environment: Mapping[str, str]
    solvers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      name: what.
      status: `ok`, `note` or `problem`.
      found: how it is.
      advice: what to do; `""` if nothing.
    """

    name: str
    status: str
    found: str
    advice: str = ""


def gather() -> Facts:
    """Look at this installation; takes as long as starting JAX does."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    required = metadata.requires("alpa-lite") or [] if "alpa-lite" in packages else []
    return Facts(
        python=tuple(sys.version_info[:3]), packages=packages,
        jax_requirement=next((r for r in required if re.match(r"jax\b(?!lib)", r)), ""),
        devices=_probe_devices(), num_nvidia_gpus=_count(_NVIDIA), num_cpus=os.cpu_count() or 1,
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        solvers=available_solvers(),
    )  # fmt: skip


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """What the facts mean."""
    return (
        _python(facts),
        _jax(facts),
        _accelerator(facts),
        _gpu_plugin(facts),
        _cpu_threads(facts),
        _solver(facts),
        _gpu_memory(facts),
    )


def _python(facts: Facts) -> Finding:
    found = ".".join(map(str, facts.python))
    if facts.python >= (3, 11):
        return Finding(name="Python", status=OK, found=found)
    return Finding(
        name="Python", status=PROBLEM, found=found, advice="alpa-lite needs Python 3.11 or newer."
    )


def _jax(facts: Facts) -> Finding:
    jax, jaxlib = (facts.packages.get(name) for name in ("jax", "jaxlib"))
    found = f"jax {jax or 'missing'}, jaxlib {jaxlib or 'missing'}"
    install = f"pip install -U '{facts.jax_requirement or 'jax'}'"
    if jax is None or jaxlib is None:
        return Finding(name="JAX", status=PROBLEM, found=found, advice=f"Run {install}.")
    if not satisfies(jax, facts.jax_requirement):
        advice = f"alpa-lite works with {facts.jax_requirement}: {install}"
        return Finding(name="JAX", status=PROBLEM, found=found, advice=advice)
    if _release(jax)[:3] != _release(jaxlib)[:3]:
        advice = f"jax and jaxlib are of one version: pip install -U jax=={jax} jaxlib=={jax}"
        return Finding(name="JAX", status=NOTE, found=found, advice=advice)
    return Finding(name="JAX", status=OK, found=found)


def _accelerator(facts: Facts) -> Finding:
    devices = facts.devices
    if devices.error:
        advice = "Planning needs no device, running does. Set JAX_PLATFORMS=cpu to leave it alone."
        return Finding(
            name="accelerator", status=PROBLEM, found=f"JAX does not start: {devices.error}",
            advice=advice,
        )  # fmt: skip
    found = f"{devices.count} x {devices.kind} ({devices.platform})"
    if devices.platform != "cpu":
        return Finding(name="accelerator", status=OK, found=found)
    hidden = facts.environment.get("JAX_PLATFORMS", "")
    advice = (
        f"JAX_PLATFORMS={hidden} hides accelerators, if there are any; unset it to use them."
        if hidden
        else "Plans are made without one (--cluster h100:4x8). To run on this machine, try virtual "
        "devices: alpa-lite train, or configure_virtual_cpu_devices(8) in your program."
    )
    return Finding(name="accelerator", status=NOTE, found=f"none: {found}", advice=advice)


def _gpu_plugin(facts: Facts) -> Finding:
    installed = [f"{n} {facts.packages[n]}" for n in _GPU_PLUGINS if n in facts.packages]
    gpus = facts.num_nvidia_gpus
    found = f"{gpus} NVIDIA GPU{'s' * (gpus != 1)}, {', '.join(installed) or 'no plugin'}"
    if gpus and not installed:
        advice = "JAX cannot use the GPUs: pip install 'alpa-lite[cuda13]', or [cuda12]."
        return Finding(name="GPU plugin", status=PROBLEM, found=found, advice=advice)
    jaxlib = facts.packages.get("jaxlib", "")
    versions = [facts.packages[n] for n in _GPU_PLUGINS if n in facts.packages]
    if any(_release(v)[:3] != _release(jaxlib)[:3] for v in versions):
        advice = f"The plugin has to be of jaxlib's version, {jaxlib}: pip install -U 'jax[cuda12]'"
        return Finding(name="GPU plugin", status=PROBLEM, found=found, advice=advice)
    if not installed:
        advice = (
            "Compiling for GPUs that one does not have needs the plugin: "
            "pip install 'alpa-lite[gpu-aot]'."
        )
        return Finding(name="GPU plugin", status=NOTE, found=found, advice=advice)
    return Finding(name="GPU plugin", status=OK, found=found)


def _cpu_threads(facts: Facts) -> Finding:
    count = virtual_devices(facts.environment)
    asked = facts.environment.get("PJRT_NPROC") or facts.environment.get("NPROC") or ""
    threads = int(asked) if asked.isdecimal() else facts.num_cpus
    found = f"{threads} threads for {count} virtual CPU device{'s' * (count != 1)}"
    if count > 1 and threads < MIN_THREADS_PER_DEVICE * count:
        advice = (
            f"With fewer than {MIN_THREADS_PER_DEVICE * count} threads collectives can deadlock: "
            f"set PJRT_NPROC={THREADS_PER_DEVICE * count}, or call "
            f"configure_virtual_cpu_devices({count}) before anything runs."
        )
        return Finding(name="CPU threads", status=PROBLEM, found=found, advice=advice)
    return Finding(name="CPU threads", status=OK, found=found)


def _solver(facts: Facts) -> Finding:
    found = ", ".join(facts.solvers) or "none"
    if "highs" in facts.solvers:
        return Finding(name="solver", status=OK, found=found)
    return Finding(
        name="solver", status=PROBLEM, found=f"{found}; HiGHS is missing",
        advice="Plans whose memory binds need an integer programming solver: pip install highspy.",
    )  # fmt: skip


def _gpu_memory(facts: Facts) -> Finding:
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    share = facts.environment.get(name)
    if facts.devices.platform != "gpu":
        return Finding(name="GPU memory", status=OK, found="no GPU in use")
    try:
        fine = share is not None and float(share) >= 0.9
    except ValueError:
        fine = False
    found = f"{name} is {share or 'not set (0.75)'}"
    if fine:
        return Finding(name="GPU memory", status=OK, found=found)
    advice = f"Plans fill 90 % of a device's memory; let JAX have as much: {name}=0.92"
    return Finding(name="GPU memory", status=NOTE, found=found, advice=advice)


def virtual_devices(environment: Mapping[str, str]) -> int:
    """CPU devices that the environment asks for."""
    count = environment.get("JAX_NUM_CPU_DEVICES", "")
    if count.isdecimal() and int(count) > 0:
        return int(count)
    flags = environment.get("XLA_FLAGS", "")
    found = re.findall(r"--xla_force_host_platform_device_count=([0-9]{1,6})\b", flags)
    return int(found[-1]) if found else 1


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version is in a window such as `jax>=0.10.2,<0.13`.

    Example:
      >>> satisfies("0.12.1", "jax<0.13,>=0.10.2"), satisfies("0.13.0", "jax<0.13,>=0.10.2")
      (True, False)
    """
    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    bounds = re.findall(r"(>=|<=|==|!=|>|<)\s*([0-9][0-9.]*)", requirement.split(";")[0])
    mine = _release(version)
    return all(compare[sign](mine, _release(bound)) for sign, bound in bounds)


def _release(version: str) -> tuple[int, ...]:
    """`0.10.2.dev3` as (0, 10, 2), with zeros in the place of missing parts."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    return (*numbers, 0, 0, 0)[: max(3, len(numbers))]


def _probe_devices() -> Devices:
    try:
        run = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False,
            timeout=PROBE_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        reason = f"it did not come up within {PROBE_TIMEOUT_S:.0f} s"
        return Devices(platform="", count=0, kind="", error=reason)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1]
        return Devices(platform="", count=0, kind="", error=last[:300])
    platform, count, kind = json.loads(run.stdout.splitlines()[-1])
    return Devices(platform=platform, count=count, kind=kind)


def _count(folder: Path) -> int:
    """Entries of a folder; none if it does not exist or cannot be read."""
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0
