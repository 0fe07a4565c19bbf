"""What the commands have in common about their options."""

import typer

from mlflow_tracking.registry import ALIASES


def known_alias(alias: str) -> str:
    """The value of --alias, or "" without one. Raises BadParameter for an alias that the promoter does not read."""
    if alias and alias not in ALIASES:
        raise typer.BadParameter(f"--alias is {' or '.join(ALIASES)}: nobody reads another.")
    return alias
