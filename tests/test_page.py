"""The page without a browser.

client: one answer or one ServingError for every way a server can behave; nothing else leaks out.
readings: each picture is asked once for each class, by one model; outages are asked again.
utils, cards: what is shown is true to the answer, lines up with the picture, and is harmless whatever came in.
app: reads downwards, and stops with a clear word when it cannot go on.
"""

import csv
import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from streamlit_app import cards, client, utils
from streamlit_app.client import Answer, ServingError, TorchServe
from streamlit_app.readings import Reading, Readings, Upload
from tests.fake_torchserve import CLASSES, TAKES, FakeTorchServe, answer_for

APP = str(Path(__file__).parent.parent / "streamlit_app" / "app.py")
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
HOSTILE = '<img src=x onerror="alert(1)">![x](http://evil.example/y)$a$.jpg'


@pytest.fixture
def server():
    with FakeTorchServe() as fake:
        yield fake


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(client, "BUSY_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def jpegs(drawn_image) -> list[bytes]:
    return [drawn_image("NV", seed) for seed in range(3)]


def answer(image: bytes = b"x", **changes) -> Answer:
    return Answer.model_validate(answer_for(image) | changes)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestClient:
    def test_nine_probabilities_and_a_heatmap(self, server, jpegs):
        got = TorchServe(server.url + "/").predict(jpegs[0])
        assert list(got.probabilities) == list(CLASSES)
        assert sum(got.probabilities.values()) == pytest.approx(1)
        assert got.gradcam.target == got.ranking[0]
        assert got.malignancy == pytest.approx(sum(got.probabilities[code] for code in ("MEL", "BCC", "SCC")))

    def test_wanted_class_goes_along_as_a_form_field(self, server, jpegs):
        assert TorchServe(server.url).predict(jpegs[0], "BCC").gradcam.target == "BCC"
        assert server.asked == ["BCC"]

    def test_busy_for_a_moment_is_not_noticed(self, server, jpegs, quick):
        server.busy_for = 3
        assert TorchServe(server.url).predict(jpegs[0])
        assert len(server.asked) == 4

    def test_a_worker_that_dies_is_not_noticed_and_a_model_that_fails_is_not_asked_again(self, server, jpegs, quick):
        server.dies_for = 2
        assert TorchServe(server.url).predict(jpegs[0])
        server.fails_on = jpegs[0]
        with pytest.raises(ServingError, match="The model failed on this request") as caught:
            TorchServe(server.url).predict(jpegs[0])
        assert caught.value.kind == "failed"
        assert len(server.asked) == 4

    @pytest.mark.parametrize(
        ("mode", "kind", "words"),
        [
            ("busy", "busy", "no worker"),
            ("refuse", "refused", "damaged"),
            ("too_large", "refused", "larger than the model server accepts"),
            ("no_model", "no_model", "Model not found"),
            ("broken", "unexpected", "status 500. Worker died."),
            ("redirect", "unexpected", "status 302"),
            ("garbage", "unexpected", "not in the form"),
        ],
    )
    def test_every_failure_has_a_kind_and_a_sentence(self, server, jpegs, quick, mode, kind, words):
        server.mode = mode
        with pytest.raises(ServingError, match=words) as caught:
            TorchServe(server.url).predict(jpegs[0])
        assert caught.value.kind == kind

    def test_time_out(self, server, jpegs):
        server.mode = "hang"
        with pytest.raises(ServingError, match=r"No answer within 0\.2 seconds") as caught:
            TorchServe(server.url, read_seconds=0.2).predict(jpegs[0])
        assert caught.value.kind == "timeout"

    def test_nobody_there(self, jpegs):
        with pytest.raises(ServingError, match="Nothing answers at http://127.0.0.1:9") as caught:
            TorchServe(NOWHERE).predict(jpegs[0])
        assert caught.value.kind == "unreachable"

    def test_bad_address(self, jpegs):
        with pytest.raises(ServingError, match="TORCHSERVE_URL"):
            TorchServe("nonsense://").predict(jpegs[0])

    def test_proxy_settings_do_not_reach_neighbours(self, server, jpegs, monkeypatch):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, NOWHERE)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert TorchServe(server.url).predict(jpegs[0])

    def test_ping(self, server):
        assert TorchServe(server.url).is_up()
        assert not TorchServe(NOWHERE).is_up()

    def test_no_promoter_is_no_trouble(self, server):
        assert client.promotion(NOWHERE) is None
        assert client.promotion(server.url) is None, "a 404 is no promoter"

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            ({"settled": True, "desired": {"champion": {"version": "3"}}, "actual": {"serving": {"version": "3"}}},
             "version 3 is served"),
            ({"settled": False, "desired": {"champion": {"version": "4"}}, "actual": {"serving": {"version": "3"}}},
             "version 3 is served, version 4 is on its way"),
            ({"settled": False, "desired": {"champion": None}, "actual": None, "errors": ["MLflow is away."]},
             "no model is served; MLflow is away."),
            ({"settled": False, "desired": {"champion": {"version": "4"}}, "actual": {"serving": {"version": "3"}},
              "errors": ["…"], "refused": [{"version": "4", "reason": "…", "final": True}]},
             "version 3 is served, version 4 was refused"),
            ({"settled": False, "desired": {"champion": {"version": "4"}}, "actual": {"serving": {"version": "3"}},
              "errors": ["…"], "refused": [{"version": "4", "reason": "…", "final": False}]},
             "version 3 is served, version 4 is on its way"),
        ],
    )  # fmt: skip
    def test_promoter_in_words(self, status, words):
        assert client.Promotion.model_validate(status).words == words

    def test_a_refused_version_is_shown_with_its_reason(self):
        shown = cards.not_served([client.Refusal(version="4", reason="Version 4 was refused: stress: <b>")])
        assert "Not served" in shown
        assert "Version 4 was refused: stress: &lt;b&gt;" in shown
        assert cards.not_served([]) == ""

    @pytest.mark.parametrize(
        "wrong",
        [
            {"schema": 2},
            {"probabilities": {"MEL": 1.2, "NV": 0.0}},
            {"probabilities": {"MEL": float("nan"), "NV": 0.5}},
            {"probabilities": {"MEL": 0.5, "XYZ": 0.5}},
            {"uncertainty": {"entropy": None}},
            {"gradcam": None},
            {"gradcam": {"target": "MEL", "grid": [[0.1, 0.2], [0.3]]}},
            {"gradcam": {"target": "MEL", "grid": []}},
            {"gradcam": {"target": "MEL", "grid": [[7.0]]}},
            {"gradcam": {"target": "XYZ", "grid": [[0.5]]}},
        ],
    )
    def test_an_answer_in_another_form_is_not_believed(self, wrong):
        with pytest.raises(ValueError, match="validation error"):
            answer(**wrong)


