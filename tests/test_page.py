"""The page without a browser.

Blocks, charts, tables: they match the answer and the picture, and no text from outside becomes HTML or a formula.
App: the whole page, run by Streamlit's own test driver.
"""

import base64
import csv
import io
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from PIL import Image
from streamlit.testing.v1 import AppTest

from streamlit_app import charts, heatmap, html_blocks, many_pictures, pictures, wording
from streamlit_app.certainty import certainty
from streamlit_app.client import ServingError
from streamlit_app.readings import Reading, Upload
from tests.fake_torchserve import CLASSES, NOWHERE, PICTURE, PROMISES, parse

pytest_plugins = ["tests.fixtures_page"]
FOLDER = Path(__file__).parent.parent / "streamlit_app"
HOSTILE = '<img src=x onerror="alert(1)">![x](http://evil.example/y)$a$.jpg'

HALF_BLUE = Image.new("RGB", (80, 40), "red")
HALF_BLUE.paste("blue", (0, 0, 40, 40))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestPictures:
    def test_heat_lies_where_the_grid_says(self):
        grey = Image.new("RGB", (300, 100), (128, 128, 128))
        grid = np.zeros((4, 4))
        grid[0, 3] = 1  # top right
        change = np.abs(np.asarray(heatmap.overlay(grey, grid.tolist(), 0.8), float) - 128).sum(2)
        assert change[:25, 225:].mean() > 40
        assert change[50:].max() == 0
        assert change[:, :140].max() == 0

    def test_opacity(self):
        picture = Image.effect_noise((60, 40), 50).convert("RGB")
        grid = [[0.0, 0.5], [0.5, 1.0]]
        assert heatmap.overlay(picture, grid, 0).tobytes() == picture.tobytes()
        overlays = [np.asarray(heatmap.overlay(picture, grid, opacity), float) for opacity in (0.2, 0.5, 1)]
        distances = [np.abs(overlay - np.asarray(picture)).mean() for overlay in overlays]
        assert distances == sorted(distances)
        assert distances[0] > 0

    @pytest.mark.parametrize("data", [b"", b"GIF89a", encode(HALF_BLUE, "PNG"), encode(HALF_BLUE, "JPEG")[:50]])
    def test_only_a_jpeg_of_the_model_server_is_shown(self, data):
        assert pictures.open_picture(data) is None


