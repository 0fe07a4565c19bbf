"""promote.py's options: what means nothing, or not what was meant, is refused before anything is touched."""

import pytest
from typer.testing import CliRunner

from scripts import promote


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
