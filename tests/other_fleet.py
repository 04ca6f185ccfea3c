"""A worker that has other agents than the rest."""

from typing import Any

from opscore import Context, agent


@agent("stranger")
def stranger(parameters: dict[str, Any], context: Context) -> Any:
    return "strange"
