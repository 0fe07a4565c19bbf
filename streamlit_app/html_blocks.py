"""The page's own blocks of HTML. Text from an answer, a file name or an error is escaped here."""

import re
from html import escape
from urllib.parse import quote

from streamlit_app import wording
from streamlit_app.answer_schema import UNKNOWN, Answer, ExplainedClass, RefusedVersion
from streamlit_app.client import ServingError
from streamlit_app.heatmap import COLOURS
from streamlit_app.readings import Reading


def prose(text: str) -> str:
    """Return a sentence of `wording` as HTML."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", html)


def heading(text: str) -> str:
    """Return a heading above a part of the answer."""
    return f"<h4>{escape(text)}</h4>"


MASTHEAD = (
    f'<header class="sl-mast"><span class="sl-brand"><i></i>{wording.PAGE_TITLE}</span>'
    f'<span class="sl-notice" role="note">{prose(wording.NOTICE)}</span></header>'
)
_features = (
    f'<li><span class="sl-icon" aria-hidden="true">{icon}</span><div><h3>{title}</h3><p>{prose(text)}</p></div></li>'
    for icon, title, text in wording.FEATURES
)
FEATURES = f'<ul class="sl-steps">{"".join(_features)}</ul>'
EXAMPLES = (
    f'<section class="sl-examples"><h4>{wording.EXAMPLES_HEADING}</h4><p>{prose(wording.EXAMPLES_TEXT)}</p></section>'
)
EXAMPLES_SHOWN = f'<div class="sl-drawn" role="note">{prose(wording.EXAMPLES_SHOWN)}</div>'
DETAILS_HEADING = (
    f'<div class="sl-details">{heading(wording.DETAILS_HEADING)}<p>{prose(wording.DETAILS_TEXT)}</p></div>'
)
HEAT_SCALE = (
    f'<p class="sl-scale"><span>{wording.HEAT_LEAST}</span>'
    f'<i style="background: linear-gradient(90deg, {", ".join(COLOURS)})"></i><span>{wording.HEAT_MOST}</span></p>'
)
_advice = (f"{heading(title)}<p>{prose(text)}</p>" for title, text in wording.GUIDE)
GUIDE = f'<section class="sl-guide">{"".join(_advice)}</section>'


def upload_invitation(keep_days: int) -> str:
    """Return the invitation to upload, which says whether pictures are kept and how long."""
    text = prose(wording.upload_text(keep_days))
    return f'<section class="sl-hero"><h1>{wording.UPLOAD_HEADING}</h1><p>{text}</p></section>'


def verdict(answer: Answer, name: str) -> str:
    """Return the most probable class of a picture, its probability and that of all malignant classes."""
    top = answer.ranking[0]
    lesion = answer.classes[top]
    codes = ", ".join(code for code, lesion in answer.classes.items() if lesion.malignant)
    malignant = wording.ALL_MALIGNANT.format(codes=codes)
    return (
        f'<section class="sl-verdict sl-edge-{answer.kind(top)}"><div>'
        f'<p class="sl-eyebrow">{wording.TOP_CLASS} · <span class="sl-file">{escape(name)}</span></p>'
        f"<h2>{escape(lesion.name)} {_tag(answer, top)}</h2><p>{escape(lesion.description)}</p>"
        f'<p class="sl-caution">{prose(wording.TOP_CLASS_CAUTION)}</p></div>'
        f"<dl><div><dd>{wording.percent(answer.probabilities[top])}</dd><dt>{wording.TOP_PROBABILITY}</dt></div>"
        f"<div><dd>{wording.percent(answer.malignancy)}</dd><dt>{escape(malignant)}</dt></div></dl>"
        "</section>"
    )


def alarm(answer: Answer, sensitivity: float | None) -> str:
    """Return whether the lesion is flagged as suspicious, what the alarm promises, and its price."""
    promise, suspicion = answer.promise(sensitivity), answer.suspicion
    if promise is None or suspicion is None:
        return f'<section class="sl-alarm sl-edge-unknown"><p>{prose(wording.NO_ALARM)}</p></section>'
    flagged = answer.is_flagged(sensitivity)
    sentences = [wording.ALARM_PROMISE.format(misses=wording.misses(promise.sensitivity))]
    if promise.benign_flagged is not None:
        sentences.append(wording.ALARM_PRICE.format(benign=round(100 * promise.benign_flagged)))
    sentences.append(wording.FLAGGED_CAUTION if flagged else wording.NOT_FLAGGED_CAUTION)
    melanoma = ""
    if suspicion.melanoma and (own := {p.sensitivity: p for p in suspicion.melanoma.promises}.get(promise.sensitivity)):
        is_flagged = suspicion.melanoma.melanoma >= own.threshold
        kind, text = (
            ("malignant", wording.MELANOMA_FLAGGED) if is_flagged else ("unknown", wording.MELANOMA_NOT_FLAGGED)
        )
        melanoma = f'<span class="sl-tag sl-{kind}">{text}</span>'
    title, kind = (wording.FLAGGED, "malignant") if flagged else (wording.NOT_FLAGGED, "unknown")
    return (
        f'<section class="sl-alarm sl-edge-{kind}" role="status"><h2>{title} {melanoma}</h2>'
        f"<p>{prose(' '.join(sentences))}</p></section>"
    )


def chart_heading(answer: Answer) -> str:
    """Return the heading of the probability chart and the legend of its colours."""
    kinds = dict.fromkeys(answer.kind(code) for code in answer.probabilities)
    legend = "".join(f'<span><i class="sl-dot sl-{kind}"></i>{wording.KINDS[kind]}</span>' for kind in kinds)
    return f'<div class="sl-head">{heading(wording.PROBABILITIES)}<p class="sl-legend">{legend}</p></div>'


def uncertainty(answer: Answer) -> str:
    """Return the cards below the chart: certainty, likely classes, and the ninth class."""
    headline, sentence = wording.certainty_text(answer)
    cards = [(headline, f"<p>{escape(sentence)}</p>")]
    conformal_set, level = answer.uncertainty.conformal_set, answer.uncertainty.confidence_level
    if conformal_set is not None and level is not None:
        chips = "".join(
            f'<li class="sl-{answer.kind(code)}">{escape(answer.classes[code].name)}</li>'
            for code in conformal_set
            if code in answer.classes
        )
        chips = chips or f'<li class="sl-unknown">{wording.LIKELY_NONE}</li>'
        text = f'<ul class="sl-chips">{chips}</ul><p>{prose(wording.LIKELY_TEXT.format(level=f"{100 * level:g}"))}</p>'
        cards.append((wording.LIKELY_CLASSES, text))
    if UNKNOWN in answer.probabilities:
        title = wording.UNKNOWN_HEADING.format(percent=wording.percent(answer.probabilities[UNKNOWN]))
        cards.append((title, f"<p>{prose(wording.UNKNOWN_TEXT)}</p>"))
    blocks = "".join(f"<div>{heading(headline)}{text}</div>" for headline, text in cards)
    return f'<section class="sl-sure">{blocks}</section>'


def glossary(answer: Answer) -> str:
    """Return the nine classes in the answer's own words."""

    def entry(code: str, lesion: ExplainedClass) -> str:
        term = f"{escape(lesion.name)} <small>{escape(code)}</small> {_tag(answer, code)}"
        return f"<div><dt>{term}</dt><dd>{escape(lesion.description)}</dd></div>"

    entries = "".join(entry(code, lesion) for code, lesion in answer.classes.items())
    return f'<dl class="sl-glossary">{entries}</dl>'


