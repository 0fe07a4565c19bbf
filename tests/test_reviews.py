"""Reviews: the queue, what readings say together, exactly-once appends, and settled pictures in the figures."""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.kept_images import delete, kept_path
from handlers.taxonomy import CODES
from monitoring.corrections import judged_answers, settled
from monitoring.monitor import DAY, Monitor
from monitoring.monitor_service import create_app
from monitoring.outcomes import PictureOutcome, record
from monitoring.performance import RealisedPerformance
from monitoring.reviews import (
    ADJUDICATION,
    BAD_PICTURE,
    CANNOT_TELL,
    READING,
    VERDICTS,
    NewReading,
    ReviewRefused,
    in_random_share,
    record_reading,
    standing,
)
from monitoring.tables import readings
from tests.monitored_log import NOW
from tests.review_world import SHARE, ReviewedMonitor, names, order, sha
from tests.waiting import eventually


@pytest.fixture
def world(tmp_path) -> ReviewedMonitor:
    return ReviewedMonitor(tmp_path)


def count(world) -> int:
    with world.store.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(readings)).scalar()


def test_the_random_share_is_a_fixed_part_of_all_pictures():
    share = [in_random_share(sha(str(number)), SHARE) for number in range(5000)]
    assert 0.18 < sum(share) / len(share) < 0.22
    assert not any(in_random_share(sha(str(number)), 0) for number in range(100))
    assert all(in_random_share(sha(str(number)), 1) for number in range(100))
    assert not in_random_share("no hash", 1)


def test_useful_pictures_come_first_and_the_random_share_in_its_own_turn(world):
    chance, useful = names(3, True), names(6, False)
    world.answer(chance, entropy=2.1, flagged=True)
    world.answer(useful[:2], entropy=0.1)
    world.answer(useful[2:3], flagged=True, entropy=0.1)
    world.answer(useful[3:4], entropy=1.5, set=list(CODES))
    world.answer(useful[4:6], entropy=0.1)
    world.answer(useful[4:5], version="2", code="MEL", seconds=NOW - 30, entropy=0.1)
    queue = world.queue()
    pairs = order(queue, world, "ada", 20)
    reasons = [reason for _, reason in pairs]
    assert reasons.count("random") == 3, "each picture once"
    assert len(pairs) == 9
    assert reasons[0] == reasons[5] == "random", "one in five of a reader's readings"
    rest = [request for request, reason in pairs if reason != "random"]
    assert rest[:3] == [f"2-{useful[4]}", f"1-{useful[3]}", f"1-{useful[2]}"]
    assert [reason for _, reason in pairs if reason != "random"][:3] == ["disagreement", "uncertain", "alarmed"]
    taken = [request for request, reason in pairs if reason == "random"]
    assert taken == sorted(taken, key=lambda request: sha(request.partition("-")[2])), "never by usefulness"


def test_only_kept_pictures_with_a_prediction_are_queued(world):
    first, second = names(2, False)
    world.answer([first, second])
    delete(world.settings.kept_images_folder, sha(first))
    kept_path(world.settings.kept_images_folder, "f" * 64).write_bytes(b"")
    assert [request for request, _ in order(world.queue(), world, "ada", 5)] == [f"1-{second}"]


def test_two_readers_get_different_pictures_then_each_others(world):
    world.answer(names(2, False))
    queue = world.queue()
    ada, ben = queue.next_picture("ada", READING), queue.next_picture("ben", READING)
    assert ada["image_sha256"] != ben["image_sha256"]
    assert queue.next_picture("ada", READING) == ada, "a page that is loaded again shows the same picture"
    for picture, reader in ((ada, "ada"), (ben, "ben")):
        world.read(picture["request_id"][2:], reader, "NV")
    assert queue.next_picture("ada", READING)["image_sha256"] == ben["image_sha256"], "a second opinion"
    world.read(ben["request_id"][2:], "ada", "NV")
    assert queue.next_picture("ada", READING) is None
    assert queue.next_picture("cleo", READING)["image_sha256"] == ada["image_sha256"], "two readers are enough"


