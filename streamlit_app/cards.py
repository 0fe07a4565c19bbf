"""The page's own pieces of HTML. Whatever comes from an answer, a file name or an error is escaped here."""

from html import escape
from urllib.parse import quote

from streamlit_app.client import UNKNOWN, Answer, Refusal, ServingError
from streamlit_app.readings import Reading
from streamlit_app.utils import HEAT_COLOURS, NATURES, certainty, in_a_word, nature, percent

# kind of ServingError: headline, and what the reader can do
OUTAGES = {
    "unreachable": (
        "The model server is away",
        "Whoever runs it can ask <code>make status</code> or <code>docker compose ps</code>. Your pictures are kept: "
        "press Try again once it is back.",
    ),
    "timeout": ("The model server takes too long", "It may be starting or overloaded. Try again in a moment."),
    "busy": ("The model server is busy", "Too many requests wait already. Try again in a moment."),
    "no_model": (
        "No model is being served yet",
        "A model appears here once the registry has a version with the alias <code>champion</code>.",
    ),
    "failed": ("The model failed on this picture", "Its log says why. Other pictures may be read all the same."),
    "refused": ("This class cannot be explained", "The heatmap of the most likely class is shown instead."),
    "unexpected": ("The model server gave an answer this page does not understand", "Its log may tell more."),
}


def masthead() -> str:
    """Name of the page and the notice that is always in sight."""
    return (
        '<header class="sl-mast"><span class="sl-brand"><i></i>Skin lesion reader</span>'
        '<span class="sl-notice" role="note"><b>Research use only.</b> Not a medical device.</span></header>'
    )


def welcome() -> str:
    """What a newcomer finds below the uploader."""
    parts = [  # icons are names in the symbol font that Streamlit brings along
        ("bar_chart", "Nine probabilities", "Eight diagnoses and “none of the above”; what is malignant is marked."),
        ("blur_on", "A heatmap", "Where in the picture the model found its evidence, for the class you choose."),
        ("balance", "How sure it is", "In plain words, with a short list that usually holds the right class."),
    ]
    cells = "".join(
        f'<li><span class="sl-icon" aria-hidden="true">{icon}</span><h3>{head}</h3><p>{text}</p></li>'
        for icon, head, text in parts
    )
    return f'<ul class="sl-steps">{cells}</ul>'


def hero() -> str:
    """The invitation above the uploader."""
    return (
        '<section class="sl-hero"><h1>What does the model see?</h1>'
        "<p>Upload dermoscopy pictures and read its nine probabilities and its heatmap. "
        "They are not stored; a log keeps each one’s fingerprint (SHA-256) and its probabilities.</p></section>"
    )


def _tag(answer: Answer, code: str) -> str:
    return f'<span class="sl-tag sl-{nature(answer, code)}">{in_a_word(answer, code).capitalize()}</span>'


def verdict(answer: Answer, name: str) -> str:
    """The most probable class and how it was answered."""
    top = answer.ranking[0]
    malignant = ", ".join(code for code, lesion in answer.classes.items() if lesion.malignant)
    lesion = answer.classes[top]
    return (
        f'<section class="sl-verdict sl-edge-{nature(answer, top)}"><div>'
        f'<p class="sl-eyebrow">Most likely · <span class="sl-file">{escape(name)}</span></p>'
        f"<h2>{escape(lesion.name)} {_tag(answer, top)}</h2>"
        f"<p>{escape(lesion.description)}</p>"
        '<p class="sl-caution">The name of the most probable class, not a finding: malignant lesions, too, get benign '
        "names. A doctor decides.</p></div>"
        f"<dl><div><dd>{percent(answer.probabilities[top])}</dd><dt>probability</dt></div>"
        f"<div><dd>{percent(answer.malignancy)}</dd>"
        f"<dt>all malignant classes<br>together ({escape(malignant)})</dt></div></dl></section>"
    )


def patient() -> str:
    """What stands above the fields for age, sex and site."""
    return (
        "<h4>What is known of the patient</h4>"
        "<p>This model also takes what is filled in here. What is left open counts for nothing.</p>"
    )


def legend(answer: Answer) -> str:
    """What the bars' colours mean."""
    kinds = dict.fromkeys(nature(answer, code) for code in answer.probabilities)
    return (
        '<p class="sl-legend">'
        + "".join(f'<span><i class="sl-dot sl-{kind}"></i>{NATURES[kind]}</span>' for kind in kinds)
        + "</p>"
    )


def heat_scale() -> str:
    """The heatmap's colours, from the least weight to the most."""
    colours = ", ".join(HEAT_COLOURS)
    return (
        '<p class="sl-scale"><span>least evidence</span>'
        f'<i style="background: linear-gradient(90deg, {colours})"></i><span>most, in this map</span></p>'
    )


