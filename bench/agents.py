"""The agents of the benchmark: they do nothing, so that only what carries them is measured."""

import time
from typing import Any

from opscore import Context, agent

NAP_SECONDS = 0.05


@agent("bench")
def noop(parameters: dict[str, Any], context: Context) -> None:
    return None


@agent("bench-nap", capacity=1)
def nap(parameters: dict[str, Any], context: Context) -> None:
    time.sleep(NAP_SECONDS)


@agent("bench-team", capacity=4)
def nap_in_a_team(parameters: dict[str, Any], context: Context) -> None:
    time.sleep(NAP_SECONDS)
