"""The command lines of promote.py and register_model.py, and the tables of promote.py and lineage.py.

- options that contradict each other, or name an alias that the promoter does not read, are refused before anything is
  touched; every example in a help text can be parsed;
- the tables fit into 80 columns without a cut.
"""

import io
import shlex

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from handlers.errors import UserError
from mlflow_tracking.promotion.plan import Actual, Loaded, Release
from mlflow_tracking.provenance import Lineage
from mlflow_tracking.registry import ALIASES, RegisteredVersion
from scripts import lineage, promote, register_model


@pytest.fixture
def nothing_begins(monkeypatch):
    def load():
        raise AssertionError("the command began")

    for command in (promote, register_model):
        monkeypatch.setattr(command.Settings, "load", load)


def outcome(app, options) -> tuple[int, str]:
    """The exit code and the message of a command line, as `command_line.run` gives them."""
    done = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    if isinstance(done.exception, UserError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("to",), "VERSION"),
        (("to", "2", "--alias", "chalenger"), "choose one of champion, challenger"),
        (("to", "2", "--force"), "--force needs --reason"),
        (("status", "--reason", "urgent"), "No such option"),
        (("rollback", "--alias", "challenger"), "No such option"),
        (("rollback", "2"), "unexpected extra argument"),
        (("--version", "2"), "No such option"),
    ],
)
def test_options_without_meaning_are_refused(nothing_begins, options, words):
    code, message = outcome(promote.app, options)
    assert code == 2
    assert words in message


@pytest.mark.parametrize("example", promote.EXAMPLES)
def test_the_examples_can_be_parsed(nothing_begins, example):
    python, program, *options = shlex.split(example, comments=True)
    assert (python, program) == ("python", "scripts/promote.py")
    assert str(CliRunner().invoke(promote.app, options).exception) == "the command began"


def test_a_misspelt_alias_is_not_registered(nothing_begins, tmp_path):
    app = typer.Typer()
    app.command()(register_model.register_model)
    code, message = outcome(app, ("--bundle", str(tmp_path), "--alias", "champoin"))
    assert (code, message) == (2, "--alias is 'champoin': choose one of champion, challenger.")


def test_register_model_needs_one_source(nothing_begins):
    app = typer.Typer()
    app.command()(register_model.register_model)
    for options in ((), ("--run-id", "a", "--bundle", "b")):
        assert outcome(app, options) == (2, "Give either --run-id or --bundle.")


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
    rows = promote.status_rows(versions, actual)
    promote.print_status(rows, "http://mlflow:5001")
    assert [(row["version"], row["digest"], row["aliases"]) for row in rows] == [
        ("104", digest, list(ALIASES)),
        ("103", digest, []),
    ]
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