class TestWords:
    def test_percent_never_rounds_to_certainty(self):
        texts = [wording.percent(p) for p in (0, 0.0004, 0.004, 0.0996, 0.714, 0.986, 0.9996, 1)]
        assert texts == ["0.0 %", "< 0.1 %", "0.4 %", "10.0 %", "71 %", "98.6 %", "> 99.9 %", "100.0 %"]

    @pytest.mark.parametrize(("entropy", "word"), [(0.1, "high"), (0.8, "medium"), (1.8, "low")])
    def test_certainty(self, entropy, word):
        assert certainty(parse(uncertainty={"entropy": entropy})) == word

    @pytest.mark.parametrize(("code", "tag"), [("UNK", "No known class"), ("AK", "Precancerous"), ("MEL", "Malignant")])
    def test_no_dangerous_class_is_called_benign(self, code, tag):
        answer = parse(probabilities=dict.fromkeys(CLASSES, 0.05) | {code: 0.6})
        block = html_blocks.verdict(answer, "x.jpg")
        assert f">{tag}<" in block
        assert "Not malignant" not in block
        assert "(MEL, BCC, SCC)" in block
        assert (certainty(answer) == "not recognised") == (code == "UNK")

    @pytest.mark.parametrize(
        ("sensitivity", "headline", "sentences"),
        [
            (0.8, "Not flagged", ("at most 1 in 5 malignant", "flags 12 in 100 other", "can still be malignant")),
            (0.9, "Flagged as suspicious", ("at most 1 in 10 malignant", "flags 27 in 100 other")),
            (None, "Flagged as suspicious", ("at most 1 in 10 malignant",)),
        ],
    )
    def test_the_alarm_states_its_promise_and_price(self, sensitivity, headline, sentences):
        melanoma = {"melanoma": 0.1, "promises": PROMISES}
        suspicion = {"malignant": 0.4, "promises": PROMISES, "sensitivity": 0.9, "melanoma": melanoma}
        block = html_blocks.alarm(parse(suspicion=suspicion), sensitivity)
        assert all(words in block for words in (headline, *sentences, "Melanoma by itself: not flagged"))

    @pytest.mark.parametrize("suspicion", [None, {"malignant": 0.4, "promises": []}])
    def test_a_model_without_promise_says_so(self, suspicion):
        answer = parse(suspicion=suspicion)
        assert "promises no sensitivity" in html_blocks.alarm(answer, 0.9)
        assert answer.is_flagged(0.9) is None
        assert "flagged" not in html_blocks.counts([Reading(Upload.of("a", b"1"), answer)], 0.9)

    @pytest.mark.parametrize(
        ("codes", "level", "text"),
        [
            (["MEL", "NV"], 0.9, "contain the right class in 90 of 100 cases"),
            (["MEL"], 0.95, "contain the right class in 95 of 100 cases"),
            ([], 0.9, ">none<"),
            (None, None, None),
        ],
    )
    def test_likely_classes(self, codes, level, text):
        block = html_blocks.uncertainty(
            parse(uncertainty={"entropy": 1, "conformal_set": codes, "confidence_level": level})
        )
        assert text in block if text else "Likely classes" not in block

    def test_the_chart_marks_malignant_classes_in_colour_and_words(self):
        answer = parse()
        track, bars = charts.probability_chart(answer).data
        assert list(bars.x) == sorted(answer.probabilities.values(), reverse=True)
        assert len(bars.x) == 9
        for label, hover, colour, code in zip(bars.y, track.hovertext, bars.marker.color, answer.ranking, strict=True):
            malignant = answer.classes[code].malignant
            assert ("· malignant" in label) == malignant == (colour == charts.CLASS_COLOURS["malignant"])
            assert answer.classes[code].description[:20] in hover

    def test_the_style_sheet_has_the_charts_colours(self):
        style = (FOLDER / "style.css").read_text()
        assert all(f"--{kind}-bar: {colour};" in style for kind, colour in charts.CLASS_COLOURS.items())

    def test_the_page_takes_files_as_large_as_a_request(self):
        limit = int(re.search(r"max_request_size=(\d+)", (FOLDER / "../torchserve/config.properties").read_text())[1])
        config = tomllib.loads((FOLDER / ".streamlit/config.toml").read_text())
        assert config["server"]["maxUploadSize"] * 1024 * 1024 == limit

    def test_links_to_mlflow(self):
        block = html_blocks.provenance(parse(), "http://mlflow.example:5001/")
        assert 'href="http://mlflow.example:5001/#/runs/0123456789abcdef0123456789abcdef"' in block
        assert 'href="http://mlflow.example:5001/#/models/skin_vit/versions/3"' in block
        unregistered = parse(model={"name": "skin_vit"})
        assert "href" not in html_blocks.provenance(unregistered, "http://mlflow.example:5001")

    def test_no_text_from_outside_becomes_html(self):
        answer = parse(
            classes={code: {"name": HOSTILE, "malignant": True, "description": HOSTILE} for code in CLASSES},
            model=dict.fromkeys(["name", "version", "architecture", "digest", "run_id"], HOSTILE),
            uncertainty={"entropy": 1, "conformal_set": ["MEL"], "confidence_level": 0.9},
        )
        refused = Reading(Upload.of(HOSTILE, b""), problem=ServingError("refused", HOSTILE))
        track = charts.probability_chart(answer).data[0]
        blocks = [
            html_blocks.verdict(answer, HOSTILE), html_blocks.uncertainty(answer), html_blocks.glossary(answer),
            html_blocks.provenance(answer, "http://127.0.0.1"), html_blocks.outage(ServingError("busy", HOSTILE)),
            html_blocks.unread([refused]), html_blocks.services([(HOSTILE, True, HOSTILE)]),
            html_blocks.heading(HOSTILE), str(track.hovertext), str(track.y),
        ]  # fmt: skip
        assert all("img src" in block and "<img" not in block for block in blocks)


class TestTable:
    GOOD = Reading(Upload.of('=HYPERLINK("http://evil.example")', b"1"), parse(b"1"))
    REFUSED = Reading(Upload.of("ä,\n.jpg", b"2"), problem=ServingError("refused", "@SUM(1)"))

    def rows(self, *readings: Reading) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(many_pictures.to_csv(readings))))

    def test_csv_holds_everything_and_no_formula(self):
        first, second = self.rows(self.GOOD, self.REFUSED)
        assert {code: float(first[code]) for code in CLASSES} == self.GOOD.answer.probabilities
        assert first["file"].startswith("'=")
        assert (first["promised_sensitivity"], first["flagged"]) == ("0.9", str(self.GOOD.answer.is_flagged(0.9)))
        assert (first["version"], first["problem"]) == ("3", "")
        assert (second["file"], second["problem"], second["MEL"]) == ("ä,\n.jpg", "'@SUM(1)", "")
        assert "age" not in first

    def test_csv_holds_the_patient_details(self):
        answer = parse(metadata={"age": "55", "sex": None, "site": None})
        [row] = self.rows(Reading(Upload.of("a", b"1"), answer))
        assert (row["age"], row["sex"], row["site"]) == ("55", "", "")

    def test_csv_of_refusals_alone(self):
        [row] = self.rows(self.REFUSED)
        assert row["problem"] == "'@SUM(1)"

    def test_overview(self):
        [row] = many_pictures.overview([("a.jpg", None, self.GOOD.answer)]).to_dict("records")
        assert row["probability"] == pytest.approx(100 * max(self.GOOD.answer.probabilities.values()))
        assert set(row) == {many_pictures.PICTURE, *wording.COLUMNS}


