"""Fixtures of the gates' tests, requested with `pytest_plugins`: a good candidate and its evaluation set."""

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


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory) -> EvaluationSet:
    folder = tmp_path_factory.mktemp("set")
    rows = []
    for code, count in COUNTS.items():
        for number in range(count):
            path = folder / f"{code}{number}.png"
            path.write_bytes(image := patch(code, number))
            digest = hashlib.sha256(image).hexdigest()
            metadata = (float(number + 20) if number % 2 else None, "female", "palms/soles" if number % 3 else "knee")
            rows.append(
                (str(path), path.stem, code, f"{code}-{number // 2}", "drawn", digest, digest[:16], *metadata, "")
            )
    return freeze(pd.DataFrame(rows, columns=["path", *COLUMNS[1:]]), folder)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle", receipt=receipt("f" * 64))


@pytest.fixture
def case(bundle, evaluation, tmp_path) -> Case:
    originals = frozenset(bytes.fromhex(digest) for digest in evaluation.frame["sha256"])
    digests = {"1": CHAMPION.digest, "2": bundle.digest}
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
    case = Case(candidate, server, {gate.name: gate for gate in load_gates(SETTINGS)}, tmp_path)
    case.limit("golden parity", checkpoint=False)  # takes seconds and has a test of its own
    case.limit("latency", requests=5)
    return case
