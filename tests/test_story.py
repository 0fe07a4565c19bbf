"""The whole loop, played once: known pictures, another camera, an alarm, corrections, a new version, no alarm.

TorchServe, the monitor and its database are lost once on the way, and no prediction or correction is lost or counted
twice. The corrections go through the page in Chromium.

Drawn pictures and a small network by default. With STORY_MANIFEST=data/manifest.csv it plays with the lesions of that
manifest's test split and the shipped model. `-s` shows the figures.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import sqlalchemy as sa
from PIL import Image, ImageFilter
from playwright.sync_api import Page, expect

from handlers.taxonomy import CODES, TAXONOMY, UNKNOWN
from mlflow_tracking.stack_settings import SHIPPED
from monitoring.tables import readings
from streamlit_app import monitor_wording
from streamlit_app import review_wording as wording
from tests.browser_page import screenshot, settle
from tests.conftest import ROOT, Stack
from tests.waiting import eventually
from training.data.manifest import read_manifest, write_manifest
from training.data.synthetic import CLASSES, draw_lesion

pytest_plugins = ["tests.fixtures_browser"]
pytestmark = [pytest.mark.live, pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(3600)]
KNOWN, CHANGED, LATE, READINGS = 2000, 400, 50, 200
READER, NAMES = "reader", {lesion.code: lesion.name for lesion in TAXONOMY}
SMALL = ["architecture=test_resnet", "pretrained=false", "image_size=64", "lr=3e-3", "output_stride=32", "threads=2",
         "symmetric_padding=false", "frozen_stages=0", "outliers=0", "cache_size=0", "resample=0"]  # fmt: skip


@dataclass
class Picture:
    """A file, and its true class."""

    data: bytes
    code: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class World:
    """Pictures as they are known, the champion and its manifest, and the settings to train it further."""

    pictures: list[Picture]
    champion: Path
    manifest: Path
    settings: list[str]


def drawn(seed: int) -> Picture:
    code = CLASSES[int(np.random.default_rng(seed).choice(len(CLASSES), p=[0.2, 0.3, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]))]
    buffer = io.BytesIO()
    draw_lesion(seed, code, size=(120, 90)).save(buffer, "JPEG", quality=92)
    return Picture(buffer.getvalue(), code)


def through_another_camera(picture: Picture) -> Picture:
    """The same lesion in warmer light and out of focus."""
    image = Image.open(io.BytesIO(picture.data)).convert("RGB")
    red, green, blue = image.split()
    image = Image.merge("RGB", (red.point(lambda v: v * 1.15), green, blue.point(lambda v: v * 0.8)))
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(min(image.size) / 60)).save(buffer, "JPEG", quality=92)
    return Picture(buffer.getvalue(), picture.code)


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """A stack of its own that keeps pictures, whose gates judge only what a model of a few minutes can show.

    The gates of mlflow_tracking/gates.yaml refuse such a model, with real pictures too (docs/lab-notes.md).
    """
    running = Stack.create(tmp_path_factory.mktemp("story"))
    running.env |= {"KEEP_IMAGES_DAYS": "30", "PROMOTER_GATES": str(ROOT / "tests" / "gates.yaml")}
    disk(running).mkdir()
    running.env["MONITOR_DATABASE"] = f"sqlite:///{disk(running)}/monitor.db"
    try:
        running.start()
        yield running
        running.stop()
    finally:
        for process in running.processes():  # only after a failure
            process.kill()


def disk(stack: Stack) -> Path:
    """The folder of the monitor's database."""
    return stack.folder / "disk"