@pytest.fixture
def page(server, monkeypatch) -> AppTest:
    monkeypatch.setenv("TORCHSERVE_URL", server.url)
    monkeypatch.setenv("PROMOTER_URL", NOWHERE)
    monkeypatch.setenv("MLFLOW_PUBLIC_URL", "http://mlflow.example:5001")
    st.cache_resource.clear()
    st.cache_data.clear()
    return AppTest.from_file(str(FOLDER / "app.py"), default_timeout=30).run()


def read(page: AppTest, *files: tuple[str, bytes]) -> str:
    """Upload files and return the page's text."""
    page.file_uploader[0].set_value([(name, data, "image/jpeg") for name, data in files]).run()
    return text(page)


def heat_class(page: AppTest):
    """Return the list of classes that the heatmap can explain."""
    return next(box for box in page.selectbox if box.label == wording.HEAT_TARGET)


def text(page: AppTest) -> str:
    assert not page.exception, page.exception
    return "\n".join(block.body for block in page.get("html"))


class TestApp:
    def test_empty(self, page, server):
        assert "Research use only." in text(page)
        assert "A heatmap" in text(page)
        assert server.targets == []

    def test_examples_are_read_by_one_click_and_called_drawn(self, page, server):
        next(button for button in page.button if button.label == "Drawn nevus").click().run()
        assert '<span class="sl-file">drawn_nevus_not_real.jpg' in text(page)
        assert "<b>Drawn, not real.</b>" in text(page)
        next(button for button in page.button if button.label == "Close the examples").click().run()
        assert "Research use only." in text(page)
        next(button for button in page.button if button.label == "Read all three").click().run()
        assert "<b>3</b> read" in text(page)
        assert server.targets == [None] * 3, "the nevus is remembered"

    def test_an_upload_replaces_the_examples(self, page, jpegs):
        next(button for button in page.button if button.label == "Drawn nevus").click().run()
        assert "lesion.jpg" in read(page, ("lesion.jpg", jpegs[0]))
        assert "drawn_nevus" not in text(page)
        assert "not real" not in text(page)

    def test_bytes_decide_and_not_the_file_name(self, page, jpegs):
        files = [(name, jpegs[0]) for name in ("a.jfif", "b.JPE", "photo", "d.gif")]
        blocks = read(page, *files, (HOSTILE, b"no picture"))
        assert "<b>4</b> read" in blocks
        assert "This picture was refused" in blocks
        assert "<img" not in blocks

    def test_a_class_is_requested_once_and_the_slider_sends_nothing(self, page, server, jpegs):
        read(page, ("lesion.jpg", jpegs[0]))
        heat_class(page).set_value("DF").run()
        assert "Evidence for Dermatofibroma" in text(page)
        page.slider[0].set_value(20).run()
        heat_class(page).set_value("").run()
        heat_class(page).set_value("DF").run()
        assert server.targets == [None, "DF"]

    def test_a_class_without_heatmap(self, page, server, jpegs):
        server.refuse_target = "DF"
        read(page, ("lesion.jpg", jpegs[0]))
        heat_class(page).set_value("DF").run()
        assert "There is no heatmap for this class" in text(page)
        assert "not trained on DF" in text(page)
        assert len(page.get("image")) == 2, "the first heatmap stays"

    def test_the_page_shows_what_the_model_server_decoded(self, page, server, monkeypatch):
        """The page decodes no upload: here no decoder could."""
        opened = []
        monkeypatch.setattr(pictures, "open_picture", lambda jpeg: opened.append(jpeg) or HALF_BLUE)
        server.converted = ["colours converted to sRGB"]
        read(page, ("lesion.heic", b"\xff\xd8\xff and no picture"))
        assert opened == [base64.b64decode(PICTURE)]
        assert page.caption[0].value == "Before reading: colours converted to sRGB."
        assert len(page.get("image")) == 2

    def test_a_model_server_that_sends_no_picture(self, page, monkeypatch):
        monkeypatch.setattr(pictures, "open_picture", lambda jpeg: None)
        read(page, ("lesion.jpg", b"\xff\xd8\xff"))
        assert "sent no copy" in page.info[0].value
        assert not page.get("image")

    def test_a_new_model_between_two_requests(self, page, server, jpegs):
        read(page, ("lesion.jpg", jpegs[0]))
        server.version = "4"
        heat_class(page).set_value("DF").run()
        assert "skin_vit version 4" in text(page)
        assert "Evidence for Dermatofibroma" in text(page)

    def test_too_many(self, page, server):
        read(page, *((f"{number}.jpg", b"\xff\xd8\xff%d" % number) for number in range(52)))
        assert page.warning[0].value == "You chose 52 pictures. The page reads the first 50."
        assert len(server.targets) == 50

    def test_camera(self, page, jpegs):
        page.segmented_control[0].set_value("Camera").run()
        page.camera_input[0].upload("photo.jpg", jpegs[0]).run()
        assert "photo.jpg" in text(page)