def test_a_dispute_is_kept_and_adjudicated(world):
    [name] = names(1, False)
    world.answer([name])
    with pytest.raises(ReviewRefused, match="not disputed"):
        world.read(name, "cleo", "NV", ADJUDICATION)
    world.read(name, "ada", "MEL")
    assert [item.diagnosis for item in settled(world.store, SHARE)] == ["MEL"]
    world.read(name, "ben", "NV")
    assert settled(world.store, SHARE) == []
    queue = world.queue()
    assert queue.next_picture("cleo", READING) is None
    picture = queue.next_picture("cleo", ADJUDICATION)
    assert {reading["reader"]: reading["verdict"] for reading in picture["readings"]} == {"ada": "MEL", "ben": "NV"}
    assert queue.status("cleo")["disputed"] == 1
    number = world.read(name, "cleo", "BCC", ADJUDICATION)
    [correction] = settled(world.store, SHARE)
    assert (correction.diagnosis, correction.source, correction.readers) == ("BCC", "adjudication", ("cleo",))
    assert (correction.ids, correction.version, correction.digest) == ((f"reading-{number}",), "1", "sha256:1")
    assert count(world) == 3, "nothing is replaced"
    with pytest.raises(ReviewRefused, match="not disputed any more"):
        world.read(name, "dora", "MEL", ADJUDICATION)


@pytest.mark.parametrize("verdict", [CANNOT_TELL, BAD_PICTURE])
def test_a_picture_without_a_verdict_leaves_the_queue_unsettled(world, verdict):
    [name] = names(1, False)
    world.answer([name])
    world.read(name, "ada", verdict)
    assert settled(world.store, SHARE) == []
    assert world.queue().next_picture("ben", READING) is None
    assert world.queue().status("ben")["closed"] == 1


READERS, KINDS = st.sampled_from(["ada", "ben", "cleo"]), st.sampled_from([READING, ADJUDICATION])
ROWS = st.lists(st.tuples(READERS, st.sampled_from(VERDICTS), KINDS), min_size=1, max_size=6)


@given(ROWS)
def test_standing_for_any_readings(triples):
    rows = [dict(zip(("reader", "verdict", "kind"), triple, strict=True)) for triple in triples]
    result = standing(rows)
    adjudicated = [row for row in rows if row["kind"] == ADJUDICATION]
    newest = adjudicated[-1:] or list({row["reader"]: row for row in rows}.values())
    verdicts = {row["verdict"] for row in newest}
    assert (result.state == "disputed") == (len(verdicts) > 1)
    assert (result.state == "settled") == (len(verdicts) == 1 and verdicts <= set(CODES))
    assert result.verdict in {*verdicts, ""}
    assert set(map(id, result.rows)) <= set(map(id, rows))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_a_submission_counts_once_however_often_it_is_sent(world, order):
    [name] = names(1, False)
    if not world.queue().status("x")["kept"]:
        world.answer([name])
    before, keys = count(world), [str(uuid.uuid4()) for _ in range(5)]
    numbers = {world.read(name, f"reader {index}", "NV", submission=keys[index]) for index in order}
    assert count(world) - before == len(numbers) == len(set(order))


def test_submissions_at_the_same_time_count_once(world):
    [name] = names(1, False)
    world.answer([name])
    reading = NewReading("0" * 32, READING, "ada", sha(name), f"1-{name}", "NV", "NV")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: record_reading(world.store, reading, "uncertain"), range(16)))
    assert len({number for number, _ in results}) == count(world) == 1
    assert sum(is_new for _, is_new in results) == 1


def test_settled_pictures_count_next_to_outcomes_each_once(world):
    """Pathology wins over readers; a later version's answers count for the random share only."""
    chance, [first, second, third] = names(1, True), names(3, False)
    world.answer([*chance, first, second, third])
    for name in (*chance, first, second):
        world.read(name, "ada", "NV")
    world.read(third, "ada", CANNOT_TELL)
    record(world.store, [PictureOutcome(sha(second), "MEL"), PictureOutcome(sha(third), "BCC")], "lab")
    rows = {row["image_sha256"]: row["diagnosis"] for row in judged_answers(world.store, "1")}
    assert rows == {sha(chance[0]): "NV", sha(first): "NV", sha(second): "MEL", sha(third): "BCC"}
    assert len(judged_answers(world.store, None)) == 4
    world.answer([*chance, first], version="2", seconds=time.time() + 60)  # NOW may be long ago
    assert [row["image_sha256"] for row in judged_answers(world.store, "2")] == [sha(chance[0])]
    assert [item.is_random for item in settled(world.store, SHARE) if item.image_sha256 == sha(chance[0])] == [True]
    assert {item.image_sha256: item.source for item in settled(world.store, SHARE)}[sha(second)] == "outcome"

    realised = RealisedPerformance(world.store)
    assert (realised.of("1")["outcomes"], realised.of("1")["accuracy"]) == (4, 0.5)
    honest = realised.of("1", sampled_only=True)
    assert (honest["outcomes"], honest["accuracy"], honest["sampled"], honest["readings"]) == (1, 1.0, 1, 4)
    world.store.forget(sha(first))
    assert realised.of("1")["outcomes"] == 3, "a forgotten picture counts no more"


