"""Start both nginx in front of TorchServe's replicas, and keep their list of replicas up to date.

PROXY_UPSTREAM is HOST:PORT of TorchServe, or several with commas. Each address behind these names is a replica. Every
second it asks each replica for the model. nginx gets the replicas that have it; if none has it, those that
answer; if none answers, all. When this list changes, the nginx that chooses replicas is reloaded.

A client that stays on its connection must not get an older version after a newer one. So each connection belongs to one
of SLOTS slots, and each slot to one replica as long as that is listed. A replica that was away is listed again when the
promoter at PROMOTER_URL says that it is current. Without a promoter all count as current.

Standard library only: the proxy's image has no packages.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
FOLDER = Path("/tmp")  # the configurations name it, too
MODEL = "/predictions/skin_vit"
INTERVAL = 1.0
TIMEOUT = 2.0
MISSES = 2  # probes in a row without an answer, until a replica leaves the list
SLOTS = 60  # divided evenly by 2 to 6, 10, 12 and 15 replicas; more replicas than slots would get nothing
READY, OUTDATED, EMPTY, SILENT = "ready", "outdated", "without the model", "silent"

Address = tuple[str, int]


class Replicas:
    """The replicas behind names, and their states; `promoter` knows which of them are current."""

    def __init__(self, upstream: str, promoter: str = "") -> None:
        self.names = [(host, int(port)) for host, _, port in (name.rpartition(":") for name in upstream.split(","))]
        self.states: dict[Address, str] = {}
        self._promoter = promoter
        self._misses: dict[Address, int] = {}

    def update(self) -> list[Address]:
        """Look up the names, ask each address, and return the replicas for nginx."""
        addresses = self._resolve()
        with ThreadPoolExecutor(max(1, len(addresses))) as pool:
            answers = dict(zip(addresses, pool.map(probe, addresses), strict=True))
        outdated = outdated_replicas(self._promoter)
        self._misses = {a: self._misses.get(a, 0) + 1 if answers[a] == SILENT else 0 for a in addresses}
        before, self.states = self.states, {}
        for address in addresses:
            state = answers[address]
            if 0 < self._misses[address] < MISSES:
                state = before.get(address, SILENT)
            elif state == READY and before.get(address) != READY and address in outdated:
                state = OUTDATED
            self.states[address] = state
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


def outdated_replicas(promoter: str) -> set[Address]:
    """Return the replicas that the promoter knows and that are not current; none if it does not answer."""
    if not promoter:
        return set()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{promoter}/status", timeout=TIMEOUT) as answer:
            replicas = json.load(answer).get("replicas", [])
        urls = [urlsplit(replica["url"]) for replica in replicas if not replica["current"]]
        return {(url.hostname or "", url.port or 80) for url in urls}
    except (OSError, http.client.HTTPException, ValueError, LookupError):
        return set()


def choose(states: Mapping[Address, str]) -> list[Address]:
    """Return the replicas in the best state that occurs."""
    for state in (READY, OUTDATED, EMPTY, SILENT):
        if replicas := [address for address, own in states.items() if own == state]:
            return replicas
    return []


def assign(slots: Sequence[Address | None], replicas: Sequence[Address]) -> list[Address | None]:
    """Return the replica of each slot: the same as before if it is listed, but none has more than its share."""
    if not replicas:
        return list(slots)
    share = -(-len(slots) // len(replicas))
    counts = dict.fromkeys(replicas, 0)
    assigned: list[Address | None] = []
    for replica in slots:
        stays = replica is not None and replica in counts and counts[replica] < share
        assigned.append(replica if stays else None)
        if replica is not None and stays:
            counts[replica] += 1
    for number, replica in enumerate(assigned):
        if replica is None:
            least = min(counts, key=counts.__getitem__)
            assigned[number] = least
            counts[least] += 1
    return assigned


def upstreams(replicas: Sequence[Address], slots: Sequence[Address | None]) -> str:
    """Return nginx's groups: for each slot its replica before the others, and the others after a replica failed."""
    names = [_name(replica) for replica in replicas] or ["127.0.0.1:9"]  # nothing listens there
    text, failed = _group("all", names), ["default all;"]
    chosen = ["default all;"]
    for number, name in enumerate(names if len(names) > 1 else []):
        others = names[:number] + names[number + 1 :]
        text += _group(f"replica{number}", [name], others) + _group(f"others{number}", others)
        failed.append(f'"~{re.escape(name)}$" others{number};')
        chosen += [f"{slot} replica{number};" for slot, own in enumerate(slots) if own and _name(own) == name]
    maps = {"$upstream_addr $others": failed, "$http_x_slot $replica": chosen}
    return text + "".join(f"map {variables} {{ {' '.join(lines)} }}\n" for variables, lines in maps.items())


def _name(replica: Address) -> str:
    host, port = replica
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def _group(group: str, names: Iterable[str], backups: Iterable[str] = ()) -> str:
    """Return a group with the fewest-connections rule. An answer with 500 or 503 excludes no replica: max_fails=0."""
    servers = [f"server {name} max_fails=0;" for name in names]
    servers += [f"server {name} max_fails=0 backup;" for name in backups]
    return f"upstream {group} {{ zone {group} 64k; least_conn; {' '.join(servers)} }}\n"


def write(name: str, text: str) -> None:
    """Replace a file that a configuration includes."""
    temporary = FOLDER / f"{name}.new"
    temporary.write_text(text)
    temporary.replace(FOLDER / name)


def prepare() -> None:
    """Write the sockets of the slots for nginx.conf, and remove those of a killed nginx."""
    sockets = [FOLDER / f"slot-{slot}.sock" for slot in range(SLOTS)]
    for path in (*sockets, FOLDER / "replicas.sock"):
        path.unlink(missing_ok=True)
    write("slots.listen", "".join(f"listen unix:{path};\n" for path in sockets))
    write("slots.servers", "".join(f"server unix:{path};\n" for path in sockets))


def start(configuration: str) -> subprocess.Popen[bytes]:
    """Start an nginx."""
    return subprocess.Popen(["nginx", "-c", str(HERE / configuration), "-g", "daemon off;"])


def main() -> int:
    """Run until one nginx ends or a signal comes. Returns the exit code of the nginx that clients reach."""
    current = Replicas(os.environ.get("PROXY_UPSTREAM", "torchserve:8080"), os.environ.get("PROMOTER_URL", ""))
    replicas = current.update()
    slots = assign([None] * SLOTS, replicas)
    prepare()
    write("replicas.list", upstreams(replicas, slots))
    chooser, entrance = start("replicas.conf"), start("nginx.conf")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, _: entrance.send_signal(number))
    while entrance.poll() is None and chooser.poll() is None:
        time.sleep(INTERVAL)
        latest = current.update()
        if latest and latest != replicas:
            replicas = latest
            print(f"Replicas of TorchServe: {', '.join(f'{host}:{port}' for host, port in replicas)}.", flush=True)
            slots = assign(slots, replicas)
            write("replicas.list", upstreams(replicas, slots))
            chooser.send_signal(signal.SIGHUP)
    for nginx in (entrance, chooser):
        nginx.terminate()
    chooser.wait()
    return entrance.wait()


if __name__ == "__main__":
    sys.exit(main())
