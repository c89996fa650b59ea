"""The error of a schedule that cannot run or is not what it says it is."""

from __future__ import annotations

from alpa_lite.errors import AlpaLiteError


class ScheduleError(AlpaLiteError, ValueError):
    """A schedule misses a task, would deadlock, or departs from its theory; the message says where.

    Attributes:
      mesh: the mesh at fault, or None if there is no single one.
      position: index into that mesh's list, or None.
    """

    def __init__(
        self, message: str, *, mesh: int | None = None, position: int | None = None
    ) -> None:
        super().__init__(message)
        self.mesh = mesh
        self.position = position
