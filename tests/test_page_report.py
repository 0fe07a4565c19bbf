"""The report that readers download, and the example pictures.

The report is one file that requests nothing and runs nothing. It holds the pictures, the probabilities, the likely
classes, the alarm, the model and the times, and nothing about the patient but what the reader typed in. No text from
outside changes its structure.
"""

import base64
import io
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts.studies.draw_examples import drawings
from streamlit_app import example_pictures, report
from streamlit_app.client import ServingError
from streamlit_app.readings import Reading, Upload
from tests.fake_torchserve import CLASSES, TAKES, answer_for, parse

WRITTEN = datetime(2026, 3, 1, 14, 5, tzinfo=UTC)
MLFLOW = "http://mlflow.example:5001"
# Pieces of markup among any characters, so that most examples would break something.
HOSTILE_TEXT = st.lists(
    st.sampled_from(["<script>", "</style>", "<img src=x onerror=alert(1)>", '"', "'", "--><!--", "&lt;", "]]>", "**"])
    | st.text(max_size=6),
    min_size=1,
    max_size=6,
).map("".join)


class Outline(HTMLParser):
    """The tags of a document with their attributes' names, and its text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple] = []
        self.text = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment",))

    def handle_data(self, data: str) -> None:
        self.text += data


def document(text: str) -> str:
    """Return a report in which every text from outside is this text."""
    answer = parse(
        classes={code: {"name": text, "malignant": True, "description": text} for code in CLASSES},
        model=dict.fromkeys(["name", "version", "architecture", "digest", "run_id"], text),
        metadata={"age": text, "sex": text},
        disclaimer=text,
        uncertainty={"entropy": 1, "conformal_set": ["MEL"], "confidence_level": 0.9},
    )
    refused = Reading(Upload.of(text, b""), problem=ServingError("refused", text))
    return report.render([Reading(Upload.of(text, b"1"), answer), refused], WRITTEN, MLFLOW, f"note {text}")


@given(HOSTILE_TEXT)
@settings(max_examples=60, deadline=None)
def test_text_from_outside_is_shown_as_it_is_and_changes_no_tag(text):
    hostile, harmless = Outline(document(f"x{text}")), Outline(document("x"))
    assert hostile.tags == harmless.tags
    assert f"note x{text}" in hostile.text


def test_a_report_is_whole():
    answer = parse(b"1", metadata=dict.fromkeys(TAKES))
    page = report.render([Reading(Upload.of("a.jpg", b"1"), answer)], WRITTEN, MLFLOW, "", 0.99)
    text = Outline(page).text
    for expected in (
        "a.jpg", "Written 2026-03-01 14:05 UTC.", f"Read {answer.received:%Y-%m-%d %H:%M} UTC.", "Likely classes",
        "at most 1 in 100", "skin_vit version 3", answer.model.digest, "Not a medical device", "Evidence for",
        Upload.of("a.jpg", b"1").sha256, *(name for name, _, _ in CLASSES.values()),
    ):  # fmt: skip
        assert expected in text
    assert page.count("data:image/jpeg;base64,") == 2
    assert "Patient details" not in text
    assert "Note" not in text
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "url(" not in page


def test_what_the_reader_typed_in_is_in_the_report():
    answer = parse(metadata={"age": "71", "sex": None, "site": None})
    text = Outline(report.render([Reading(Upload.of("a", b""), answer)], WRITTEN, MLFLOW, "case 17")).text
    assert "Patient details: age: 71" in text
    assert "sex:" not in text
    assert "Note: case 17" in text


def test_pictures_lie_as_the_answer_says():
    answer = parse(b"1")
    page = report.render([Reading(Upload.of("a.jpg", b"1"), answer)], WRITTEN, MLFLOW)
    first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(part.split('"')[0]))), float)
        for part in page.split("data:image/jpeg;base64,")[1:]
    )
    grid = np.asarray(answer_for(b"1")["gradcam"]["grid"])
    row, column = np.unravel_index(grid.argmax(), grid.shape)
    change = np.abs(second - first).sum(2)
    hot = change[int((row + 0.5) / 14 * 75), int((column + 0.5) / 14 * 100)]
    assert hot > 50 > 20 > change[0, 0]


@pytest.mark.parametrize("upload", example_pictures.uploads(), ids=lambda upload: upload.name)
def test_examples_are_the_generator_s_drawings(upload):
    """`python scripts/studies/draw_examples.py` writes them again."""
    stored, drawn = (
        np.asarray(Image.open(io.BytesIO(jpeg)), float) for jpeg in (upload.image, drawings()[upload.name])
    )
    assert np.abs(stored - drawn).mean() < 2, "another release of OpenCV or Pillow may move single grey levels"
    assert upload.name.startswith("drawn_")
    assert upload.name.endswith("_not_real.jpg")
    assert len(upload.image) < 30_000


def test_there_are_three_examples():
    assert {upload.name for upload in example_pictures.uploads()} == set(drawings())
    assert len(drawings()) == 3
