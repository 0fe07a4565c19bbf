"""TorchServe under load: killed workers, version swaps, floods and long runs.

- A killed worker comes back, and a client that retries on 500, 503 and 507 loses nothing.
- Versions are swapped under load without a failed request, and no client gets the older version afterwards.
- Requests beyond the queue get 503 at once; the accepted ones wait no longer than the queue is deep.
- Idle and slow connections block no other client.
- Thousands of requests leave the memory unchanged.

`make test` runs a short case of each; `make test-load` runs the full ones and prints the figures of docs/lab-notes.md.
All traffic is on loopback.
"""

import http.client
import os
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import psutil
import pytest

from tests.hostile import photograph
from tests.hostile.requests import form, part
from tests.live import Promotion
from tests.serving import Call, Serving, send
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_registry", "tests.fixtures_serving"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]
TRY_AGAIN = {500, 503, 507}
PATIENCE = 60.0  # seconds that a client goes on trying; a worker is back in under 30
QUEUE = 100  # job_queue_size in torchserve/config.properties


@dataclass
class Clients:
    """Clients that ask without a pause, each for itself, and try again as README.md tells them to."""

    port: int
    call: Call
    number: int
    served: list[list[str]] = field(default_factory=list)  # each client's versions, in order
    lost: list[str] = field(default_factory=list)
    again: int = 0

    @contextmanager
    def asking(self, retry: bool) -> Iterator["Clients"]:
        """They ask while the block runs."""
        done = threading.Event()
        self.served = [[] for _ in range(self.number)]

        def ask(versions: list[str]) -> None:
            while not done.is_set():
                self._one(versions, PATIENCE if retry else 0)

        with ThreadPoolExecutor(self.number) as pool:
            tasks = [pool.submit(ask, versions) for versions in self.served]
            try:
                yield self
            finally:
                done.set()
        for task in tasks:
            task.result()

    def _one(self, versions: list[str], patience: float) -> None:
        end = time.monotonic() + patience
        while True:
            try:
                answer = send(self.port, self.call.wire)
                if answer.status == 200:
                    versions.append(answer.json["model"]["version"])
                    return
                fault = f"{answer.status}: {answer.body[:200]!r}"
                again = answer.status in TRY_AGAIN
            except (OSError, http.client.HTTPException) as error:
                fault, again = repr(error), False
            if not again or time.monotonic() > end:
                self.lost.append(fault)
                return
            self.again += 1
            time.sleep(0.2)

    @property
    def answered(self) -> int:
        return sum(map(len, self.served))


@pytest.mark.parametrize("deaths", [1, pytest.param(5, marks=[pytest.mark.load])])
def test_a_killed_worker_loses_no_request(serving: Serving, deaths: int):
    recoveries = []
    before = serving.ask(serving.good).json
    with Clients(serving.port, serving.good, 6).asking(retry=True) as clients:
        for _ in range(deaths):
            time.sleep(1)
            serving.worker().kill()
            killed = time.monotonic()
            # As TorchServe restarts it after one second, then two, then three …
            eventually(lambda: serving.ask(serving.good).status == 200, PATIENCE, serving.server.text)
            recoveries.append(time.monotonic() - killed)
    print(f"\n{deaths} deaths of the worker under 6 clients: {clients.answered} answered, {len(clients.lost)} lost, "
          f"{clients.again} tries again; back after {max(recoveries):.1f} s at most")  # fmt: skip
    assert clients.lost == []
    assert clients.answered > 0
    assert max(recoveries) < 30
    assert serving.ask(serving.good).json == before


@pytest.fixture(scope="module")
def swapping(registry, first_registration, full_bundle, short_folder) -> Iterator[Promotion]:
    """A TorchServe of its own with a registry, where version 1 serves."""
    with Promotion.started(short_folder / "s", registry, full_bundle) as promotion:
        assert promotion.champion("1")[1].settled
        yield promotion


@pytest.mark.load  # two swaps: tests/test_promotion.py
def test_swaps_fail_no_request_and_never_go_back(swapping: Promotion, tmp_path):
    first = swapping.served()
    versions = [swapping.register(tmp_path) for _ in range(10)]
    port = int(swapping.server.env["TORCHSERVE_PORT"])
    with Clients(port, Call(photograph(0)), 4).asking(retry=False) as clients:
        for version in versions:
            steps, _ = swapping.champion(version)
            assert f"serve version {version}" in steps
        time.sleep(1)  # what comes after the last swap counts too
    print(f"\n{len(versions)} swaps under 4 clients: {clients.answered} answered, {len(clients.lost)} lost")
    assert clients.lost == []
    for served in clients.served:
        assert [int(version) for version in served] == sorted(int(version) for version in served)
        assert {first, *versions} >= set(served)
        assert served[-1] == versions[-1]


