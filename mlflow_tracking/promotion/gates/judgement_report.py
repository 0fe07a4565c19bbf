"""A judgement for readers: report.json for programs, report.html for people; MLflow keeps both with the version."""

import json
from html import escape
from pathlib import Path
from typing import Any

from mlflow_tracking.promotion.gates.judge import Judgement
from mlflow_tracking.settings import MODEL_NAME

REPORT = "gates"  # where they lie among a version's artifacts
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1d2433 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid #d9dde5 }
code { font-size: 85%; overflow-wrap: anywhere }
.passed { color: #176639 } .failed, .refused { color: #a11d2f } .forced, .not { color: #8a5a00 }
"""


def write_report(folder: Path, judgement: Judgement) -> None:
    """Write report.json and report.html into a folder."""
    (folder / "report.json").write_text(json.dumps(judgement.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(html(judgement), encoding="utf-8")


def write_replay(folder: Path, champion: str, challenger: str, tables: dict[str, dict[str, Any]]) -> None:
    """Write the report of a replay: `tables` of promotion.replay.compare by the pictures' name."""
    values = {"champion_version": champion, "version": challenger, "tables": tables}
    (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    title = f"{MODEL_NAME}: version {challenger} against version {champion}"
    parts = (f"<h2>{escape(name)}</h2>{_comparison(table)}" for name, table in tables.items())
    page = f"{_head(title)}<h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    (folder / "report.html").write_text(page, encoding="utf-8")


def tags(judgement: Judgement) -> dict[str, str]:
    """The same for the version's tags: the outcome, and each verdict in a sentence."""
    told = {
        "gates.judgement": judgement.id,
        "gates.outcome": judgement.word,
        "gates.evaluation_set": judgement.question.evaluation_set or "none",
        "gates.forced": "{by}: {reason}".format(**judgement.forced) if judgement.forced else "",
    }
    for verdict in judgement.verdicts:
        told[f"gates.{verdict.gate.replace(' ', '_')}"] = f"{verdict.outcome}: {verdict.reason}"[:1000]
    return told


def html(judgement: Judgement) -> str:
    """A page that needs nothing from elsewhere."""
    question = judgement.question
    rows = "".join(
        f'<tr><td>{escape(one.gate)}</td><td class="{one.outcome.split()[0]}">{escape(one.outcome)}'
        f"{' (blocks)' if one.blocks else ''}</td><td>{escape(one.reason)}</td><td>{_figures(one.figures)}</td></tr>"
        for one in judgement.verdicts
    )
    title = f"{MODEL_NAME} version {judgement.version}: {judgement.word}"
    forced = judgement.forced
    overruled = f"<p>Overruled by {escape(forced['by'])}: {escape(forced['reason'])}</p>" if forced else ""
    asked = "".join(
        f"<tr><th>{name}</th><td><code>{escape(value or 'none')}</code></td></tr>"
        for name, value in (
            ("bundle", question.bundle),
            ("evaluation set", question.evaluation_set),
            ("gates' settings", question.settings),
            ("champion", question.champion),
        )
    )
    against = judgement.comparison
    compared = (
        f"<h2>Against version {escape(against['champion_version'])}</h2>{_comparison(against)}" if against else ""
    )
    return (
        f'{_head(title)}<h1>{MODEL_NAME} version {escape(judgement.version)}: <span class="{judgement.word}">'
        f"{judgement.word}</span></h1>{overruled}<p>Judged {escape(judgement.at)}, in {judgement.seconds:g} s.</p>"
        f"<table><tr><th>gate</th><th>verdict</th><th>reason</th><th>figures</th></tr>{rows}</table>"
        f"{compared}<h2>What was asked</h2><table>{asked}</table></html>\n"
    )


def _head(title: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        "<p>Research use only.</p>"
    )


def _comparison(table: dict[str, Any]) -> str:
    champion, challenger = table["champion"], table["challenger"]
    flips = "".join(
        f"<tr><td><code>{escape(str(flip['image']))}</code></td><td>{flip['champion']}</td><td>{flip['challenger']}</td>"
        f"<td>{flip.get('truth', '')}</td></tr>"
        for flip in table["flips"]
    )
    refused = "".join(
        f"<li><code>{escape(name)}</code> was left out: {escape(reason)}</li>"
        for name, reason in table.get("refused", {}).items()
    )
    named = f"<table><tr><th>picture</th><th>champion</th><th>this version</th><th>truth</th></tr>{flips}</table>"
    return (
        f"<p>{table['agreement']:.1%} of the answers to {table['images']} pictures agree; {table['into_malignant']} "
        f"turn malignant, {table['out_of_malignant']} turn benign. Of the champion's answers 95 % took "
        f"{champion['p95_milliseconds']:.0f} ms or less, of this version's "
        f"{challenger['p95_milliseconds']:.0f} ms, each asked by itself.</p>{named if flips else ''}"
        f"{f'<ul>{refused}</ul>' if refused else ''}"
    )


def _figures(figures: dict[str, Any]) -> str:
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return escape(", ".join(shown))
