"""Runs the programs of `process_programs` and `pipeline_processes` in several processes."""

import io
import sys
from pathlib import Path

from alpa_lite.runtime.launch import launch_local

PROGRAMS = Path(__file__).with_name("process_programs.py")


def run(
    num_processes: int, devices: int, *arguments: str, grace_s: float = 10,
    programs: Path = PROGRAMS, timeout_s: float = 120,
) -> tuple[int, str]:  # fmt: skip
    """Exit code and output of one of `process_programs`, or of other programs."""
    output = io.StringIO()
    command = [sys.executable, str(programs), *arguments]
    code = launch_local(num_processes, command, devices, timeout_s, grace_s=grace_s, output=output)
    return code, output.getvalue()