def provenance(answer: Answer, mlflow: str) -> str:
    """Return the model that answered, with links to its run and its version in MLflow."""
    model, base = answer.model, escape(mlflow.rstrip("/"), quote=True)
    title = wording.MODEL_VERSION if model.version else wording.MODEL_ALONE
    parts = [f"{wording.MODEL} <b>{escape(title.format(name=model.name, version=model.version))}</b>"]
    if model.run_id:  # MLflow itself finds the run's experiment
        parts.append(_link(f"{base}/#/runs/{quote(model.run_id, safe='')}", wording.TRAINING_RUN))
    if model.version:
        path = f"{quote(model.name, safe='')}/versions/{quote(model.version, safe='')}"
        parts.append(_link(f"{base}/#/models/{path}", wording.REGISTRY_ENTRY))
    if model.architecture:
        parts.append(escape(model.architecture))
    if model.digest:
        parts.append(f'<code title="{escape(model.digest, quote=True)}">{escape(model.digest[:19])}…</code>')
    return f'<p class="sl-provenance">{" · ".join(parts)}</p>'


def outage(error: ServingError) -> str:
    """Return the reason why no picture can be read, and what to do."""
    headline, advice = wording.OUTAGES[error.kind]
    return (
        f'<section class="sl-problem" role="alert"><h3>{prose(headline)}</h3><p>{prose(advice)}</p>'
        f"<p><small>{escape(str(error))}</small></p></section>"
    )


