"""What promote.py and register_model.py are told: options that mean nothing, or not what was meant, are refused before
anything is touched."""

import pytest
from typer.testing import CliRunner

from scripts import promote, register_model


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
