"""Runs one case of a benchmark in a process of its own: its own peak memory, nothing cached."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any


def run_apart(module: str, case: str, *options: str) -> dict[str, Any]:
    """What `python -m MODULE --here CASE [OPTIONS]` prints as JSON on its last line.

    Raises:
      RuntimeError: it failed; the message has the end of what it printed.
    """
    command = [sys.executable, "-m", module, "--here", case, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss_gb() -> float:
    """Peak memory of this process, 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
