"""The `opscore` command, as far as it asks the API: over HTTP, with the SDK, and by nothing else.

A file per noun; `session` has what all commands share, `output` how things look. Exit statuses: 0
all is well, 1 it failed or the API refused, 2 wrong usage, 3 no connection, 4 no valid key.
"""

import click

from opscore.cli.agents import agent
from opscore.cli.overview import doctor
from opscore.cli.runs import run
from opscore.cli.schedules import schedule
from opscore.cli.tasks import task
from opscore.cli.workflows import workflow

COMMANDS: tuple[click.Command, ...] = (agent, doctor, run, schedule, task, workflow)