def uncertainty(answer: Answer) -> str:
    """How sure the model is, the likely set, and what UNK means."""
    word, sentence = certainty(answer)
    cells = [(f"The model is {word}", f"<p>{escape(sentence)}</p>")]
    given = answer.uncertainty
    if given.conformal_set is not None and given.confidence_level is not None:
        chosen = [code for code in given.conformal_set if code in answer.classes]
        chips = "".join(f'<li class="sl-{nature(answer, c)}">{escape(answer.classes[c].name)}</li>' for c in chosen)
        level = f"{100 * given.confidence_level:g}"
        promise = (
            f"On pictures like those it was calibrated on, such a set is made to hold the right class {level} times in "
            "100. What is not in it is not ruled out."
        )
        cells.append(
            ("The likely classes", f'<ul class="sl-chips">{chips or "<li>no class at all</li>"}</ul><p>{promise}</p>')
        )
    if UNKNOWN in answer.probabilities:
        cells.append(
            (
                f"None of the above (UNK): {percent(answer.probabilities[UNKNOWN])}",
                "<p>How strange the picture looks to the model: the higher, the less the other eight mean. It notices "
                "most pictures that show no lesion; a disease it never learned mostly gets the name of one it knows, "
                "so a low figure rules nothing out.</p>",
            )
        )
    return (
        '<section class="sl-sure">'
        + "".join(f"<div><h4>{head}</h4>{body}</div>" for head, body in cells)
        + "</section>"
    )


def glossary(answer: Answer) -> str:
    """The nine classes in the answer's own words."""
    entries = "".join(
        f"<div><dt>{escape(lesion.name)} <small>{escape(code)}</small> {_tag(answer, code)}</dt>"
        f"<dd>{escape(lesion.description)}</dd></div>"
        for code, lesion in answer.classes.items()
    )
    return f'<dl class="sl-glossary">{entries}</dl>'


def provenance(answer: Answer, mlflow: str) -> str:
    """Which model answered, with links to its run and its version in MLflow."""
    model, base = answer.model, escape(mlflow.rstrip("/"), quote=True)
    what = escape(model.name) + (f" version {escape(model.version)}" if model.version else ", not registered")
    parts = [f"<b>{what}</b>"]
    if model.run_id:  # MLflow itself finds the run's experiment
        parts.append(_link(f"{base}/#/runs/{quote(model.run_id, safe='')}", "its training run"))
    if model.version:
        path = f"{quote(model.name, safe='')}/versions/{quote(model.version, safe='')}"
        parts.append(_link(f"{base}/#/models/{path}", "its registry entry"))
    if model.architecture:
        parts.append(escape(model.architecture))
    if model.digest:
        parts.append(f'<code title="{escape(model.digest, quote=True)}">{escape(model.digest[:19])}…</code>')
    return f'<p class="sl-provenance">Read by {" · ".join(parts)}</p>'


def _link(address: str, text: str) -> str:
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer">{text} ↗</a>'


def outage(error: ServingError) -> str:
    """Why nothing can be read at all."""
    headline, advice = OUTAGES[error.kind]
    return (
        f'<section class="sl-problem" role="alert"><h3>{headline}</h3><p>{advice}</p>'
        f"<p><small>{escape(str(error))}</small></p></section>"
    )


def refused(readings: list[Reading]) -> str:
    """The pictures that the model server refused, or failed on, with its reasons."""
    word = "refused" if all(r.problem and r.problem.kind == "refused" for r in readings) else "not read"
    head = f"This picture was {word}" if len(readings) == 1 else f"{len(readings)} pictures were {word}"
    rows = "".join(
        f'<li><span class="sl-file">{escape(r.upload.name)}</span> {escape(str(r.problem))}</li>' for r in readings
    )
    return f'<section class="sl-problem sl-mild" role="alert"><h3>{head}</h3><ul>{rows}</ul></section>'


def services(entries: list[tuple[str, bool, str]]) -> str:
    """The sidebar's list: name, whether it is well, and a word."""
    rows = "".join(
        f'<li><i class="sl-dot sl-{"up" if well else "down"}"></i><b>{escape(name)}</b> {escape(word)}</li>'
        for name, well, word in entries
    )
    return f'<h4>Behind this page</h4><ul class="sl-services">{rows}</ul>'


def not_served(refusals: list[Refusal]) -> str:
    """Versions that were asked for and do not serve, and why; empty without any."""
    items = "".join(f"<li>{escape(one.reason)}</li>" for one in refusals)
    return f'<section class="sl-problem sl-mild"><h3>Not served</h3><ul>{items}</ul></section>' if refusals else ""


def guide() -> str:
    """The sidebar's advice on reading an answer."""
    return (
        '<section class="sl-guide"><h4>Reading the heatmap</h4><p>Grad-CAM: the places that spoke for the chosen class '
        "in the model's last layers. It shows where the model looked, not where a disease is, and each map is scaled "
        "by itself: bright does not mean likely.</p>"
        "<h4>Reading the figures</h4><p>Probabilities of a model trained on dermoscopy pictures of certain clinics. "
        "Other cameras, skins and diseases can mislead it. A doctor decides.</p></section>"
    )


def counts(readings: list[Reading]) -> str:
    """A batch in one line."""
    answers = [r.answer for r in readings if r.answer]
    tops = [nature(answer, answer.ranking[0]) for answer in answers]
    parts = [f"<b>{len(answers)}</b> read", f"<b>{tops.count('malignant')}</b> with a malignant class on top"]
    if "unknown" in tops:
        parts.append(f"<b>{tops.count('unknown')}</b> unlike any known class")
    refused = sum(r.problem is not None and r.problem.kind == "refused" for r in readings)
    for number, word in ((refused, "refused"), (len(readings) - len(answers) - refused, "not read")):
        if number:
            parts.append(f"<b>{number}</b> {word}")
    return f'<p class="sl-counts">{" · ".join(parts)}</p>'