def unread(readings: list[Reading]) -> str:
    """Return the pictures that the model server refused or failed on, with its reasons."""
    if all(reading.problem and reading.problem.kind == "refused" for reading in readings):
        title = wording.ONE_REFUSED if len(readings) == 1 else wording.MANY_REFUSED
    else:
        title = wording.ONE_UNREAD if len(readings) == 1 else wording.MANY_UNREAD
    rows = "".join(
        f'<li><span class="sl-file">{escape(r.upload.name)}</span> {escape(str(r.problem))}</li>' for r in readings
    )
    title = title.format(number=len(readings))
    return f'<section class="sl-problem sl-mild" role="alert"><h3>{title}</h3><ul>{rows}</ul></section>'


def counts(readings: list[Reading], sensitivity: float | None = None) -> str:
    """Return a batch's numbers in one line."""
    answers = [reading.answer for reading in readings if reading.answer]
    kinds = [answer.kind(answer.ranking[0]) for answer in answers]
    refused = sum(reading.problem is not None and reading.problem.kind == "refused" for reading in readings)
    numbers = {wording.COUNT_READ: len(answers), wording.COUNT_MALIGNANT: kinds.count("malignant")}
    flagged = [answer.is_flagged(sensitivity) for answer in answers]
    if None not in flagged:
        numbers[wording.COUNT_FLAGGED] = sum(map(bool, flagged))
    rare = {
        wording.COUNT_UNKNOWN: kinds.count("unknown"),
        wording.COUNT_REFUSED: refused,
        wording.COUNT_FAILED: len(readings) - len(answers) - refused,
    }
    numbers |= {phrase: number for phrase, number in rare.items() if number}
    phrases = (prose(phrase.format(number=number)) for phrase, number in numbers.items())
    return f'<p class="sl-counts">{" · ".join(phrases)}</p>'


def services(rows: list[tuple[str, bool, str]]) -> str:
    """Return the sidebar's list of services: name, health, state in words."""
    items = "".join(
        f'<li><i class="sl-dot sl-{"up" if healthy else "down"}"></i><b>{escape(name)}</b>'
        f"<span>{escape(state)}</span></li>"
        for name, healthy, state in rows
    )
    return f'{heading(wording.STATUS_HEADING)}<ul class="sl-services">{items}</ul>'


def not_deployed(versions: list[RefusedVersion]) -> str:
    """Return the versions that the promoter refused, with the reasons."""
    items = "".join(f"<li>{escape(version.reason)}</li>" for version in versions)
    return f'<section class="sl-problem sl-mild"><h3>{wording.NOT_DEPLOYED}</h3><ul>{items}</ul></section>'


def _tag(answer: Answer, code: str) -> str:
    return f'<span class="sl-tag sl-{answer.kind(code)}">{wording.kind(answer, code).capitalize()}</span>'


def _link(address: str, text: str) -> str:
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer">{text} ↗</a>'
