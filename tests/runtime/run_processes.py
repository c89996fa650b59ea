"""Runs the programs of `process_programs` in several processes."""

import io
import sys
from pathlib import Path

from alpa_lite.runtime.launch import launch_local

PROGRAMS = Path(__file__).with_name("process_programs.py")


def run(num_processes: int, devices: int, *arguments: str, grace_s: float = 10) -> tuple[int, str]:
    """Exit code and output of one of `process_programs`."""
    output = io.StringIO()
    command = [sys.executable, str(PROGRAMS), *arguments]
    code = launch_local(num_processes, command, devices, 120, grace_s=grace_s, output=output)
    return code, output.getvalue()