def script(stack: Stack, *args: str) -> str:
    done = stack.run(*args, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def world(stack, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    manifest = folder / "manifest.csv"
    if real := os.environ.get("STORY_MANIFEST"):
        frame = read_manifest(real)
        rng = np.random.default_rng(0)
        new = frame[frame["split"].isin(("test", "calibration")) & (frame["label"] != UNKNOWN)]
        new = new.drop_duplicates("lesion_id").sample(KNOWN + CHANGED, random_state=0)
        pictures = [Picture(Path(row.path).read_bytes(), row.label) for row in new.itertuples()]
        train, val = (frame[frame["split"] == split].sample(frac=share, random_state=0)
                      for split, share in (("train", 0.06), ("val", 0.15)))  # fmt: skip
        rest = frame[frame["split"] == "calibration"]
        write_manifest(manifest, frame.loc[rng.permutation([*train.index, *val.index, *rest.index])])
        return World(pictures, SHIPPED, manifest, ["threads=2", "batch_size=32"])
    for number in range(1600):
        picture = drawn(number)
        path = folder / "data" / picture.code / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.data)
    shares = ["--val", "0.1", "--calibration", "0.3", "--test", "0.05"]
    script(stack, "scripts/prepare_data.py", "--data", str(folder / "data"), "--out", str(manifest), *shares)
    run = folder / "run"
    script(stack, "training/train.py", "--config", "dermoscopy", "--epochs", "6", "--output", str(run), *SMALL,
           f"manifest={manifest}")  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        pictures = list(pool.map(drawn, range(10_000, 10_000 + KNOWN + CHANGED)))
    return World(pictures, run / "bundle", manifest, SMALL)


class Story:
    """What has been sent, and what the monitor makes of it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.sent = 0
        self.answers: dict[str, dict[str, str]] = {}  # version -> SHA-256 -> class

    def send(self, pictures: list[Picture], clients: int = 4, pause: float = 0) -> None:
        """Send pictures. With a pause of some seconds after each, all are kept for review."""

        def post(picture: Picture) -> httpx.Response:
            time.sleep(pause)
            return client.post(address, content=picture.data)

        address = f"{self.stack.torchserve}/predictions/skin_vit?gradcam=none"
        with httpx.Client(timeout=60, trust_env=False) as client, ThreadPoolExecutor(clients) as pool:
            for response in pool.map(post, pictures):
                body = response.raise_for_status().json()
                by_picture = self.answers.setdefault(body["model"]["version"], {})
                by_picture[body["image"]["sha256"]] = body["prediction"]["code"]
                self.sent += 1

    def accuracy(self, version: str, pictures: list[Picture]) -> float:
        answers = self.answers[version]
        return float(np.mean([answers[picture.sha256] == picture.code for picture in pictures]))

    def get(self, path: str, **params: str) -> dict:
        answer = httpx.get(f"{self.stack.monitor}{path}", params=params, timeout=60, trust_env=False)
        return answer.raise_for_status().json()

    def summary(self) -> dict:
        """The figures, once the monitor has counted everything that was sent."""
        return eventually(
            lambda: (figures := self.get("/summary")) and figures["total"]["predictions"] >= self.sent and figures, 180
        )

    def alarm(self, version: str) -> str | None:
        return self.summary()["drift"][version]["alarm_since"]

    def kill(self, words: str) -> None:
        """Kill the processes whose command has these words, and wait until they are there again."""
        killed = [process for process, command in self.stack.processes().items() if words in command]
        assert killed
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, 10)
        path = f"{self.stack.monitor}/health" if "monitor" in words else f"{self.stack.torchserve}/ping"
        eventually(lambda: httpx.get(path, timeout=5, trust_env=False).is_success, 120)

    def serve(self, version: str, picture: Picture) -> None:
        script(self.stack, "scripts/promote.py", "to", version)
        address = f"{self.stack.torchserve}/predictions/skin_vit?gradcam=none"

        def served() -> bool:
            headers = {"X-Record": "no"}
            answer = httpx.post(address, content=picture.data, headers=headers, timeout=60, trust_env=False)
            return answer.is_success and answer.json()["model"]["version"] == version

        eventually(served, 120)

    def open_review(self, window: Page) -> None:
        window.goto(self.stack.streamlit)
        window.get_by_role("link", name=wording.REVIEW).click()
        window.get_by_label(wording.NAME_LABEL).fill(READER)
        window.get_by_role("button", name=wording.NAME_BUTTON).click()

    def look_at_monitoring(self, window: Page) -> None:
        """Open the part Monitoring during the alarm; with SCREENSHOT_DIR, keep a picture of it."""
        window.goto(self.stack.streamlit)
        window.get_by_role("link", name=monitor_wording.MONITORING).click()
        window.get_by_text("1 hour", exact=True).click()
        expect(window.locator(".sl-alarmed")).to_be_visible()
        expect(window.locator(".js-plotly-plot")).to_have_count(5)
        if folder := os.environ.get("SCREENSHOT_DIR"):
            screenshot(window, Path(folder) / "story-monitoring.png")
        window.goto("about:blank")  # a page that refreshes itself costs time

    def say(self, window: Page, truth: dict[str, str]) -> None:
        """Say of the picture on the page what it shows, by its key; then the model's answer is there."""
        expect(window.get_by_text(wording.QUESTION)).to_be_visible()
        code = truth[self.get("/reviews/next", reader=READER)["picture"]["image_sha256"]]
        settle(window)
        window.keyboard.press(str(CODES.index(code) + 1))
        expect(window.get_by_text(wording.YOU_SAID.format(verdict=NAMES[code]))).to_be_visible()
        settle(window)

    def read(self, window: Page, truth: dict[str, str], count: int) -> None:
        """Read pictures on the page by keyboard until the reader has read `count`."""
        for number in range(self.get("/reviews/status", reader=READER)["mine"] + 1, count + 1):
            self.say(window, truth)
            window.keyboard.press("k")
            expect(window.get_by_text(f"{number} read by you")).to_be_visible()

    def lose_database(self) -> None:
        """Take the database away, as a disk that fails; SQLite has no process that could be killed."""
        disk(self.stack).rename(self.stack.folder / "away")
        self.kill("monitoring.monitor_service")
        eventually(lambda: not self.get("/health")["database_up"], 60)

    def return_database(self) -> None:
        (self.stack.folder / "away").rename(disk(self.stack))
        eventually(lambda: self.get("/health")["database_up"], 120)

    def stored_readings(self) -> list[sa.Row]:
        with sa.create_engine(self.stack.env["MONITOR_DATABASE"]).connect() as connection:
            return list(connection.execute(sa.select(readings.c.image_sha256, readings.c.verdict)))


def registered(output: str) -> str:
    """The version that a script has registered, or that was registered already."""
    return output.split("version ")[1].split()[0].rstrip(".")


def test_the_loop_from_answer_to_training_closes(stack, world, window):
    story = Story(stack)
    first = registered(script(stack, "scripts/register_model.py", "--bundle", str(world.champion)))
    known, lesions = world.pictures[:KNOWN], world.pictures[KNOWN:]
    story.serve(first, known[0])
    story.sent = story.get("/summary")["total"]["predictions"]  # the start of the stack is one

    story.send(known[: KNOWN // 2])
    story.kill("monitoring.monitor_service")
    story.send(known[KNOWN // 2 :])
    figures = story.summary()
    assert figures["total"]["predictions"] == story.sent
    assert figures["drift"][first]["alarm_since"] is None
    print(f"\n{KNOWN} known pictures: no alarm, accuracy {story.accuracy(first, known):.3f}")

    changed = [through_another_camera(picture) for picture in lesions]
    began, count = time.time(), 0
    while not story.alarm(first):
        assert count < CHANGED, "no alarm"
        story.send(changed[count : count + 10])
        count += 10
    print(f"another camera: alarm after at most {count} pictures")
    assert not story.summary()["performance"]["calibration_holds"]
    story.kill("org.pytorch.serve.ModelServer")
    story.send(changed[count:-LATE], clients=1, pause=0.1)
    assert story.summary()["total"]["predictions"] == story.sent

    truth = {picture.sha256: picture.code for picture in (*known, *changed)}
    story.open_review(window)
    review_began = time.time()
    story.read(window, truth, READINGS // 2)
    story.say(window, truth)
    story.lose_database()
    window.keyboard.press("k")
    expect(window.get_by_text(wording.AWAY, exact=True)).to_be_visible()
    story.send(changed[-LATE:], clients=1, pause=0.1)
    story.return_database()
    assert story.summary()["total"]["predictions"] == story.sent
    window.get_by_role("button", name=wording.TRY_AGAIN).click()
    story.read(window, truth, READINGS)
    story.look_at_monitoring(window)
    assert sorted(story.stored_readings()) == sorted({(name, truth[name]) for name, _ in story.stored_readings()})
    assert len(story.stored_readings()) == READINGS
    print(
        f"{READINGS} readings by keyboard in {time.time() - review_began:.0f} s, half of them after the database's loss"
    )
    output = script(stack, "scripts/retrain.py", "--data", str(world.manifest), "--epochs", "5", "--output",
                    str(stack.folder / "retrained"), *world.settings, "lr=1e-3")  # fmt: skip
    second = registered(output[output.index("✓") :])
    print(next(line for line in output.splitlines() if line.startswith("Corrections:")))
    assert not (stack.folder / "retrained" / "cache").exists()

    story.serve(second, known[0])
    story.send(changed)
    figures = story.summary()
    assert figures["drift"][second]["alarm_since"] is None
    assert not story.get("/summary", version=second)["performance"]["calibration_holds"]  # only readings can tell
    before, after = (story.accuracy(version, changed) for version in (first, second))
    assert after > before
    print(f"accuracy through the other camera: {before:.3f} before, {after:.3f} after; no alarm")
    print(f"realised, version {second}: {json.dumps(story.get('/summary', version=second)['performance'])[:400]}")
    assert figures["total"]["predictions"] == story.sent

    lineage = json.loads(script(stack, "scripts/lineage.py", second, "--json"))
    learned = lineage["receipt"]["corrections"]
    assert 0 < sum(learned.values()) < READINGS  # the random share is left out
    assert lineage["served"]
    taught = eventually(lambda: teaches(stack, truth), 60)
    assert {entry["version"] for entry in taught} == {second}
    assert "none changed, none missing" in script(stack, "scripts/lineage.py", "--verify")
    print(f"{learned} corrections in the lineage of version {second}; {time.time() - began:.0f} s since the change")


def teaches(stack: Stack, truth: dict[str, str]) -> list[dict[str, str]]:
    """What `lineage.py` says of a picture that a version has learned from."""
    receipt = json.loads((stack.folder / "retrained" / "bundle" / "receipt.json").read_text())
    digits = receipt["splits"]["train"]["corrections"][0]
    [sha256] = [name for name in truth if name.startswith(digits)]
    return json.loads(script(stack, "scripts/lineage.py", sha256, "--json"))["taught"]