class TestReadings:
    def uploads(self, jpegs) -> list[Upload]:
        return [Upload.of(f"{i}.jpg", data) for i, data in enumerate(jpegs)]

    def test_each_picture_and_class_once(self, server, jpegs):
        readings, torchserve = Readings(), TorchServe(server.url)
        uploads = self.uploads([*jpegs, jpegs[0]])
        for _ in range(2):
            results = readings.ask_all(torchserve, uploads)
            assert [r.upload.name for r in results] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
            assert results[0].answer == results[3].answer
            assert readings.ask(torchserve, uploads[0], "BCC").gradcam.target == "BCC"
        assert server.asked.count(None) == 3
        assert server.asked.count("BCC") == 1

    def test_refusals_are_remembered(self, server, jpegs):
        readings, uploads = Readings(), [*self.uploads(jpegs), Upload.of("notes.jpg", b"no picture")]
        for _ in range(2):
            results = readings.ask_all(TorchServe(server.url), uploads)
            assert [r.problem is None for r in results] == [True, True, True, False]
        assert len(server.asked) == 4

    def test_outages_are_not_remembered_and_stop_the_batch(self, server, drawn_image, quick):
        uploads = [Upload.of(f"{i}.jpg", b"\xff\xd8\xff" + bytes([i])) for i in range(40)]
        readings, server.mode = Readings(), "no_model"
        results = readings.ask_all(TorchServe(server.url), uploads)
        assert {r.problem.kind for r in results if r.problem} == {"no_model"}
        assert len(server.asked) < 20, "a server that is away is asked for every single picture"
        server.mode = "ok"
        assert all(r.answer for r in readings.ask_all(TorchServe(server.url), uploads))

    def test_one_picture_that_fails_costs_the_others_nothing(self, server, jpegs, quick):
        server.fails_on = jpegs[0]
        readings, uploads = Readings(), self.uploads(jpegs)
        for number in (1, 2):
            results = readings.ask_all(TorchServe(server.url), uploads)
            assert [r.problem and r.problem.kind for r in results] == ["failed", None, None]
            assert len(server.asked) == len(jpegs) + number - 1, "it alone is asked again, once"
        assert "<b>2</b> read" in (line := cards.counts(results))
        assert "<b>1</b> not read" in line
        assert "refused" not in line
        assert "This picture was not read" in cards.refused([results[0]])
        server.fails_on = None
        assert all(r.answer for r in readings.ask_all(TorchServe(server.url), uploads))

    def test_what_was_answered_before_an_outage_is_kept(self, server, drawn_image, quick, monkeypatch):
        uploads = [Upload.of(f"{i}.jpg", b"\xff\xd8\xff" + bytes([i])) for i in range(4)]
        real = TorchServe.predict

        def predict(self, image, *rest):
            if image == uploads[0].image:
                raise ServingError("timeout", "No answer.")
            time.sleep(0.2)  # under way when the outage shows
            return real(self, image, *rest)

        monkeypatch.setattr(TorchServe, "predict", predict)
        results = Readings().ask_all(TorchServe(server.url), uploads)
        assert [bool(r.answer) for r in results] == [False, True, True, True]
        assert "<b>3</b> read" in (line := cards.counts(results))
        assert "<b>1</b> not read" in line

    def test_a_new_model_reads_everything_anew(self, server, jpegs):
        readings, torchserve, uploads = Readings(), TorchServe(server.url), self.uploads(jpegs)
        readings.ask_all(torchserve, uploads[:2])
        server.version = "4"
        assert {r.answer.model.version for r in readings.ask_all(torchserve, uploads) if r.answer} == {"4"}

    def test_the_promoters_word_is_enough(self, server, jpegs):
        readings, torchserve, uploads = Readings(), TorchServe(server.url), self.uploads(jpegs)
        readings.ask_all(torchserve, uploads)
        for word in (None, "3", None, "3"):
            readings.announce(word)
            assert readings.model is not None
        readings.announce("4")
        assert readings.model is None
        readings.ask_all(torchserve, uploads)
        assert len(server.asked) == 6

    def test_a_model_is_told_only_what_it_takes(self, server, jpegs):
        torchserve, told = TorchServe(server.url), {"age": 55, "sex": "female", "site": "palms/soles", "hobby": "x"}
        uploads = [replace(upload, told=told) for upload in self.uploads(jpegs[:1])]
        readings = Readings()
        [alone] = readings.ask_all(torchserve, uploads)
        assert server.told == [{}], "it has said of nothing that it takes it"
        server.takes, server.version = TAKES, "4"
        readings.announce("3")
        readings.announce("4")
        [reading] = readings.ask_all(torchserve, uploads)
        assert server.told[1:] == [{}, {"age": "55", "sex": "female"}], "it does not know that site"
        assert reading.answer.metadata == {"age": "55", "sex": "female", "site": None}
        assert reading.answer.probabilities != alone.answer.probabilities
        readings.ask(torchserve, uploads[0], "DF")
        assert server.told[-1] == {"age": "55", "sex": "female"}
        # The model is changed, nobody says so, and the new one takes less.
        server.takes, server.version = {}, "5"
        [reading] = readings.ask_all(torchserve, [replace(uploads[0], told={"age": 56})])
        assert reading.answer.model.version == "5"
        assert reading.answer.metadata == {}

    @pytest.mark.parametrize("takes", [{"age": [0]}, {"age": ["0", "x"]}, {"sex": [1, 2]}, {"site": "head"}])
    def test_fields_that_cannot_be_drawn_are_no_answer(self, takes):
        with pytest.raises(ValueError, match="takes"):
            answer(model={"name": "skin_vit", "takes": takes})


