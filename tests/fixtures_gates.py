"""A good candidate for the gates, its bundle and its evaluation set.

Test modules ask for these by `pytest_plugins`; tests/gates_world.py holds what they import.
"""

import hashlib

import pandas as pd
import pytest

from handlers.bundle import Bundle
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.evaluation_set import COLUMNS, EvaluationSet, freeze
from mlflow_tracking.promotion.gates.base import Candidate
from mlflow_tracking.promotion.gates.judge import load_gates
from mlflow_tracking.promotion.plan import Release
from tests.gates_world import CHAMPION, COUNTS, SETTINGS, SIGNATURE, Case, Server, patch, receipt
from tests.models import tiny_bundle


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> EvaluationSet:
    folder = tmp_path_factory.mktemp("set")
    rows = []
    for code, count in COUNTS.items():
        for number in range(count):
            path = folder / f"{code}{number}.png"
            path.write_bytes(image := patch(code, number))
            digest = hashlib.sha256(image).hexdigest()
            told = (float(number + 20) if number % 2 else None, "female", "palms/soles" if number % 3 else "knee")
            rows.append((str(path), path.stem, code, f"{code}-{number // 2}", "drawn", digest, digest[:16], *told))
    return freeze(pd.DataFrame(rows, columns=["path", *COLUMNS[1:]]), folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle", receipt=receipt("f" * 64))


@pytest.fixture
def case(bundle, evaluation, tmp_path) -> Case:
    digests = {"1": CHAMPION.digest, "2": bundle.digest}
    originals = frozenset(bytes.fromhex(digest) for digest in evaluation.frame["sha256"])
    server = Server(bundle, {"1": {}, "2": {}}, originals=originals, digests=digests)
    candidate = Candidate(
        Release("2", bundle.digest),
        bundle,
        server,
        AnswerBook(tmp_path / "judgements"),
        registered_digest=bundle.digest,
        signature=SIGNATURE,
        champion=CHAMPION,
        evaluation=evaluation,
    )
    gates = {gate.name: gate for gate in load_gates(SETTINGS)}
    # Seconds each: the checkpoint has a test of its own.
    gates["golden parity"] = gates["golden parity"].model_copy(update={"checkpoint": False})
    gates["latency"] = gates["latency"].model_copy(update={"requests": 5})
    return Case(candidate, server, gates, tmp_path)
