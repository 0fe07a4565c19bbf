"""The proxy in front of several TorchServes.

A replica is listed if it has the model; without such a replica, if it answers. One that returns with an older version
waits until it is current. With nginx itself, in a container: the replicas share the connections, and a connection keeps
its replica. What a replica answers with 500, 503 or 507, or does not answer, another replica answers. The handler's
refusals are passed on unchanged. A killed and a frozen replica fail no request.
"""

import json
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.child_processes import free_ports
from tests.conftest import ROOT
from tests.http_stub import Answer, handler, running, serve
from tests.test_containers import script
from tests.waiting import eventually

IMAGE, CONTAINER = "skin-lesion/proxy:proxy-test", "skin-lesion-proxy-test"
PATH = "/predictions/skin_vit"


class Replica(ThreadingHTTPServer):
    """A TorchServe that answers with `status` after `seconds`, or freezes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int = 0) -> None:
        self.status, self.seconds, self.has_model = 200, 0.01, True
        self.running = threading.Event()
        self.running.set()
        self.asked = 0
        super().__init__((host, port), handler(self.answer, keep_alive=True))

    def answer(self, request: BaseHTTPRequestHandler, _: bytes) -> Answer:
        if is_prediction := request.command == "POST":
            self.asked += 1
            time.sleep(self.seconds)
        self.running.wait()
        status = self.status if is_prediction else 200 if self.has_model else 404
        return Answer(status, json.dumps({"replica": self.server_port, "status": status}).encode())

    def handle_error(self, *_: object) -> None: ...


@contextmanager
def replicas(count: int, host: str = "127.0.0.1") -> Iterator[list[Replica]]:
    servers = [Replica(host) for _ in range(count)]
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(running(server))
            stack.callback(server.running.set)
        yield servers


def test_replicas_with_the_model_are_listed_or_else_those_that_answer(monkeypatch):
    proxy = script("proxy")
    monkeypatch.setattr(proxy, "TIMEOUT", 0.2)
    with replicas(3) as (first, second, third):
        addresses = [("127.0.0.1", server.server_port) for server in (first, second, third)]
        listed = proxy.Replicas(",".join(f"{host}:{port}" for host, port in addresses) + ",no-such-host.invalid:1")
        third.has_model = False
        assert listed.update() == sorted(addresses[:2])
        second.running.clear()
        assert listed.update() == sorted(addresses[:2]), "one missed probe is no failure"
        assert listed.update() == addresses[:1]
        first.has_model = False
        assert listed.update() == sorted([addresses[0], addresses[2]])
        for server in (first, third):
            server.running.clear()
        assert listed.update() and listed.update() == sorted(addresses), "no replica answers: try all"
        assert sorted(listed.states.values()) == ["silent"] * 3


def test_a_failed_request_has_a_group_of_other_replicas():
    proxy = script("proxy")
    replicas = [("10.0.0.1", 8080), ("fe80::1", 8080)]
    text = proxy.upstreams(replicas, [replicas[1], replicas[0]])
    assert re.search(r"upstream others0 {[^}]* server \[fe80::1\]:8080 max_fails=0; }", text)
    assert r'"~10\.0\.0\.1:8080$" others0;' in text
    assert re.search(r"upstream replica1 {[^}]* server \[fe80::1\]:8080 max_fails=0; server 10[^;]* backup; }", text)
    assert re.search(r"map \$http_x_slot \$replica {[^}]* 1 replica0; 0 replica1; }", text)
    assert "others" not in proxy.upstreams([], [None]).replace("$others", "")


def test_a_replica_that_returns_waits_until_it_is_current(monkeypatch):
    proxy = script("proxy")
    monkeypatch.setattr(proxy, "TIMEOUT", 0.2)
    with replicas(2) as (first, second):
        addresses = [("127.0.0.1", server.server_port) for server in (first, second)]
        outdated: set[tuple[str, int]] = set()
        monkeypatch.setattr(proxy, "outdated_replicas", lambda promoter: outdated)
        listed = proxy.Replicas(",".join(f"{host}:{port}" for host, port in addresses))
        assert listed.update() == sorted(addresses)
        outdated.add(addresses[1])
        assert listed.update() == sorted(addresses), "a replica that was not away switches in its turn"
        second.running.clear()
        assert listed.update() and listed.update() == addresses[:1]
        second.running.set()
        assert listed.update() == addresses[:1]
        outdated.clear()
        assert listed.update() == sorted(addresses)


def test_the_promoter_says_which_replica_is_outdated():
    proxy = script("proxy")
    known = [{"url": "http://10.0.0.1:8080", "current": True}, {"url": "http://10.0.0.2:8080", "current": False}]
    with serve(lambda *_: Answer(body=json.dumps({"replicas": known}).encode())) as url:
        assert proxy.outdated_replicas(url) == {("10.0.0.2", 8080)}
    assert proxy.outdated_replicas(url) == set(), "no server answers"


@given(st.lists(st.sets(st.integers(1, 20), min_size=1, max_size=8), min_size=1, max_size=5))
def test_slots_are_shared_evenly_and_stay_with_their_replica(changes):
    proxy = script("proxy")
    slots = [None] * proxy.SLOTS
    for numbers in changes:
        listed = [(f"10.0.0.{number}", 8080) for number in sorted(numbers)]
        before, slots = slots, proxy.assign(slots, listed)
        counts = Counter(slots)
        assert set(counts) <= set(listed)
        assert max(counts.values()) == -(-proxy.SLOTS // len(listed))
        share = -(-proxy.SLOTS // len(listed))
        for replica in listed:
            kept = sum(old == new == replica for old, new in zip(before, slots, strict=True))
            assert kept == min(share, before.count(replica))


def docker(*words: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def nginx(servers: list[Replica], host: str) -> Iterator[str]:
    """The proxy's container in front of the replicas; its address."""
    [port] = free_ports(1)
    docker("rm", "--force", CONTAINER, check=False)
    upstream = ",".join(f"{host}:{server.server_port}" for server in servers)
    options = ["--read-only", "--cap-drop=ALL", "--tmpfs=/tmp", "--init", f"--env=PROXY_UPSTREAM={upstream}"]
    docker("run", "--detach", f"--name={CONTAINER}", f"--publish=127.0.0.1:{port}:8080", *options, IMAGE)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        docker("rm", "--force", CONTAINER)


