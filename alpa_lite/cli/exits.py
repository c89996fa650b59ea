"""How a command ends: exit codes, and which errors become one message instead of a traceback.

| code | meaning                                                            |
|------|--------------------------------------------------------------------|
| 0    | done                                                               |
| 1    | the result is not what it should be, or the solver ran out of time |
| 2    | no plan fits the memory or the other constraints                   |
| 3    | bad input: options, names, files, a step that breaks the contract  |
| 130  | interrupted                                                        |

`launch` exits with the code of what it has launched. Anything else that goes wrong is a bug and
keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import typer
from typer.core import TyperGroup

from alpa_lite.errors import AlpaLiteError, InfeasibleError, SolverTimeoutError

FAILED: Final = 1
INFEASIBLE: Final = 2
BAD_INPUT: Final = 3
INTERRUPTED: Final = 130

# What the option parser raises; Typer has its own or Click's, depending on its version.
_UsageError: Any = typer.BadParameter.__base__


class InputError(Exception):
    """What the user gave cannot be used; the message says why and what can."""


class CommandGroup(TyperGroup):
    """A group of commands with the exit codes above."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and, unless `standalone_mode` is off, exit the process with its code."""
        exits = options.pop("standalone_mode", True)
        code = self._run(*args, **options, standalone_mode=False)
        if not exits:
            return code
        sys.exit(code)

    def _run(self, *args: Any, **options: Any) -> int:
        try:
            result = super().main(*args, **options)
        except _UsageError as error:
            return _complain(_usage_message(error), BAD_INPUT)
        except typer.Abort:
            return INTERRUPTED
        except InfeasibleError as error:
            return _complain(_with_flags(str(error)), INFEASIBLE)
        except SolverTimeoutError as error:
            return _complain(str(error), FAILED)
        except (AlpaLiteError, InputError) as error:
            return _complain(_with_flags(str(error)), BAD_INPUT)
        return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _with_flags(message: str) -> str:
    """An error of the library, which knows its own names of options only."""
    return message.replace("memory_budget_bytes", "--memory-budget (memory_budget_bytes)")


def _usage_message(error: Any) -> str:
    context = error.ctx
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{error.format_message()}{hint}"
