"""The page's client and its session of answers.

client: every behaviour of a server gives one answer or one ServingError.
readings: each picture is sent once for each class, to one model; outages are retried.
"""

import threading
import time
from dataclasses import replace

import pytest

from streamlit_app import client, html_blocks, wording
from streamlit_app.answer_schema import PromoterState
from streamlit_app.client import PredictionClient, ServingError
from streamlit_app.readings import Readings, Upload
from tests.fake_torchserve import CLASSES, NOWHERE, TAKES, parse

pytest_plugins = ["tests.fixtures_page"]


@pytest.fixture
def predictions(server) -> PredictionClient:
    return PredictionClient(server.url)


class TestClient:
    def test_nine_probabilities_and_a_heatmap(self, server, jpegs):
        answer = PredictionClient(server.url + "/").predict(jpegs[0])
        assert list(answer.probabilities) == list(CLASSES)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.gradcam.target == answer.ranking[0]
        assert answer.malignancy == pytest.approx(sum(answer.probabilities[code] for code in ("MEL", "BCC", "SCC")))

    def test_the_class_is_sent(self, server, predictions, jpegs):
        assert predictions.predict(jpegs[0], "BCC").gradcam.target == "BCC"
        assert server.targets == ["BCC"]

    def test_a_busy_server_is_retried(self, server, predictions, jpegs):
        server.busy_for = 3
        assert predictions.predict(jpegs[0])
        assert len(server.targets) == 4

    def test_a_dead_worker_is_retried_and_a_failing_model_is_not(self, server, predictions, jpegs):
        server.dies_for = 2
        assert predictions.predict(jpegs[0])
        server.fails_on = jpegs[0]
        with pytest.raises(ServingError, match="The model failed on this request") as caught:
            predictions.predict(jpegs[0])
        assert caught.value.kind == "failed"
        assert len(server.targets) == 4

    @pytest.mark.parametrize(
        ("mode", "kind", "message"),
        [
            ("busy", "busy", "no worker"),
            ("refuse", "refused", "damaged"),
            ("too_large", "refused", "larger than the model server accepts"),
            ("no_model", "no_model", "Model not found"),
            ("broken", "unexpected", r"status 500 \(Worker died"),
            ("redirect", "unexpected", "status 302."),
            ("garbage", "unexpected", "not in schema 1"),
        ],
    )
    def test_every_failure_has_a_kind_and_a_sentence(self, server, predictions, jpegs, mode, kind, message):
        server.mode = mode
        with pytest.raises(ServingError, match=message) as caught:
            predictions.predict(jpegs[0])
        assert caught.value.kind == kind

    def test_timeout(self, server, jpegs):
        server.mode = "hang"
        with pytest.raises(ServingError, match=r"No answer within 0\.2 seconds") as caught:
            PredictionClient(server.url, read_seconds=0.2).predict(jpegs[0])
        assert caught.value.kind == "timeout"

    @pytest.mark.parametrize(
        ("url", "kind", "message"),
        [
            (NOWHERE, "unreachable", "Nothing answers at http://127.0.0.1:9."),
            ("nonsense://", "unexpected", "TORCHSERVE_URL"),
        ],
    )
    def test_wrong_address(self, url, kind, message):
        with pytest.raises(ServingError, match=message) as caught:
            PredictionClient(url).predict(b"x")
        assert caught.value.kind == kind

    def test_proxy_settings_are_ignored(self, predictions, jpegs, monkeypatch):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, NOWHERE)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert predictions.predict(jpegs[0])

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
            *[
                {"model": {"name": "skin_vit", "takes": takes}}
                for takes in ({"age": [0]}, {"age": ["0", "x"]}, {"sex": [1, 2]}, {"site": "head"})
            ],
        ],
    )
    def test_an_answer_in_another_form_is_rejected(self, wrong):
        with pytest.raises(ValueError, match="validation error"):
            parse(**wrong)


class TestStatus:
    def test_services_that_do_not_answer(self, server, predictions):
        assert predictions.is_up()
        assert not PredictionClient(NOWHERE).is_up()
        assert client.promoter_state(NOWHERE) is None
        assert client.promoter_state(server.url) is None, "a 404 is not a promoter"

    @pytest.mark.parametrize(
        ("champion", "serving", "more", "words"),
        [
            ("3", "3", {"settled": True}, "Version 3 is deployed."),
            ("4", "3", {}, "Version 3 is deployed. Version 4 is on its way."),
            (None, None, {"errors": ["MLflow is away."]}, "No model is deployed. MLflow is away."),
            ("4", "3", {"errors": ["…"], "refused": [{"version": "4", "reason": "…", "final": True}]},
             "Version 3 is deployed. Version 4 was refused."),
            ("4", "3", {"errors": ["…"], "refused": [{"version": "4", "reason": "…", "final": False}]},
             "Version 3 is deployed. Version 4 is on its way."),
        ],
    )  # fmt: skip
    def test_deployment_in_words(self, champion, serving, more, words):
        status = {
            "settled": False,
            "desired": {"champion": champion and {"version": champion}},
            "actual": serving and {"serving": {"version": serving}},
        }
        assert wording.deployment(PromoterState.model_validate(status | more)) == words

    def test_a_refused_version_is_shown_with_its_reason(self):
        refused = [{"version": "4", "reason": "Version 4 was refused: stress: <b>"}]
        state = PromoterState.model_validate({"settled": False, "refused": refused})
        assert "Version 4 was refused: stress: &lt;b&gt;" in html_blocks.not_deployed(state.refused)


