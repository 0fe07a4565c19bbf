"""Hostile requests get an answer or a refusal and cause no damage.

- Every answer is 200 or a 4xx, in the contract's form or in TorchServe's own. A 5xx answers only forms that
  TorchServe's front end cannot read; no worker sees them.
- The worker stays the same process, its memory stays flat, and the next valid request is answered as before.
- Claimed sizes and data that grow when unpacked cost neither time nor memory.
- In a batch of valid and invalid requests, each gets its own answer.
- One photograph has one answer, in every orientation.

tests/hostile generates the requests from a seed. `make test` runs a few hundred of them; `make test-hostile` runs all,
with decompression bombs, and prints the figures of docs/lab-notes.md. `TEST_IMAGES=FOLDER` uses real pictures.
"""

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.errors import ImageError
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.request_parsing import IMAGE_FIELDS, OPTIONS
from handlers.skin_lesion_handler import SkinLesionHandler
from tests.hostile import corpus, dicom, images, newer, photograph, requests
from tests.hostile.images import Case
from tests.models import tiny_bundle
from tests.serving import Answer, Call, Serving
from tests.test_handler import FakeContext

pytest_plugins = ["tests.fixtures_serving"]
SEED = 2019
SIZE = 3000  # of the whole corpus
FASTEST = {"lossless": True, "speed": 10}  # of WebP and AVIF; other formats ignore them
REFUSALS = {400, 413, 415}
MEGABYTE = 1 << 20


def status_of(data: bytes) -> int:
    try:
        Preprocessing(128)(data)
    except ImageError as error:
        return error.status
    return 200


@pytest.mark.parametrize("family", [images.odd, newer.newer, images.refused, images.foreign, images.bombs])
def test_each_file_gets_its_expected_status(family: Callable[[bytes], Iterator[Case]], sample_images):
    for case in family(sample_images[0]):
        began = time.process_time()
        assert status_of(case.data) in case.expected, case.name
        assert time.process_time() - began < 10, f"{case.name}: seconds of the processor for {len(case.data)} bytes"


@pytest.fixture(scope="module")
def originals() -> list[bytes]:
    return images.sources(photograph(0))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_files_decode_or_are_refused(seed, originals):
    case = images.damaged(random.Random(seed), originals)
    assert status_of(case.data) in case.expected


@settings(max_examples=300, deadline=None)
@given(head=st.sampled_from(sorted(images.SIGNATURES.values())), tail=st.binary(max_size=400))
def test_any_bytes_behind_a_signature_decode_or_are_refused(head, tail):
    assert status_of(head + tail) in REFUSALS | {200}


@pytest.fixture(scope="module")
def handler(tmp_path_factory) -> SkinLesionHandler:
    handler = SkinLesionHandler()
    handler.predictor = Predictor(tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"), precision="f32", threads=1)
    return handler


# What TorchServe makes of a part or a body: bytes, a text, or any JSON.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=50)
    | st.binary(max_size=50).map(bytearray),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*IMAGE_FIELDS, *OPTIONS, "body", "explain"]) | st.text(max_size=60)
rows = st.dictionaries(names, values, max_size=5) | values.map(lambda value: {"body": value})


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(rows, min_size=1, max_size=4))
def test_any_row_from_torchserve_gets_its_own_answer(handler, rows, tmp_path):
    good = {"body": bytearray(photograph(1))}
    context = FakeContext(tmp_path)
    answers = handler.handle([good, *rows, good], context)
    assert len(answers) == len(rows) + 2
    assert set(context.statuses.values()) <= REFUSALS
    assert not {0, len(rows) + 1} & set(context.statuses), "the good ones at both ends are answered"
    assert max(map(len, answers)) < 100_000, "no refusal quotes at length"