def test_the_share_of_readings_that_changed_to_the_model_is_shown(world):
    pictures = names(4, False)
    world.answer(pictures, code="MEL")
    for name, before, after in zip(pictures, ("NV", "NV", "MEL", "NV"), ("MEL", "NV", "MEL", "BCC"), strict=True):
        world.read(name, "ada", after, first_opinion=before)
    assert RealisedPerformance(world.store).of(None, sampled_only=True)["changed_to_model"] == 0.25


def test_a_reading_outlives_its_prediction(world):
    [name] = names(1, False)
    world.answer([name])
    world.read(name, "ada", "NV")
    world.store.prune(NOW + DAY)
    assert [row["diagnosis"] for row in judged_answers(world.store, None)] == ["NV"]
    world.read(name, "ben", "NV")  # whose page was open
    assert settled(world.store, SHARE)[0].readers == ("ada", "ben")


@pytest.fixture
def client(world):
    with TestClient(create_app(Monitor(world.settings)), base_url="http://127.0.0.1") as client:
        eventually(lambda: client.get("/health").json()["database_up"])
        yield client


def submission(name: str, **fields) -> dict:
    return {
        "submission": str(uuid.uuid4()), "reader": "Zoë", "image_sha256": sha(name), "request_id": f"1-{name}",
        "first_opinion": "NV", "verdict": "MEL",
    } | fields  # fmt: skip


def test_a_review_over_http(world, client):
    [name] = names(1, False)
    world.answer([name], jpeg=b"\xff\xd8\xffpixels")
    eventually(lambda: client.get("/reviews/next", params={"reader": "Zoë"}).json()["picture"])
    picture = client.get("/reviews/next", params={"reader": "Zoë"}).json()["picture"]
    assert picture["image_sha256"] == sha(name)
    assert set(picture["probabilities"]) == set(CODES)
    answer = client.get(f"/reviews/{sha(name)}/picture")
    assert (answer.content, answer.headers["Content-Type"]) == (b"\xff\xd8\xffpixels", "image/jpeg")
    body = submission(name)
    assert client.post("/reviews", json=body).json()["new"] is True
    assert client.post("/reviews", json=body).json()["new"] is False
    status = client.get("/reviews/status", params={"reader": "Zoë"}).json()
    assert (status["mine"], status["settled"], status["waiting"], status["keep_days"]) == (1, 1, 0, 30)
    gone = client.post("/reviews", json=submission(name, request_id="other"))
    assert (gone.status_code, gone.json()["error"]["code"]) == (409, "not_recorded")
    assert client.get(f"/reviews/{'0' * 64}/picture").status_code == 404
    figures = client.get("/summary").json()["performance"]
    assert (figures["realised"]["accuracy"], figures["realised_random"]["outcomes"]) == (0.0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"verdict": "mole"}, {"reader": ""}, {"reader": "x" * 101}, {"reader": "a\0b"}, {"image_sha256": "../x"},
        {"submission": "short"}, {"more": 1}, {"kind": "vote"}, {"request_id": "\ud800"}, {"reader": "\ud800"},
    ],
)  # fmt: skip
def test_wrong_readings_are_refused(world, client, fields):
    answer = client.post(
        "/reviews", content=json.dumps(submission("x", **fields)), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert count(world) == 0


def test_only_short_requests_of_neighbours_reach_reviews(client):
    ask = "/reviews/status?reader=x"
    assert client.get(ask, headers={"Host": "rebound.example.org"}).status_code == 403
    assert client.get(ask, headers={"Origin": "http://127.0.0.1:8501"}).status_code == 403
    assert client.get("/health", headers={"Host": "rebound.example.org"}).status_code == 200
    for host in ("127.0.0.1:8084", "monitor:8084", "[::1]:8084", "localhost"):
        assert client.get(ask, headers={"Host": host}).status_code == 200
    assert client.post("/reviews", content=b" " * 20_000).status_code == 413
    assert client.post("/reviews", content=iter([b"{}"])).status_code == 413
    assert client.get("/reviews/..%2f..%2fx/picture").status_code in (404, 422)
