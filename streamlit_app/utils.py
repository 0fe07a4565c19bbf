"""Pictures, figures, tables and words made of an answer; nothing in here draws on the page or asks a server."""

import base64
import csv
import html
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.colors
import plotly.graph_objects as go
from PIL import Image, ImageOps

from streamlit_app.client import METADATA, UNKNOWN, Answer
from streamlit_app.readings import Reading

log = logging.getLogger(__name__)

# Read on light and on dark, and apart for readers who confuse red and green (the words say it, too).
COLOURS = {"malignant": "#d0483e", "other": "#3a8fa6", "unknown": "#8a97a2"}
# Evenly rising lightness, and greens and blues that skin does not have.
HEAT_COLOURS: list[str] = plotly.colors.sequential.Viridis
DISPLAY_SIDE = 1000  # pixels; sharp in half of a wide window
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # as the model server; asked of the header, before any pixel is decoded


def open_picture(data: bytes) -> Image.Image | None:
    """The upright RGB picture, at most DISPLAY_SIDE pixels long, or None if it cannot be shown.

    Only for bytes that the model server has accepted: it has the limits, these are the second line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but harmless metadata
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    return None
                opened.draft("RGB", (DISPLAY_SIDE, DISPLAY_SIDE))
                picture = ImageOps.exif_transpose(opened)
                if picture.mode.startswith("I"):  # 16-bit grey
                    levels = (np.clip(np.asarray(picture), 0, 65535) // 257).astype(np.uint8)
                    white_is_zero = getattr(opened, "tag_v2", {}).get(262) == 0  # a TIFF's, heeded in 8 bits alone
                    picture = Image.fromarray(255 - levels if white_is_zero else levels)
                picture.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
                if "A" in picture.mode or "transparency" in picture.info:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture.convert("RGB")
        except Exception:  # Pillow's decoders report damage with whatever they stumble on
            log.info("a picture that the model server accepted cannot be shown", exc_info=True)
            return None


def data_url(picture: Image.Image) -> str:
    """The picture as a JPEG within an address."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(picture: Image.Image, side: int = 96) -> str:
    """A small copy as an address."""
    small = picture.copy()
    small.thumbnail((side, side))
    return data_url(small)


def heat_overlay(picture: Image.Image, grid: Sequence[Sequence[float]], opacity: float) -> Image.Image:
    """The picture under a Grad-CAM grid of values in [0, 1].

    The model saw the whole picture squashed to a square, so the grid stretches over all of it. Cold places stay clear:
    the share of colour rises with the heat, up to `opacity` (0 to 1).
    """
    coarse = Image.fromarray(np.asarray(grid, np.float32))
    heat = np.clip(np.asarray(coarse.resize(picture.size, Image.Resampling.BICUBIC)), 0, 1)
    stops = np.array([plotly.colors.hex_to_rgb(colour) for colour in HEAT_COLOURS])
    table = np.stack([np.interp(np.arange(256), np.linspace(0, 255, len(stops)), c) for c in stops.T], 1)
    ramp = np.clip((heat - 0.08) / 0.5, 0, 1)
    alpha = (opacity * ramp * ramp * (3 - 2 * ramp))[..., None]
    pixels = np.asarray(picture, np.float32)
    return Image.fromarray((pixels + (table[(heat * 255).astype(np.uint8)] - pixels) * alpha).round().astype(np.uint8))


def percent(p: float) -> str:
    """A probability in words of at most one decimal, never rounded to certainty."""
    if 0 < p < 0.001:
        return "< 0.1 %"
    if 0.999 < p < 1:
        return "> 99.9 %"
    return f"{100 * p:.1f} %" if p < 0.1 else f"{100 * p:.0f} %" if p < 0.985 else f"{100 * p:.1f} %"


def nature(answer: Answer, code: str) -> str:
    """What a class is, in a word: a colour of COLOURS."""
    return "unknown" if code == UNKNOWN else "malignant" if answer.classes[code].malignant else "other"


NATURES = {"malignant": "malignant", "other": "not malignant", "unknown": "no known class"}


def in_a_word(answer: Answer, code: str) -> str:
    """As NATURES has it; of actinic keratosis, which may become a carcinoma, that it is precancerous."""
    return "precancerous" if code == "AK" else NATURES[nature(answer, code)]


