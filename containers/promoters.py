"""Start a promoter for each TorchServe on this machine, and keep it running.

`docker compose up --scale torchserve=3` starts three TorchServes. Each takes a number and writes its address to
TORCHSERVE_REPLICAS/NUMBER.url (torchserve/start_torchserve.sh). Its promoter has a model store of that number next to
the first one, MODEL_STORE. The first promoter always runs, and its port is the one that page and Prometheus ask.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 1.0
GONE_SECONDS = 120.0  # without a server on its socket, a replica other than the first counts as removed


@dataclass
class Replica:
    """A TorchServe and its promoter."""

    number: int
    folder: Path
    store: Path
    url: str = ""
    promoter: subprocess.Popen[bytes] | None = None
    seen_at: float = field(default_factory=time.monotonic)

    @property
    def address(self) -> Path:
        """The file with the address of the prediction API."""
        return self.folder / f"{self.number}.url"

    def update(self) -> None:
        """Start the promoter if it does not run, or if TorchServe has another address."""
        if self._listens():
            self.seen_at = time.monotonic()
        try:
            url = self.address.read_text().strip()
        except FileNotFoundError:
            return
        if url != self.url or (self.promoter and self.promoter.poll() is not None):
            self.stop()
        if url and self.promoter is None:
            self.url, self.promoter = url, subprocess.Popen(COMMAND, env=self._environment())

    def is_gone(self) -> bool:
        """Whether TorchServe was removed, and did not only restart."""
        return self.number > 1 and time.monotonic() - self.seen_at > GONE_SECONDS

    def stop(self) -> None:
        """Stop the promoter; a step may be interrupted anywhere."""
        if self.promoter:
            self.promoter.terminate()
            self.promoter.wait()
            self.promoter = None

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            return probe.connect_ex(str(self.folder / f"{self.number}.sock")) == 0

    def _environment(self) -> dict[str, str]:
        variables = {
            "PROMOTER_REPLICA": str(self.number),
            "MODEL_STORE": str(self.store),
            "TORCHSERVE_MANAGEMENT": f"unix:{self.folder / f'{self.number}.sock'}",
            "TORCHSERVE_URL": f"file:{self.address}",
            "STACK_STATE": f"{os.environ['STACK_STATE']}/{self.number}",
        }
        if self.number > 1:
            variables |= {"PROMOTER_HOST": "127.0.0.1", "PROMOTER_PORT": str(9000 + self.number)}
        return os.environ | variables


COMMAND = (sys.executable, "-m", "mlflow_tracking.promotion.service")


def update(replicas: dict[int, Replica], folder: Path, stores: Path) -> None:
    """Start what is missing, and forget replicas that are gone."""
    locks = {int(path.stem) for path in folder.glob("*.lock") if path.stem.isdigit()}
    for number in sorted(locks | {1}):
        store = stores / str(number)
        store.mkdir(exist_ok=True)  # TorchServe waits for it
        if number not in replicas and (number == 1 or (folder / f"{number}.url").exists()):
            replicas[number] = Replica(number, folder, store)
    for replica in list(replicas.values()):
        replica.update()
        if replica.is_gone():
            replica.stop()
            replica.address.unlink(missing_ok=True)
            del replicas[replica.number]


def main() -> None:
    """Run until SIGTERM or Ctrl-C."""
    folder, stores = Path(os.environ["TORCHSERVE_REPLICAS"]), Path(os.environ["MODEL_STORE"]).parent
    replicas: dict[int, Replica] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        while True:
            update(replicas, folder, stores)
            time.sleep(INTERVAL)
    for replica in replicas.values():
        replica.stop()


if __name__ == "__main__":
    main()
