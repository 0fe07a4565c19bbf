"""Reports of a judgement and of a replay: report.json for programs, report.html for people. MLflow stores both."""

from html import escape
from pathlib import Path
from typing import Any

from handlers.files import write_json
from mlflow_tracking.promotion.gates.judge import Judgement
from mlflow_tracking.stack_settings import MODEL_NAME

REPORT = "gates"  # the folder among a version's artifacts
MAX_TAG = 1000  # characters; MLflow takes at most 5000
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1d2433 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid #d9dde5 }
code { font-size: 85%; overflow-wrap: anywhere }
.passed { color: #176639 } .failed, .refused { color: #a11d2f } .forced, .not { color: #8a5a00 }
"""


def write_report(folder: Path, judgement: Judgement) -> None:
    """Write report.json and report.html of a judgement into a folder."""
    write_json(folder / "report.json", judgement.to_dict())
    (folder / "report.html").write_text(html(judgement), encoding="utf-8")


def write_replay(folder: Path, champion: str, challenger: str, tables: dict[str, dict[str, Any]]) -> None:
    """Write the report of a replay: tables of promotion.champion_comparison.compare by the name of their pictures."""
    write_json(folder / "report.json", {"champion_version": champion, "version": challenger, "tables": tables})
    title = f"{MODEL_NAME}: version {challenger} against version {champion}"
    parts = (f"<h2>{escape(name)}</h2>{_comparison(table)}" for name, table in tables.items())
    page = f"{_head(title)}<h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    (folder / "report.html").write_text(page, encoding="utf-8")


def tags(judgement: Judgement) -> dict[str, str]:
    """Return the version's tags: the outcome, and each verdict with its reason."""
    forced = judgement.forced
    values = {
        "gates.judgement": judgement.id,
        "gates.outcome": judgement.outcome,
        "gates.evaluation_set": judgement.question.evaluation_set or "none",
        "gates.forced": f"{forced['by']}: {forced['reason']}" if forced else "",
    }
    for verdict in judgement.verdicts:
        values[f"gates.{verdict.gate.replace(' ', '_')}"] = f"{verdict.outcome}: {verdict.reason}"[:MAX_TAG]
    return values


def html(judgement: Judgement) -> str:
    """Return a page without external files."""
    forced, comparison = judgement.forced, judgement.comparison
    title = f"{MODEL_NAME} version {judgement.version}: {judgement.outcome}"
    verdicts = "".join(
        f'<tr><td>{escape(verdict.gate)}</td><td class="{verdict.outcome.split()[0]}">{escape(verdict.outcome)}'
        f"{' (blocks)' if verdict.blocks else ''}</td><td>{escape(verdict.reason)}</td>"
        f"<td>{_figures(verdict.figures)}</td></tr>"
        for verdict in judgement.verdicts
    )
    page = [_head(title), f'<h1 class="{judgement.outcome}">{escape(title)}</h1>']
    if forced:
        page.append(f"<p>Overruled by {escape(forced['by'])}: {escape(forced['reason'])}</p>")
    page += [
        f"<p>Judged at {escape(judgement.at)} in {judgement.seconds:g} s.</p>",
        f"<table><tr><th>gate</th><th>verdict</th><th>reason</th><th>figures</th></tr>{verdicts}</table>",
    ]
    if comparison:
        page.append(f"<h2>Against version {escape(comparison['champion_version'])}</h2>{_comparison(comparison)}")
    page.append("</html>\n")
    return "".join(page)


def _head(title: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        "<p>Research use only.</p>"
    )


def _comparison(table: dict[str, Any]) -> str:
    champion, challenger = table["champion"], table["challenger"]
    page = (
        f"<p>{table['agreement']:.1%} of the answers to {table['images']} pictures agree. {table['into_malignant']} "
        f"turn malignant, {table['out_of_malignant']} turn benign. The 95th percentile of latency is "
        f"{champion['p95_milliseconds']:.0f} ms for the champion and {challenger['p95_milliseconds']:.0f} ms for this "
        "version, measured separately.</p>"
    )
    if table["flips"]:
        rows = "".join(
            f"<tr><td><code>{escape(str(flip['image']))}</code></td><td>{flip['champion']}</td>"
            f"<td>{flip['challenger']}</td><td>{flip.get('truth', '')}</td></tr>"
            for flip in table["flips"]
        )
        page += f"<table><tr><th>picture</th><th>champion</th><th>this version</th><th>truth</th></tr>{rows}</table>"
    if refused := table.get("refused"):
        rows = "".join(
            f"<li><code>{escape(name)}</code> was left out: {escape(reason)}</li>" for name, reason in refused.items()
        )
        page += f"<ul>{rows}</ul>"
    return page


def _figures(figures: dict[str, Any]) -> str:
    texts = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return escape(", ".join(texts))
