"""Stand-ins for MLflow and TorchServe that fail on demand, around a real store and ledger."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from handlers.bundle import GOLDEN, RECEIPT, WEIGHTS, BundleConfig, GoldenCase, seal
from handlers.calibration import Calibration
from handlers.preprocessing import Preprocessing
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.execute import Executor
from mlflow_tracking.promotion.gates.base import Gate
from mlflow_tracking.promotion.gates.identity import GoldenParityGate
from mlflow_tracking.promotion.ledger import Ledger
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.promotion.reconcile import Event, Pass, Reconciler
from mlflow_tracking.registry import RegisteredVersion, RegistryError, RegistryUnavailable
from mlflow_tracking.torchserve_client import ServedVersion, TorchServeError, TorchServeUnavailable


class Killed(BaseException):
    """The promoter dies here."""


@dataclass
class Doors:
    """Counts calls to the servers; at number `kill_at` the promoter dies, before the call or after its effect."""

    kill_at: float = float("inf")
    after: bool = False
    calls: int = 0

    def call(self, effect):
        self.calls += 1
        if self.calls == self.kill_at and not self.after:
            raise Killed
        result = effect()
        if self.calls == self.kill_at:
            raise Killed
        return result


@dataclass
class FakeRegistry:
    doors: Doors
    bundles: dict[str, Path] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    up: bool = True
    fetched: list[str] = field(default_factory=list)
    reports: list[tuple[str, set[str]]] = field(default_factory=list)
    report_files: dict[str, bytes] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def _say(self, effect):
        if not self.up:
            raise RegistryUnavailable("MLflow is away.")
        return self.doors.call(effect)

    def resolve(self, alias):
        return self._say(lambda: self._version(self.aliases[alias]) if alias in self.aliases else None)

    def version(self, number):
        return self._say(lambda: self._version(number))

    def _version(self, number):
        tags = dict(self.tags[number])
        return RegisteredVersion(number, tags.get("digest"), tags=tags)

    def tag(self, number, tags):
        self._say(lambda: self.tags[number].update(tags))

    def evaluation_set(self):
        return self._say(lambda: None)

    def signature(self, number):
        return self._say(lambda: None)

    def log_report(self, number, folder, name):
        def effect():
            self.reports.append((number, {path.name for path in folder.iterdir()}))
            self.report_files[number] = (folder / "report.json").read_bytes()

        self._say(effect)

    def download_version(self, number, path, folder):
        def effect():
            if number not in self.report_files:
                raise RegistryError("There is no report.")
            (folder / "report.json").write_bytes(self.report_files[number])
            return folder / "report.json"

        return self._say(effect)

    def model_tags(self):
        return self._say(lambda: dict(self.notes))

    def set_model_tag(self, name, value):
        self._say(lambda: self.notes.update({name: value}))

    def download_bundle(self, number, folder):
        self.fetched.append(number)
        return self._say(lambda: Path(shutil.copytree(self.bundles[number], folder / "bundle")))


@dataclass
class FakeTorchServe:
    """TorchServe with its rules, which the live tests confirm."""

    doors: Doors
    store: Path
    loaded: dict[str, str] = field(default_factory=dict)
    default_version: str | None = None
    up: bool = True
    broken: set[str] = field(default_factory=set)  # versions whose workers do not start
    shift: dict[str, float] = field(default_factory=dict)  # versions that answer wrongly
    resting: set[str] = field(default_factory=set)  # versions whose worker has just died, until it is waited for
    precision: str = "f32"

    def _say(self, effect):
        if not self.up:
            raise TorchServeUnavailable("TorchServe is away.")
        return self.doors.call(effect)

    def versions(self):
        return self._say(
            lambda: {v: ServedVersion(v, a, int(v not in self.resting), 1) for v, a in self.loaded.items()}
        )

    def default(self):
        return self._say(lambda: self.default_version)

    def register(self, archive, workers):
        def effect():
            version = archive.split("-")[1]
            assert (self.store / archive).exists()
            if version in self.loaded:
                raise TorchServeError(409, "registered already")
            self.loaded[version] = archive
            self.default_version = self.default_version or version

        self._say(effect)

    def wait_ready(self, version, timeout, progress=None):
        if version not in self.broken:
            self.resting.discard(version)
        return self._say(lambda: version in self.loaded and version not in self.broken)

    def set_default(self, version):
        def effect():
            assert version in self.loaded
            self.default_version = version

        self._say(effect)

    def drain(self, version):
        assert version != self.default_version or len(self.loaded) == 1

    def unregister(self, version):
        def effect():
            if version == self.default_version and len(self.loaded) > 1:
                raise TorchServeError(403, "Cannot remove default version")
            self.loaded.pop(version, None)
            self.default_version = self.default_version if self.loaded else None

        self._say(effect)

    def predict(self, image, version, metadata=None, recorded=True):
        def effect():
            bundle = json.loads(image)
            shift = self.shift.get(version, 0.0)
            return {
                "model": {"version": version, "digest": bundle["digest"], "precision": self.precision},
                "probabilities": {"MEL": 0.5 + shift, "NV": 0.5 - shift},
            }

        return self._say(effect)


@dataclass
class World:
    folder: Path
    doors: Doors = field(default_factory=Doors)
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = FakeRegistry(self.doors)
        self.torchserve = FakeTorchServe(self.doors, self.folder / "store")
        self.torchserve.store.mkdir(parents=True)
        for version in "123":
            self.add(version)

    def add(self, version: str) -> None:
        folder = self.folder / f"bundle{version}"
        (folder / "golden").mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(version.encode())
        (folder / GOLDEN).write_text("[]")
        (folder / RECEIPT).write_text("{}")
        config = BundleConfig("skin_vit", "vit", {}, KNOWN_CODES, Preprocessing(64), Calibration(), {"v": version})
        self.registry.bundles[version] = folder
        self.registry.tags[version] = {"digest": seal(folder, config).digest}

    def promoter(self, gates: Sequence[Gate] | None = None, key: bytes = b"", **options: Any) -> Reconciler:
        """A new promoter, without any memory."""
        gates = (Golden(),) if gates is None else gates
        executor = Executor(self.torchserve.store, self.registry, self.torchserve, gates, self.folder / "cache", key)

        def listener(event: Event) -> None:
            if event.state not in ("begun", "running"):
                self.events.append(f"{event.step} {event.state}")

        return Reconciler(self.registry, executor, 3, listener, **options)

    def release(self, version: str) -> Release:
        return Release(version, self.registry.tags[version]["digest"])

    @property
    def ledger(self) -> Ledger:
        return ledgers.read(self.torchserve.store)

    def deploy(self, version: str, promoter: Reconciler | None = None) -> Pass:
        """Make a version champion and run one pass, of a new promoter by default."""
        self.registry.aliases["champion"] = version
        return (promoter or self.promoter()).reconcile()

    def serve(self, *versions: str) -> "World":
        """Deploy versions one after the other, each until nothing is left to do."""
        for version in versions:
            self.deploy(version)
            assert self.served == version
            assert self.promoter().reconcile().settled
        self.events.clear()
        return self

    def copy(self, folder: Path) -> "World":
        """Return an independent world in the same state."""
        twin = copy.deepcopy(self)
        twin.folder = folder
        twin.torchserve.store = Path(shutil.copytree(self.torchserve.store, folder / "store"))
        return twin

    @property
    def served(self) -> str | None:
        """The version that answers."""
        return self.torchserve.default_version

    def status(self, version: str) -> str | None:
        return self.registry.tags[version].get("serving.status")


class Golden(GoldenParityGate):
    """Golden parity with a picture that names the bundle which the stand-in plays; there is no checkpoint."""

    checkpoint: bool = False

    def evaluate(self, candidate):
        image = json.dumps({"digest": candidate.release.digest}).encode()
        case = GoldenCase("golden/MEL.jpg", image, {"MEL": 0.5, "NV": 0.5}, [], [])
        bundle = type("Golden", (), {"golden": lambda self: [case]})()
        return super().evaluate(replace(candidate, bundle=bundle))


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")
