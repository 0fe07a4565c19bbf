"""The sentences of mlflow_tracking/registry_database.py, which `make up` shows."""

from pathlib import Path

from handlers.errors import UserError
from mlflow_tracking.command_line import console
from mlflow_tracking.registry_database import PREFIX, REFUSED


class RegistryRefused(UserError):
    """MLflow cannot use the registry's database."""


class RegistryNews:
    """The sentences that MLflow's log gets from now on."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = log.stat().st_size if log.exists() else 0

    def show(self) -> None:
        """Print new sentences. Raises RegistryRefused with the one that refuses the database."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                sentence = line.decode(errors="replace").strip()
                if sentence.startswith(REFUSED):
                    reason = sentence.removeprefix(REFUSED)
                    raise RegistryRefused(f"MLflow refuses its database. {reason}")
                if sentence.startswith(PREFIX):
                    console.print(sentence)