@pytest.mark.parametrize("factor", [2, pytest.param(8, marks=[pytest.mark.load])])
def test_what_the_queue_cannot_hold_is_refused_and_the_rest_is_answered_in_time(serving: Serving, factor: int):
    """The worker stands still until the queue is full, so that this does not depend on how fast anything is."""
    alone = min(serving.ask(serving.good).seconds for _ in range(10))
    worker, number = serving.worker(), factor * QUEUE
    with ThreadPoolExecutor(number) as pool:
        worker.send_signal(signal.SIGSTOP)
        try:
            tasks = [pool.submit(serving.ask, serving.good) for _ in range(number)]
            eventually(lambda: sum(task.done() for task in tasks) >= number - QUEUE - 20, 30)
        finally:
            worker.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        answers = [task.result() for task in tasks]
        drained = time.monotonic() - resumed
    counts = Counter(answer.status for answer in answers)
    refused = statistics.median(answer.seconds for answer in answers if answer.status == 503)
    print(f"\n{number} requests at once: {dict(counts)}; refused after {refused:.2f} s in the median, "
          f"the last accepted one {drained:.1f} s after the worker went on (one alone: {alone:.3f} s)")  # fmt: skip
    assert set(counts) == {200, 503}
    assert {answer.shape for answer in answers} == {"prediction", "torchserve"}
    assert refused < 10, "at once, with as many threads as requests on this machine"
    assert QUEUE <= counts[200] <= QUEUE + 20, "what the queue holds, and the batch inside the worker"
    # Each of those accepted waits for at most the queue before it, had each of them a call of its own.
    assert drained < 5 + 2 * (QUEUE + 20) * alone
    assert serving.worker() == worker


def largest() -> Call:
    """A picture of 19 MB, close to the limit: a small one with zeros behind it."""
    return Call(photograph(0) + bytes(19_000_000))


def test_a_batch_of_the_largest_pictures_is_answered(serving: Serving):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(serving.ask, [largest()] * 8))
    print(
        f"\n8 uploads of 19 MB at once: the last one answered after {max(answer.seconds for answer in answers):.1f} s"
    )
    assert {answer.status for answer in answers} == {200}


@pytest.mark.load
def test_more_of_them_than_java_can_hold_are_survived(serving: Serving):
    """What does not fit is refused with 507 or not answered, and TorchServe comes back by itself."""
    counts: Counter[str] = Counter()

    def ask(call: Call) -> str:
        try:
            return str(serving.ask(call).status)
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__

    with ThreadPoolExecutor(40) as pool:
        counts.update(pool.map(ask, [largest()] * 40))
    began = time.monotonic()
    eventually(lambda: ask(serving.good) == "200", 200, serving.server.text)
    print(f"\n40 uploads of 19 MB at once: {dict(counts)}; {time.monotonic() - began:.0f} s later it serves again")
    assert set(counts) <= {"200", "500", "503", "507", "TimeoutError", "ConnectionResetError", "RemoteDisconnected"}


@pytest.mark.parametrize("idle", [50, pytest.param(200, marks=[pytest.mark.load])])
def test_idle_and_slow_connections_stop_nobody(serving: Serving, idle: int):
    """Without the proxy, which only the containers have; tests/test_compose.py asks the same of that."""
    with ExitStack() as connections:
        for number in range(idle):
            one = connections.enter_context(socket.create_connection(("127.0.0.1", serving.port)))
            if number % 2:  # half a request, then silence
                one.sendall(b"POST /predictions/skin_vit HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nhalf")
        answers = [serving.ask(serving.good) for _ in range(20)]
    slowest = max(answer.seconds for answer in answers)
    print(f"\nbeside {idle} idle connections: 20 of 20 answered, {slowest:.2f} s at most")
    assert {answer.status for answer in answers} == {200}
    assert slowest < 10, "an answer takes a tenth of a second"


def resident(serving: Serving) -> tuple[float, float]:
    """Megabytes of the worker and of Java."""
    java = psutil.Process(serving.server.process.pid).memory_info().rss
    return serving.resident() / 2**20, java / 2**20


@pytest.mark.parametrize(
    ("requests", "warm_up", "growth"), [(150, 50, 1.2), pytest.param(5000, 1000, 1.05, marks=[pytest.mark.load])]
)
def test_a_long_run_leaves_the_memory_as_it_was(serving: Serving, requests: int, warm_up: int, growth: float):
    """Pictures of eight kinds from four clients, with and without heatmaps and mirror images."""
    calls = [Call(photograph(number)) for number in range(8)]
    calls += [Call(call.body, path="/explanations/skin_vit") for call in calls[:2]]
    calls += [form(part("data", calls[0].body), part(*option)) for option in (("tta", b"true"), ("gradcam", b"none"))]
    ports = [serving.port] * len(calls)
    with ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> None:
            statuses = pool.map(lambda n: send(ports[n % len(calls)], calls[n % len(calls)].wire).status, range(number))
            assert set(statuses) == {200}

        ask(warm_up)
        before, worker, began = resident(serving), serving.worker(), time.monotonic()
        ask(requests)
    after, seconds = resident(serving), time.monotonic() - began
    print(f"\n{requests} requests in {seconds:.0f} s on {os.cpu_count()} cores: worker "
          f"{before[0]:.0f} → {after[0]:.0f} MB, Java {before[1]:.0f} → {after[1]:.0f} MB")  # fmt: skip
    assert serving.worker() == worker
    assert after[0] < growth * before[0], "it is still taking what it needs after a short warm-up"
    assert after[1] < max(1.2, growth) * before[1] + 100, "Java takes what its heap may have, in steps"
