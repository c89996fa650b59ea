"""`alpa-lite launch`: a program in several processes on this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from alpa_lite.cli.exits import InputError
from alpa_lite.runtime.launch import launch_local


class Platform(StrEnum):
    """What `--platform` may say."""

    CPU = "cpu"
    CUDA = "cuda"


def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="Program and arguments, the same for all."),
    ],
    num_processes: Annotated[
        int, typer.Option("--num-processes", "-n", min=1, help="How many processes.")
    ],
    devices_per_process: Annotated[
        int, typer.Option(min=1, help="Virtual CPU devices, or GPUs, of each process.")
    ] = 1,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="When to end them all; never if left out."),
    ] = None,
    platform: Annotated[
        Platform, typer.Option(help="cpu for virtual devices; cuda for this machine's GPUs.")
    ] = Platform.CPU,
) -> int:
    """Run a program in several processes on this machine, as on a cluster.

    The program calls alpa_lite.distributed_initialize() before it uses JAX. Options of the program
    come after it; a -- may stand in front of it. Lines are shown after the number of the process
    that wrote them. If a process fails, the others are ended. On a cluster its own launcher (srun,
    mpirun, Kubernetes) takes this part, with the same program.

    Exits with the code of the first process that failed (128 plus the signal if it was killed), or
    with 124 if time ran out.
    """
    try:
        return launch_local(
            num_processes, command, devices_per_process, timeout, platform=platform.value
        )
    except OSError as error:
        raise InputError(f"cannot start {command[0]!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