@contextmanager
def watched(serving: Serving) -> Iterator[list[int]]:
    """Yields a list that holds, in the end, the most bytes that the worker held at any moment inside."""
    worker, done = serving.worker(), threading.Event()
    peak = [worker.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], worker.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def judge(item: requests.Item, answer: Answer) -> str:
    """What is wrong with an answer; nothing if it is one that may be given."""
    if answer.status not in item.expected:
        return f"{item}: {answer.status}, not one of {sorted(item.expected)}: {answer.body[:200]!r}"
    if answer.status >= 500 and (item.family != "broken forms" or answer.shape != "torchserve"):
        return f"{item}: {answer.status}: {answer.body[:200]!r}"
    if (answer.status == 200) != (answer.shape == "prediction") or answer.shape == "none":
        return f"{item}: {answer.status} in no shape of the contract: {answer.body[:200]!r}"
    return ""


@contextmanager
def unharmed(serving: Serving) -> Iterator[psutil.Process]:
    """Whatever happens inside, the worker is the same in the end and gives the same answer. Yields the worker."""
    worker, before = serving.worker(), serving.ask(serving.good)
    yield worker
    after = serving.ask(serving.good)
    assert serving.worker() == worker, f"another worker:\n{serving.server.text()[-5000:]}"
    assert after.status == 200
    assert after.json == before.json