class TestPictures:
    def test_heat_lies_where_the_grid_says(self):
        grey = Image.new("RGB", (300, 100), (128, 128, 128))
        grid = np.zeros((4, 4))
        grid[0, 3] = 1  # the top right of sixteen
        change = np.abs(np.asarray(utils.heat_overlay(grey, grid.tolist(), 0.8), float) - 128).sum(2)
        assert change[:25, 225:].mean() > 40
        assert change[50:].max() == 0
        assert change[:, :140].max() == 0

    def test_opacity(self):
        picture = Image.effect_noise((60, 40), 50).convert("RGB")
        grid = [[0.0, 0.5], [0.5, 1.0]]
        assert utils.heat_overlay(picture, grid, 0).tobytes() == picture.tobytes()
        distance = [
            np.abs(np.asarray(utils.heat_overlay(picture, grid, o), float) - np.asarray(picture)).mean()
            for o in (0.2, 0.5, 1)
        ]
        assert distance == sorted(distance)
        assert distance[0] > 0

    def test_turned_as_the_camera_says(self):
        wide = Image.new("RGB", (80, 40), "red")
        wide.paste("blue", (0, 0, 20, 40))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: the left side belongs on top
        shown = utils.open_picture(encode(wide, "JPEG", exif=exif, quality=95))
        assert shown is not None
        assert shown.size == (40, 80)
        assert shown.getpixel((20, 5))[2] > 200

    def test_large_pictures_are_shown_smaller(self):
        shown = utils.open_picture(encode(Image.new("RGB", (4000, 3000)), "JPEG"))
        assert shown is not None
        assert shown.size == (1000, 750)

    def test_transparency_is_white_and_16_bits_are_8(self):
        clear = utils.open_picture(encode(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG"))
        deep = utils.open_picture(encode(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), "PNG"))
        assert clear is not None
        assert clear.getpixel((3, 3)) == (255, 255, 255)
        assert deep is not None
        assert deep.getpixel((3, 3)) == (155, 155, 155)

    @pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
    def test_what_is_no_picture_is_not_shown(self, data):
        assert utils.open_picture(data) is None

    def test_a_decompression_bomb_is_not_decoded(self):
        bomb = encode(Image.new("1", (7200, 7200)), "PNG")
        assert len(bomb) < 200_000
        assert utils.open_picture(bomb) is None


class TestWords:
    def test_percent_never_rounds_to_certainty(self):
        shown = [utils.percent(p) for p in (0, 0.0004, 0.004, 0.0996, 0.714, 0.986, 0.9996, 1)]
        assert shown == ["0.0 %", "< 0.1 %", "0.4 %", "10.0 %", "71 %", "98.6 %", "> 99.9 %", "100.0 %"]

    @pytest.mark.parametrize(("entropy", "word"), [(0.1, "decided"), (0.8, "hesitant"), (1.8, "unsure")])
    def test_certainty(self, entropy, word):
        assert utils.certainty(answer(uncertainty={"entropy": entropy}))[0] == word

    def test_unknown_on_top_is_never_called_benign(self):
        lost = answer(probabilities=dict.fromkeys(CLASSES, 0.05) | {"UNK": 0.6})
        assert utils.certainty(lost)[0] == "lost"
        text = cards.verdict(lost, "x.jpg")
        assert "No known class" in text
        assert "Not malignant" not in text

    def test_what_counts_as_malignant_is_named_and_a_precursor_too(self):
        ak = answer(probabilities=dict.fromkeys(CLASSES, 0.05) | {"AK": 0.6})
        shown = cards.verdict(ak, "x.jpg")
        assert "(MEL, BCC, SCC)" in shown
        assert "Precancerous" in shown
        assert "Not malignant" not in shown

    def test_the_likely_classes_are_told_with_their_level(self):
        def shown(chosen, level=0.9):
            return cards.uncertainty(
                answer(uncertainty={"entropy": 1, "conformal_set": chosen, "confidence_level": level})
            )

        assert "made to hold the right class 90 times in 100" in shown(["MEL", "NV"])
        assert "made to hold the right class 95 times in 100" in shown(["MEL"], 0.95)
        assert "The likely classes" not in shown(None, None)

    def test_figure_marks_malignant_in_colour_and_words(self):
        given = answer()
        track, bars = utils.probability_figure(given).data
        assert len(bars.x) == 9
        assert list(bars.x) == sorted(given.probabilities.values(), reverse=True)
        for label, colour, code in zip(bars.y, bars.marker.color, given.ranking, strict=True):
            assert ("· malignant" in label) == given.classes[code].malignant == (colour == utils.COLOURS["malignant"])
        assert all(
            given.classes[code].description[:20] in text
            for code, text in zip(given.ranking, track.hovertext, strict=True)
        )

    def test_links_to_mlflow(self):
        text = cards.provenance(answer(), "http://mlflow.example:5001/")
        assert 'href="http://mlflow.example:5001/#/runs/0123456789abcdef0123456789abcdef"' in text
        assert 'href="http://mlflow.example:5001/#/models/skin_vit/versions/3"' in text
        alone = answer(model={"name": "skin_vit"})
        assert "href" not in cards.provenance(alone, "http://mlflow.example:5001")

    def test_nothing_from_outside_becomes_html(self):
        evil = {"name": HOSTILE, "malignant": True, "description": HOSTILE}
        given = answer(
            classes=dict.fromkeys(CLASSES, evil),
            model={"name": HOSTILE, "version": HOSTILE, "architecture": HOSTILE, "digest": HOSTILE, "run_id": HOSTILE},
            uncertainty={"entropy": 1, "conformal_set": ["MEL"], "confidence_level": 0.9},
        )
        problem = Reading(Upload.of(HOSTILE, b""), problem=ServingError("refused", HOSTILE))
        pieces = [
            cards.verdict(given, HOSTILE), cards.uncertainty(given), cards.glossary(given),
            cards.provenance(given, "http://127.0.0.1"), cards.outage(ServingError("busy", HOSTILE)),
            cards.refused([problem]), cards.services([(HOSTILE, True, HOSTILE)]),
            str(utils.probability_figure(given).data[0].hovertext), str(utils.probability_figure(given).data[0].y),
        ]  # fmt: skip
        assert not [piece for piece in pieces if "<img" in piece]


class TestTable:
    def readings(self) -> list[Reading]:
        good = Reading(Upload.of('=HYPERLINK("http://evil.example")', b"1"), answer(b"1"))
        return [good, Reading(Upload.of("ä,\n.jpg", b"2"), problem=ServingError("refused", "@SUM(1)"))]

    def test_csv_holds_everything_and_no_formula(self):
        first, second = csv.DictReader(io.StringIO(utils.to_csv(self.readings())))
        assert {code: float(first[code]) for code in CLASSES} == answer(b"1").probabilities
        assert first["file"].startswith("'=")
        assert (first["version"], first["problem"]) == ("3", "")
        assert (second["file"], second["problem"], second["MEL"]) == ("ä,\n.jpg", "'@SUM(1)", "")
        assert "age" not in first

    def test_csv_says_what_the_model_was_told(self):
        told = Answer.model_validate(answer_for(b"1", takes=TAKES, told={"age": "55"}))
        [row] = csv.DictReader(io.StringIO(utils.to_csv([Reading(Upload.of("a", b"1"), told)])))
        assert (row["age"], row["sex"], row["site"]) == ("55", "", "")

    def test_csv_of_refusals_alone(self):
        [row] = csv.DictReader(io.StringIO(utils.to_csv(self.readings()[1:])))
        assert row["problem"] == "'@SUM(1)"

    def test_overview(self):
        table = utils.overview(self.readings()[:1], [None])
        assert table.loc[0, "Probability"] == pytest.approx(100 * max(answer(b"1").probabilities.values()))


@pytest.fixture
def page(server, monkeypatch, quick) -> AppTest:
    monkeypatch.setenv("TORCHSERVE_URL", server.url)
    monkeypatch.setenv("PROMOTER_URL", NOWHERE)
    monkeypatch.setenv("MLFLOW_PUBLIC_URL", "http://mlflow.example:5001")
    return AppTest.from_file(APP, default_timeout=30)


def text(page: AppTest) -> str:
    assert not page.exception, page.exception
    return "\n".join(html.body for html in page.get("html"))


class TestApp:
    def test_empty(self, page, server):
        page.run()
        assert "Research use only." in text(page)
        assert "A heatmap" in text(page)
        assert server.asked == []

    def test_one_picture(self, page, server, jpegs):
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        top = answer_for(jpegs[0])["prediction"]
        assert f"<h2>{top['name']}" in text(page)
        assert f"Evidence for {top['name']}" in text(page)
        assert "made to hold the right class 90 times in 100" in text(page)
        assert "malignant lesions, too, get benign names" in text(page)
        assert "mlflow.example:5001/#/runs/" in text(page)
        assert len(page.get("plotly_chart")) == 1
        assert len(page.get("image")) == 2
        assert not page.dataframe
        assert server.asked == [None]

    def test_the_class_is_asked_once_and_the_slider_asks_nobody(self, page, server, jpegs):
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        page.selectbox[0].set_value("DF").run()
        assert "Evidence for Dermatofibroma" in text(page)
        page.slider[0].set_value(20).run()
        page.selectbox[0].set_value("").run()
        page.selectbox[0].set_value("DF").run()
        assert server.asked == [None, "DF"]

    def test_a_class_that_cannot_be_explained(self, page, server, jpegs):
        server.refuse_target = "DF"
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        page.selectbox[0].set_value("DF").run()
        assert "This class cannot be explained" in text(page)
        assert "not trained on DF" in text(page)
        assert len(page.get("image")) == 2, "the first heatmap stays"

    def test_many(self, page, jpegs):
        page.run().file_uploader[0].set_value([(f"{i}.jpg", data, "image/jpeg") for i, data in enumerate(jpegs)]).run()
        assert list(page.dataframe[0].value["File"]) == ["0.jpg", "1.jpg", "2.jpg"]
        assert "<b>3</b> read" in text(page)
        assert '<span class="sl-file">0.jpg' in text(page)
        assert len(page.get("download_button")) == 1

    def test_refused_beside_read(self, page, jpegs):
        files = [("good.jpg", jpegs[0], "image/jpeg"), (HOSTILE, b"no picture", "image/jpeg")]
        page.run().file_uploader[0].set_value(files).run()
        assert "This picture was refused" in text(page)
        assert "This is not a JPEG or PNG image." in text(page)
        assert '<span class="sl-file">good.jpg' in text(page)
        assert "<img" not in text(page)

    def test_a_refused_picture_is_never_decoded(self, page, server, jpegs, monkeypatch):
        def never(data: bytes) -> None:
            raise AssertionError("decoded")

        server.mode = "refuse"
        monkeypatch.setattr(utils, "open_picture", never)
        page.run().file_uploader[0].set_value(("bomb.jpg", jpegs[1] + b"refused", "image/jpeg")).run()
        assert "This picture was refused" in text(page)

    @pytest.mark.parametrize(
        ("mode", "headline"),
        [
            ("no_model", "No model is being served yet"),
            ("busy", "The model server is busy"),
            ("garbage", "gave an answer this page does not understand"),
        ],
    )
    def test_outage_and_try_again(self, page, server, jpegs, mode, headline):
        server.mode = mode
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        assert headline in text(page)
        assert not page.get("image")
        server.mode = "ok"
        page.button[0].click().run()
        assert headline not in text(page)
        assert "<h2>" in text(page)

    def test_server_away(self, page, jpegs, monkeypatch):
        monkeypatch.setenv("TORCHSERVE_URL", NOWHERE)
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        assert "The model server is away" in text(page)
        assert "does not answer" in text(page)

    def test_a_new_model_between_two_questions(self, page, server, jpegs):
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        server.version = "4"
        page.selectbox[0].set_value("DF").run()
        assert "skin_vit version 4" in text(page)
        assert "Evidence for Dermatofibroma" in text(page)

    def test_no_fields_for_a_model_that_takes_nothing(self, page, jpegs):
        page.run().file_uploader[0].set_value(("lesion.jpg", jpegs[0], "image/jpeg")).run()
        assert "What is known of the patient" not in text(page)
        assert not page.number_input

    def test_what_is_filled_in_is_used(self, page, server, jpegs):
        server.takes = TAKES
        files = [(f"{i}.jpg", data, "image/jpeg") for i, data in enumerate(jpegs[:2])]
        page.run().file_uploader[0].set_value(files).run()
        assert "What is known of the patient" in text(page)
        sex, site = (page.selectbox[place] for place in (0, 1))
        assert (sex.label, sex.options, site.label) == ("Sex", ["not known", "female", "male"], "Site")
        before = text(page)
        page.number_input[0].set_value(71).run()
        page.selectbox[1].set_value("head/neck").run()
        assert server.told == [{}, {}, {"age": "71"}, {"age": "71", "site": "head/neck"}], "the other picture is not"
        told = answer_for(jpegs[0], takes=TAKES, told=server.told[-1])
        assert f"<h2>{told['prediction']['name']}" in text(page)
        assert f"Evidence for {told['prediction']['name']}" in text(page)
        assert text(page) != before
        assert (page.number_input[0].value, page.selectbox[1].value) == (71, "head/neck")
        page.number_input[0].set_value(None).run()
        page.selectbox[1].set_value("").run()
        assert text(page) == before
        assert len(server.told) == 5, "what was asked already is remembered"

    def test_too_many(self, page, monkeypatch, server):
        files = [(f"{i}.jpg", b"\xff\xd8\xff%d" % i, "image/jpeg") for i in range(52)]
        page.run().file_uploader[0].set_value(files).run()
        assert "52 pictures; the first 50 are read" in page.warning[0].value
        assert len(server.asked) == 50

    def test_camera(self, page, jpegs):
        page.run().segmented_control[0].set_value("Camera").run()
        page.camera_input[0].upload("photo.jpg", jpegs[0]).run()
        assert "photo.jpg" in text(page)
