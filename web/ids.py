"""Ids in paths: what is no UUID names nothing, and is answered like any id nobody has."""

from typing import ClassVar
from uuid import UUID

from werkzeug.exceptions import NotFound as NothingHere
from werkzeug.routing import BaseConverter

from opscore.errors import MemoryNotFound, NotFound, RunNotFound, TaskNotFound


class _Id(BaseConverter):
    error: ClassVar[type[NotFound]]
    name: ClassVar[str]

    def to_python(self, value: str) -> UUID:
        try:
            return UUID(value)
        except ValueError:
            # Routing lets only HTTP errors through; the handler answers with the cause.
            raise NothingHere from self.error(**{self.name: value})

    def to_url(self, value: UUID) -> str:
        return str(value)


class RunId(_Id):
    """`<run:run_id>`"""

    error, name = RunNotFound, "run_id"


class MemoryId(_Id):
    """`<memory:memory_id>`"""

    error, name = MemoryNotFound, "memory_id"


class TaskId(_Id):
    """`<task:task_id>`"""

    error, name = TaskNotFound, "task_id"
