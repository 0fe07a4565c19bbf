"""What promote.py and register_model.py are told: options that mean nothing, or not what was meant, are refused before
anything is touched. The tables of promote.py and lineage.py are whole in 80 columns."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlflow_tracking.promotion.plan import Actual, Loaded, Release
from mlflow_tracking.provenance import Lineage
from mlflow_tracking.registry import ALIASES, RegisteredVersion
from scripts import lineage, promote, register_model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--alias", "chalenger", "--version", "2"), "champion or challenger"),
        (("--alias", "challenger"), "say with --version"),
        (("--alias", "champion"), "say with --version"),
        (("--reason", "urgent"), "--reason"),
        (("--status", "--reason", "urgent"), "--reason"),
        (("--status", "--alias", "challenger"), "say with --version"),
        (("--rollback", "--alias", "challenger"), "leave --version and its options out"),
        (("--force", "--reason", "urgent"), "say with --version"),
        (("--version", "2", "--force"), "needs --reason"),
    ],
)
def test_options_that_mean_nothing_are_refused(monkeypatch, options, words):
    def nothing():
        raise AssertionError("it was begun")

    monkeypatch.setattr(promote.Settings, "load", nothing)
    done = CliRunner().invoke(promote.app, options, env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.exception
    assert words in done.output


def test_an_alias_that_nobody_reads_is_not_registered(monkeypatch, tmp_path):
    def nothing():
        raise AssertionError("it was begun")

    monkeypatch.setattr(register_model.Settings, "load", nothing)
    options = ("--bundle", str(tmp_path), "--alias", "champoin")
    done = CliRunner().invoke(register_model.app, options, env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.exception
    assert "champion or challenger" in done.output


@pytest.fixture
def printed(monkeypatch) -> io.StringIO:
    """What the two commands print on a terminal of 80 columns."""
    text = io.StringIO()
    for command in (lineage, promote):
        monkeypatch.setattr(command, "console", Console(file=text, width=80, highlight=False, soft_wrap=True))
    return text


def test_the_status_is_whole_in_80_columns(printed):
    digest = "sha256:0123456789abcdef" + "0" * 48
    tags = {"serving.status": "rolled back", "serving.since": "2026-11-22T03:41:07Z", "balanced_accuracy": "0.6311"}
    versions = [RegisteredVersion("104", digest, ALIASES, tags), RegisteredVersion("103", digest, (), tags)]
    actual = Actual({"104": Loaded(Release("104", digest), False), "103": Loaded(Release("103", digest), True)}, "103")
    promote.show_status(
        SimpleNamespace(
            registry=SimpleNamespace(uri="http://mlflow:5001", versions=lambda: versions),
            executor=SimpleNamespace(observe=lambda: actual),
        )
    )
    lines = [line.split() for line in printed.getvalue().splitlines()]
    ends = ["rolled", "back", "11-22", "03:41", "0.6311", "0123456789ab"]
    assert ["104", "no", "worker", *ends, "champion"] in lines
    assert ["challenger"] in lines
    assert ["103", "answers", *ends] in lines
    assert "skin_vit in http://mlflow:5001" in printed.getvalue(), "whose versions these are"
    assert "test split" in printed.getvalue(), "what the balanced accuracy is of"


def test_the_audit_log_is_whole_in_80_columns(printed):
    row = {
        "at": "2026-11-22T03:41:07.123Z",
        "event": "serve refused",
        "version": "104",
        "by": "kim@host with promote.py",
    }
    reason = "leakage, balanced accuracy, calibration, unknown detection: not evaluated, no set"
    lineage.show(Lineage("104", "sha256:0", audit=[row | {"remark": reason}]))
    [line] = [line for line in printed.getvalue().splitlines() if line.startswith("2026")]
    assert line.startswith("2026-11-22 03:41  serve refused  104 ")
    words = printed.getvalue().split()
    assert set(reason.split()) | set(row["by"].split()) <= set(words)