def milliseconds(url: str) -> float:
    """The median time of a request, on one connection."""
    times = []
    with httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(200):
            began = time.monotonic()
            client.post(PATH, content=b"x" * 40_000)
            times.append(time.monotonic() - began)
    return 1000 * median(times)


class Load:
    """Clients that send requests until the end, each on a connection that stays."""

    def __init__(self, url: str, clients: int = 16) -> None:
        self.statuses: Counter[int] = Counter()
        self.answered_by: Counter[int] = Counter()
        self.slowest, self.moves = 0.0, 0
        self.end = threading.Event()
        self.pool = ThreadPoolExecutor(clients)
        self.clients = [self.pool.submit(self._send, url) for _ in range(clients)]

    def _send(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=90, trust_env=False) as client:
            last = 0
            while not self.end.is_set():
                began = time.monotonic()
                response = client.post(PATH, content=b"x" * 40_000)
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.statuses[response.status_code] += 1
                replica = response.json().get("replica", 0)
                self.answered_by[replica] += 1
                self.moves += last not in (0, replica)
                last = replica

    def during(self, seconds: float) -> Counter[int]:
        """Return how many requests each replica answers in the next seconds."""
        before = Counter(self.answered_by)
        time.sleep(seconds)
        return self.answered_by - before

    def stop(self) -> None:
        self.end.set()
        for client in self.clients:
            client.result(90)


@pytest.fixture(scope="module")
def host() -> str:
    """This machine's address for containers; the proxy's image is built."""
    assert subprocess.run(["docker", "info"], capture_output=True).returncode == 0, "A Docker Engine is needed."
    environment = os.environ | {"IMAGE_TAG": "proxy-test", "COMPOSE_ANSI": "never"}
    build = ["docker", "compose", "build", "--quiet", "proxy"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env=environment)
    return docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")


@pytest.mark.containers
@pytest.mark.timeout(600)
def test_no_request_fails_while_replicas_fail(host):
    with replicas(3, host) as (first, second, third), nginx([first, second, third], host) as url:
        eventually(lambda: httpx.post(url + PATH, content=b"x", trust_env=False).status_code == 200, 30)
        direct = f"http://{host}:{first.server_port}"
        print(f"\nthe proxy adds {milliseconds(url) - milliseconds(direct):.1f} ms to a request of one client")
        load = Load(url)
        one = load.during(2)
        assert min(one[server.server_port] for server in (first, second, third)) > 0.2 * sum(one.values())

        assert load.moves == 0, "a connection stays with its replica"

        for status in (500, 503, 507):
            first.status = status
            count = first.asked
            time.sleep(1)
            assert first.asked > count, "a replica that refuses one request gets the next"
        first.status = 200

        third.running.clear()  # frozen: it accepts connections and answers nothing
        time.sleep(6)
        count = third.asked
        assert sum(load.during(1).values()) > 50, "the others answer"
        assert third.asked == count
        third.running.set()
        eventually(lambda: load.during(0.5)[third.server_port], 20)

        first.socket.close()  # killed: connections are refused
        assert load.during(1) and not load.during(3)[first.server_port]
        load.stop()
        print(f"\n{sum(load.statuses.values())} requests, the slowest {load.slowest:.1f} s")
        assert set(load.statuses) == {200}, load.statuses


@pytest.mark.containers
@pytest.mark.timeout(600)
def test_what_every_replica_refuses_is_passed_on(host):
    with replicas(2, host) as servers, nginx(servers, host) as url, httpx.Client(trust_env=False) as client:
        eventually(lambda: client.post(url + PATH, content=b"x").status_code == 200, 30)
        for status, requests in ((415, 1), (413, 1), (404, 1), (400, 1), (503, 2), (500, 2), (507, 2)):
            for server in servers:
                server.status, server.asked = status, 0
            answer = client.post(url + PATH, content=b"x" * 900_000)
            assert (answer.status_code, answer.json()["status"]) == (status, status)
            assert sum(server.asked for server in servers) == requests
        for server in servers:
            server.socket.close()
        answer = client.post(url + PATH, content=b"x")
        assert (answer.status_code, answer.json()["type"]) == (503, "ServiceUnavailableException")
