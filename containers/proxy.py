"""Start both nginx in front of TorchServe's replicas, and keep their list of replicas up to date.

PROXY_UPSTREAM is HOST:PORT of TorchServe, or several with commas. Each address behind these names is a replica. Every
second it asks each replica for the model. nginx gets the replicas that have it; if none has it, those that
answer; if none answers, all. When this list changes, the nginx that chooses replicas is reloaded.

Standard library only: the proxy's image has no packages.
"""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = Path("/tmp")  # the configurations name it, too
MODEL = "/predictions/skin_vit"
INTERVAL = 1.0
TIMEOUT = 2.0
MISSES = 2  # probes in a row without an answer, until a replica leaves the list
READY, EMPTY, SILENT = "ready", "without the model", "silent"

Address = tuple[str, int]


class Replicas:
    """The replicas behind names, and their states."""

    def __init__(self, upstream: str) -> None:
        self.names = [(host, int(port)) for host, _, port in (name.rpartition(":") for name in upstream.split(","))]
        self.states: dict[Address, str] = {}
        self._misses: dict[Address, int] = {}

    def update(self) -> list[Address]:
        """Look up the names, ask each address, and return the replicas for nginx."""
        addresses = self._resolve()
        with ThreadPoolExecutor(max(1, len(addresses))) as pool:
            answers = dict(zip(addresses, pool.map(probe, addresses), strict=True))
        self._misses = {a: self._misses.get(a, 0) + 1 if answers[a] == SILENT else 0 for a in addresses}
        self.states = {
            address: self.states.get(address, SILENT) if 0 < self._misses[address] < MISSES else answers[address]
            for address in addresses
        }
        return choose(self.states)

    def _resolve(self) -> list[Address]:
        """Return the addresses of all names; those of a name that cannot be resolved now are left out."""
        addresses: set[Address] = set()
        for host, port in self.names:
            with suppress(OSError):
                addresses |= {info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}  # type: ignore[misc]
        return sorted(addresses)


def probe(address: Address) -> str:
    """Return the state of a replica. TorchServe answers OPTIONS with 404 if it lacks the model; no worker is needed."""
    try:
        with closing(http.client.HTTPConnection(*address, timeout=TIMEOUT)) as connection:
            connection.request("OPTIONS", MODEL)
            return READY if connection.getresponse().status == 200 else EMPTY
    except (OSError, http.client.HTTPException):
        return SILENT


def choose(states: Mapping[Address, str]) -> list[Address]:
    """Return the replicas in the best state that occurs."""
    for state in (READY, EMPTY, SILENT):
        if replicas := [address for address, own in states.items() if own == state]:
            return replicas
    return []


def upstreams(replicas: Sequence[Address]) -> str:
    """Return nginx's groups of replicas: all of them, and for each replica the others, for requests that it failed."""
    names = [f"{f'[{host}]' if ':' in host else host}:{port}" for host, port in replicas]
    if not names:
        names = ["127.0.0.1:9"]  # nothing listens there
    text, lines = _group("torchserve", names), ["default torchserve;"]
    for number, name in enumerate(names if len(names) > 1 else []):
        text += _group(f"others{number}", names[:number] + names[number + 1 :])
        lines.append(f'"~{re.escape(name)}$" others{number};')
    return text + f"map $upstream_addr $others {{ {' '.join(lines)} }}\n"


def _group(group: str, names: Iterable[str]) -> str:
    """Return a group with the fewest-connections rule. An answer with 500 or 503 excludes no replica: max_fails=0."""
    servers = " ".join(f"server {name} max_fails=0;" for name in names)
    return f"upstream {group} {{ zone {group} 64k; least_conn; {servers} }}\n"


def write(replicas: Sequence[Address]) -> None:
    """Replace nginx's list of replicas."""
    path = FOLDER / "replicas.list"
    temporary = path.with_suffix(".new")
    temporary.write_text(upstreams(replicas))
    temporary.replace(path)


def start(configuration: str) -> subprocess.Popen[bytes]:
    """Start an nginx."""
    return subprocess.Popen(["nginx", "-c", str(HERE / configuration), "-g", "daemon off;"])


def main() -> int:
    """Run until one nginx ends or a signal comes. Returns the exit code of the nginx that clients reach."""
    current = Replicas(os.environ.get("PROXY_UPSTREAM", "torchserve:8080"))
    replicas = current.update()
    write(replicas)
    (FOLDER / "replicas.sock").unlink(missing_ok=True)  # of a killed nginx
    chooser, entrance = start("replicas.conf"), start("nginx.conf")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, _: entrance.send_signal(number))
    while entrance.poll() is None and chooser.poll() is None:
        time.sleep(INTERVAL)
        latest = current.update()
        if latest and latest != replicas:
            replicas = latest
            print(f"Replicas of TorchServe: {', '.join(f'{host}:{port}' for host, port in replicas)}.", flush=True)
            write(replicas)
            chooser.send_signal(signal.SIGHUP)
    for nginx in (entrance, chooser):
        nginx.terminate()
    chooser.wait()
    return entrance.wait()


if __name__ == "__main__":
    sys.exit(main())