def probability_figure(answer: Answer) -> go.Figure:
    """Nine horizontal bars, the most probable on top; what is malignant shows in colour and in words."""
    codes = answer.ranking
    labels = [
        f"{html.escape(answer.classes[code].name)}<br>"
        f"<span style='font-size:11px;opacity:.75'>{html.escape(code)} · {in_a_word(answer, code)}</span>"
        for code in codes
    ]
    hover = [
        f"<b>{html.escape(answer.classes[code].name)}</b> ({html.escape(code)}, {in_a_word(answer, code)})<br>"
        f"{percent(answer.probabilities[code])}<br>"
        + "<br>".join(html.escape(line) for line in textwrap.wrap(answer.classes[code].description, 52))
        for code in codes
    ]
    values = [answer.probabilities[code] for code in codes]
    track = go.Bar(  # the whole of 100 %, behind each bar, with the figure at its end
        x=[1] * len(codes),
        y=labels,
        orientation="h",
        marker={"color": "rgba(128, 145, 155, 0.14)"},
        text=[percent(value) for value in values],
        textposition="outside",
        textfont={"size": 14},
        cliponaxis=False,
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    bars = go.Bar(
        x=values,
        y=labels,
        orientation="h",
        marker={"color": [COLOURS[nature(answer, code)] for code in codes]},
        hoverinfo="skip",
    )
    figure = go.Figure([track, bars])
    figure.update_xaxes(range=[0, 1], visible=False, fixedrange=True)
    figure.update_yaxes(autorange="reversed", fixedrange=True, automargin=True, ticks="", tickfont={"size": 13})
    figure.update_layout(
        height=46 * len(codes) + 8,
        margin={"l": 0, "r": 60, "t": 0, "b": 0},
        bargap=0.5,
        barmode="overlay",
        barcornerradius=5,
        showlegend=False,
        hoverlabel={"align": "left"},
    )
    return figure


def in_words(answer: Answer) -> str:
    """The nine probabilities for readers who hear the page."""
    return ", ".join(f"{answer.classes[code].name} {percent(answer.probabilities[code])}" for code in answer.ranking)


def certainty(answer: Answer) -> tuple[str, str]:
    """How sure the model is: a word or two ("decided", "hesitant", "unsure"), and a sentence.

    exp(entropy) is the number of equally likely classes with the same entropy: the perplexity.
    """
    choices = math.exp(answer.uncertainty.entropy)
    if answer.ranking[0] == UNKNOWN:
        return "lost", (
            "The picture looks strange to it, as a few pictures of known lesions do, too. Its other eight "
            "probabilities mean little here."
        )
    first, second = (answer.classes[code].name for code in answer.ranking[:2])
    measure = f"Entropy {answer.uncertainty.entropy:.2f} nats: as an even choice among {choices:.1f} classes."
    if choices < 1.5:
        return "decided", f"Nearly all its probability is on {first}. {measure}"
    if choices < 3:
        return "hesitant", f"It leans to {first}, then {second}. {measure}"
    return "unsure", f"Its probability is spread over many classes. {measure}"


def overview(readings: Sequence[Reading], thumbnails: Sequence[str | None]) -> pd.DataFrame:
    """One row for each answered picture, for the table on the page; probabilities in percent."""
    rows = []
    for reading, small in zip(readings, thumbnails, strict=True):
        answer = reading.answer
        assert answer is not None, "only answered readings have a row"
        top = answer.ranking[0]
        rows.append(
            {
                "Picture": small,
                "File": reading.upload.name,
                "Most likely": answer.classes[top].name,
                "Kind": in_a_word(answer, top),
                "Probability": 100 * answer.probabilities[top],
                "All malignant": 100 * answer.malignancy,
                "None of these": 100 * answer.probabilities.get(UNKNOWN, 0.0),
                "The model is": certainty(answer)[0],
            }
        )
    return pd.DataFrame(rows)


def to_csv(readings: Sequence[Reading]) -> str:
    """All readings, the refused ones too; no cell can start a formula in a spreadsheet."""
    codes = next((list(r.answer.probabilities) for r in readings if r.answer), [])
    head = ["file", "sha256", "code", "name", "probability", "malignant", *codes]
    told = [name for name in METADATA if any(name in r.answer.metadata for r in readings if r.answer)]
    head += ["entropy", "conformal_set", "confidence_level", "model", "version", "digest", *told, "problem"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, head, restval="")
    writer.writeheader()
    for reading in readings:
        row: dict[str, object] = {"file": reading.upload.name, "sha256": reading.upload.sha256}
        if (answer := reading.answer) is not None:
            top = answer.ranking[0]
            row |= {"code": top, "name": answer.classes[top].name, "probability": answer.probabilities[top]}
            row |= {"malignant": answer.classes[top].malignant}
            row |= answer.probabilities
            row |= {"entropy": answer.uncertainty.entropy, "model": answer.model.name}
            row |= {"conformal_set": " ".join(answer.uncertainty.conformal_set or [])}
            row |= {"confidence_level": answer.uncertainty.confidence_level}
            row |= {"version": answer.model.version, "digest": answer.model.digest}
            row |= {name: answer.metadata.get(name) for name in told}
        row["problem"] = str(reading.problem or "")
        writer.writerow({key: _harmless(value) for key, value in row.items()})
    return stream.getvalue()


def _harmless(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front (OWASP, "CSV injection")."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
