"""The report of one reading or of many: one HTML file that needs nothing else and prints well.

Text from an answer, a file name or the reader is escaped here or in `html_blocks`. The file's own policy forbids
scripts and requests in case a block should ever fail to escape.
"""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from streamlit_app import charts, heatmap, html_blocks, pictures, wording
from streamlit_app.answer_schema import Answer
from streamlit_app.readings import Reading

STYLE = Path(__file__).parent / "report.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(
    readings: Sequence[Reading], written: datetime, mlflow: str, note: str = "", sensitivity: float | None = None
) -> str:
    """Return the report as HTML.

    Args:
        readings: the answered and the refused pictures, in order
        written: the time of the report, with its zone
        mlflow: MLflow's address for links
        note: text that the reader typed in
        sensitivity: the alarm's promise; default: the model server's
    """
    sections = "".join(
        _section(r.upload.name, r.upload.sha256, r.answer, mlflow, sensitivity) for r in readings if r.answer
    )
    unread = [reading for reading in readings if reading.problem]
    remark = f'<p class="note"><b>{wording.REPORT_NOTE}:</b> {escape(note)}</p>' if note.strip() else ""
    head = (
        f"<h1>{wording.REPORT_TITLE}</h1><p>{wording.REPORT_WRITTEN.format(time=_time(written))}</p>"
        f'<p class="notice">{html_blocks.prose(wording.REPORT_DISCLAIMER)}</p>{remark}'
    )
    return page(wording.REPORT_TITLE, head, sections + (html_blocks.unread(unread) if unread else ""))


def page(title: str, head: str, body: str) -> str:
    """Return a document with the style and the policy of a report."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{title}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<header>{head}</header><main>{body}</main></body></html>"
    )


def _section(name: str, sha256: str, answer: Answer, mlflow: str, sensitivity: float | None) -> str:
    details = [f"{escape(key)}: {escape(str(value))}" for key, value in answer.metadata.items() if value is not None]
    facts = [
        wording.REPORT_READ.format(time=_time(answer.received)),
        f"{wording.REPORT_DIGEST} <code>{escape(answer.model.digest)}</code>" if answer.model.digest else "",
        f"{wording.REPORT_PICTURE} <code>{escape(sha256)}</code>",
        f"{wording.DETAILS_HEADING}: {', '.join(details)}" if details else "",
        escape(answer.disclaimer),
    ]
    return (
        f"<article>{html_blocks.alarm(answer, sensitivity)}{html_blocks.verdict(answer, name)}"
        f'<div class="pictures">{_pictures(answer)}</div>{html_blocks.heading(wording.PROBABILITIES)}{_bars(answer)}'
        f"{html_blocks.uncertainty(answer)}<footer>{html_blocks.provenance(answer, mlflow)}"
        f"<p>{'<br>'.join(filter(None, facts))}</p></footer></article>"
    )


def _pictures(answer: Answer) -> str:
    picture = pictures.open_picture(answer.image.picture_jpeg)
    if picture is None:
        return f"<p>{wording.NOT_SHOWN}</p>"
    warm = heatmap.overlay(picture, answer.gradcam.grid, heatmap.DEFAULT_OPACITY)
    heading = wording.HEAT_HEADING.format(name=answer.classes[answer.gradcam.target].name)
    return "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<img alt="{escape(caption)}" src="{pictures.data_url(image)}"></figure>'
        for caption, image in ((wording.PICTURE, picture), (heading, warm))
    )


def _bars(answer: Answer) -> str:
    rows = "".join(
        f"<tr><th>{escape(answer.classes[code].name)} <small>{escape(code)} · {wording.kind(answer, code)}</small></th>"
        f'<td><i style="width:{100 * answer.probabilities[code]:.1f}%;'
        f'background:{charts.CLASS_COLOURS[answer.kind(code)]}"></i></td>'
        f"<td>{escape(wording.percent(answer.probabilities[code]))}</td></tr>"
        for code in answer.ranking
    )
    return f'<table class="bars">{rows}</table>'


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M %Z")