class TestReadings:
    @pytest.fixture
    def uploads(self, jpegs) -> list[Upload]:
        return [Upload.of(f"{number}.jpg", data) for number, data in enumerate(jpegs)]

    @pytest.fixture
    def forty(self) -> list[Upload]:
        return [Upload.of(f"{number}.jpg", b"\xff\xd8\xff" + bytes([number])) for number in range(40)]

    def test_each_picture_and_class_is_sent_once(self, server, predictions, uploads):
        readings = Readings()
        uploads.append(replace(uploads[0], name="3.jpg"))
        for _ in range(2):
            results = readings.read_all(predictions, uploads)
            assert [r.upload.name for r in results] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
            assert results[0].answer == results[3].answer
            assert readings.answer(predictions, uploads[0], "BCC").gradcam.target == "BCC"
        assert server.targets.count(None) == 3
        assert server.targets.count("BCC") == 1

    def test_refusals_are_remembered(self, server, predictions, uploads):
        readings = Readings()
        uploads.append(Upload.of("notes.jpg", b"no picture"))
        for _ in range(2):
            results = readings.read_all(predictions, uploads)
            assert [r.problem is None for r in results] == [True, True, True, False]
        assert len(server.targets) == 4

    def test_outages_stop_the_batch_and_are_not_remembered(self, server, predictions, forty):
        readings, server.mode = Readings(), "no_model"
        results = readings.read_all(predictions, forty)
        assert {r.problem.kind for r in results if r.problem} == {"no_model"}
        assert len(server.targets) < 20, "every picture is sent to a server without a model"
        server.mode = "ok"
        assert all(r.answer for r in readings.read_all(predictions, forty))

    def test_a_picture_that_fails_does_not_stop_the_others(self, server, predictions, uploads):
        server.fails_on = uploads[0].image
        readings = Readings()
        for number in (1, 2):
            results = readings.read_all(predictions, uploads)
            assert [r.problem and r.problem.kind for r in results] == ["failed", None, None]
            assert len(server.targets) == len(uploads) + number - 1, "only the failed picture is sent again, once"
        assert "<b>2</b> read" in (line := html_blocks.counts(results))
        assert "<b>1</b> not read" in line
        assert "refused" not in line
        assert "This picture was not read" in html_blocks.unread([results[0]])
        server.fails_on = None
        assert all(r.answer for r in readings.read_all(predictions, uploads))

    def test_answers_during_an_outage_are_kept(self, predictions, forty, monkeypatch):
        predict, all_started = PredictionClient.predict, threading.Barrier(4)

        def fail_first(self, image, *rest):
            all_started.wait(30)
            if image == forty[0].image:
                raise ServingError("timeout", "No answer.")
            time.sleep(0.1)
            return predict(self, image, *rest)

        monkeypatch.setattr(PredictionClient, "predict", fail_first)
        results = Readings().read_all(predictions, forty[:4])
        assert [bool(r.answer) for r in results] == [False, True, True, True]
        assert "<b>1</b> not read" in html_blocks.counts(results)

    def test_a_new_model_reads_all_pictures_again(self, server, predictions, uploads):
        readings = Readings()
        readings.read_all(predictions, uploads[:2])
        server.version = "4"
        assert {r.answer.model.version for r in readings.read_all(predictions, uploads) if r.answer} == {"4"}

    def test_the_promoter_announces_a_new_model(self, server, predictions, uploads):
        readings = Readings()
        readings.read_all(predictions, uploads)
        for version in (None, "3", None, "3"):
            readings.announce(version)
            assert readings.model is not None
        readings.announce("4")
        assert readings.model is None
        readings.read_all(predictions, uploads)
        assert len(server.targets) == 6

    def test_a_model_gets_only_the_details_that_it_takes(self, server, predictions, uploads):
        details = {"age": 55, "sex": "female", "site": "palms/soles", "hobby": "x"}
        upload = replace(uploads[0], details=details)
        readings = Readings()
        [without] = readings.read_all(predictions, [upload])
        assert server.details == [{}], "this model takes no details"
        server.takes, server.version = TAKES, "4"
        readings.announce("3")
        readings.announce("4")
        [reading] = readings.read_all(predictions, [upload])
        assert server.details[1:] == [{}, {"age": "55", "sex": "female"}], "this model does not accept that site"
        assert reading.answer.metadata == {"age": "55", "sex": "female", "site": None}
        assert reading.answer.probabilities != without.answer.probabilities
        readings.answer(predictions, upload, "DF")
        assert server.details[-1] == {"age": "55", "sex": "female"}
        # A new model takes less, and the promoter has not announced it.
        server.takes, server.version = {}, "5"
        [reading] = readings.read_all(predictions, [replace(upload, details={"age": 56})])
        assert reading.answer.model.version == "5"
        assert reading.answer.metadata == {}