@pytest.mark.live
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("size", "warm_up"), [(150, 0), pytest.param(SIZE, 500, marks=[pytest.mark.hostile])], ids=["some", "all"]
)
def test_hostile_requests_harm_no_other_request(serving, sample_images, size, warm_up):
    items, wrong, counts = corpus(SEED, size, sample_images), [], Counter()
    began, resident = time.monotonic(), []
    with unharmed(serving):
        for number, item in enumerate(items):
            if number >= warm_up and number % 10 == 0:
                resident.append(serving.resident() / MEGABYTE)
            answer = serving.ask(item.call)
            counts[f"{answer.status} {answer.shape}"] += 1
            if fault := judge(item, answer):
                wrong.append(fault)
    # What the worker holds goes up and down by 40 MB from one picture to the next, so a mean stands for it.
    first, last = statistics.mean(resident[: len(resident) // 3]), statistics.mean(resident[-len(resident) // 3 :])
    print(
        f"\n{size} requests in {time.monotonic() - began:.0f} s, one worker throughout: {dict(sorted(counts.items()))}"
    )
    change = 100 * (last / first - 1)
    print(
        f"worker's memory after {warm_up}: {first:.0f} MB in the first third, {last:.0f} in the last, {change:+.1f} %"
    )
    assert not wrong, "\n".join(wrong)
    assert not warm_up or last < 1.05 * first
    families = Counter(item.family for item in items)
    assert size < SIZE or all(families[f"damaged {name}"] >= 500 for name in newer.FORMATS)


@pytest.mark.live
@pytest.mark.timeout(600)
def test_30_000_by_30_000_pixels_are_refused_at_once(serving):
    bomb = Call(images.png(*images.MEGAPIXELS_900, depth=2, colour=0))
    with unharmed(serving), watched(serving) as peak:
        before = peak[0]
        answer = serving.ask(bomb)
    growth = (peak[0] - before) / MEGABYTE
    print(f"\n30,000 by 30,000 pixels in {len(bomb.body) / 1000:.0f} KB: {answer.status} after {answer.seconds:.3f} s, "
          f"memory {growth:+.1f} MB")  # fmt: skip
    assert (answer.status, answer.json["error"]["code"]) == (413, "image_too_large")
    assert growth < 50
    assert answer.seconds < 5, "well under a second on a machine that has nothing else to do"


@pytest.mark.live
@pytest.mark.hostile
@pytest.mark.timeout(900)
def test_bombs_are_refused_quickly(serving, sample_images):
    slowest, wrong = (0.0, ""), []
    with unharmed(serving), watched(serving) as peak:
        before = peak[0]
        for case in images.bombs(sample_images[0]):
            item = requests.Item("bombs", case.name, Call(case.data), case.expected)
            answer = serving.ask(item.call)
            slowest = max(slowest, (answer.seconds, case.name))
            if fault := judge(item, answer):
                wrong.append(fault)
    growth = (peak[0] - before) / MEGABYTE
    print(f"\nbombs: memory at most {growth:+.0f} MB, the slowest {slowest[1]} with {slowest[0]:.1f} s")
    assert not wrong, "\n".join(wrong)
    assert slowest[0] < 30, "TorchServe ends a worker that takes 60 s"
    assert growth < 500, "bodies of 34 MiB come and go; unpacked, some would have gigabytes"


@pytest.mark.live
@pytest.mark.hostile
@pytest.mark.timeout(600)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "BMP", "DICOM", "WEBP", "AVIF", "HEIF"])
def test_eight_of_the_largest_pictures_at_once(serving, format_):
    side = {"JPEG": 7000, "PNG": 7000, "WEBP": 5000, "AVIF": 5000, "HEIF": 5000}.get(format_, 3500)  # 35 MiB
    picture = images.Image.new("RGBA", (side, side), (200, 150, 120, 250))
    picture.paste((90, 50, 40, 255), (0, 0, side, side // 2))
    if format_ == "DICOM":
        data = dicom.write(np.asarray(picture.convert("RGB")), "RGB")
    else:
        data = images.encode(picture if format_ in ("PNG", "WEBP") else picture.convert("RGB"), format_, **FASTEST)
    with unharmed(serving), watched(serving) as peak, ThreadPoolExecutor(8) as pool:
        before = peak[0]
        answers = list(pool.map(serving.ask, [Call(data)] * 8))
    print(f"\neight {format_} of {side * side // 10**6} megapixels, {len(data) / MEGABYTE:.0f} MiB: "
          f"{Counter(answer.status for answer in answers)}, {max(a.seconds for a in answers):.1f} s, "
          f"memory {before / MEGABYTE:.0f} MB and at most {(peak[0] - before) / MEGABYTE:+.0f} MB")  # fmt: skip
    assert {answer.status for answer in answers} == {200}
    assert peak[0] - before < 900 * MEGABYTE, "one such picture has 200 MB, and two of them are there at a time"


@pytest.mark.live
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [60, pytest.param(2000, marks=[pytest.mark.hostile])], ids=["some", "all"])
def test_in_a_batch_each_gets_its_own_answer(serving, sample_images, size):
    """Twelve clients at once, so that good and bad requests go into the worker together."""
    strangers = [item for item in corpus(SEED + 1, size, sample_images) if len(item.call.body) < MEGABYTE]
    good = [(Call(data), serving.ask(Call(data)).json) for data in sample_images]
    asked: list[tuple[Call, requests.Item | int]] = []
    for number, item in enumerate(strangers):
        asked += [(item.call, item), (good[number % len(good)][0], number % len(good))]
    with unharmed(serving), ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda pair: serving.ask(pair[0]), asked))
    for (_, meant), answer in zip(asked, answers, strict=True):
        if isinstance(meant, requests.Item):
            assert not judge(meant, answer)
        else:
            assert answer.status == 200
            expected = good[meant][1]
            assert answer.json["image"] == expected["image"], "another picture's answer"
            assert answer.json["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-3)
    print(f"\n{len(asked)} requests of 12 clients, every other one good: each had its own answer")


@pytest.mark.live
@pytest.mark.timeout(600)
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_one_photograph_has_one_answer_however_the_camera_was_held(serving, sample_images, format_):
    image = images.small(sample_images[0])
    answers = [
        serving.ask(Call(images.encode(images.turned(image, n), format_, exif=images.exif(n)))).json
        for n in range(1, 9)
    ]
    for answer in answers:
        assert answer["probabilities"] == pytest.approx(answers[0]["probabilities"], abs=1e-4)
        assert (answer["image"]["width"], answer["image"]["height"]) == image.size
