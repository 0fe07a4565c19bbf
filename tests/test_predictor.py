"""The predictor answers mixed batches by the REST contract, and gives the golden answers in every runtime."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from handlers import runtimes
from handlers.bundle import BundleError
from handlers.errors import ImageError
from handlers.overlay import overlay
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request, RequestError
from handlers.runtimes import LOW_PRECISION_TOLERANCE, OpenVinoRuntime, TorchRuntime
from handlers.serving_graph import serving_module
from handlers.taxonomy import CODES
from tests.models import known_space, tiny_bundle
from training.data.synthetic import draw_lesion


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def predictor(bundle):
    return Predictor(bundle, precision="f32", version="7")


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_threads_get_their_own_answers(bundle, runtime):
    """MLflow's scoring server calls from several threads."""
    predictor, cases = Predictor(bundle, runtime=runtime, precision="f32"), bundle.golden()

    def own(case):
        return [predictor.predict([Request(case.image, metadata=case.metadata)])[0] for _ in range(6)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for case, answers in zip(cases, pool.map(own, cases), strict=True):
            assert max(case.difference(answer.probabilities) for answer in answers) < 1e-4


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"runtime": "torch"}, 1e-5),
        ({"precision": "f32"}, 1e-4),
        ({"precision": "auto"}, LOW_PRECISION_TOLERANCE),
        ({"precision": "f32", "threads": 1}, 1e-4),
    ],
)
def test_golden_answers_in_every_runtime(bundle, options, tolerance):
    cases = bundle.golden()
    answers = Predictor(bundle, **options).predict([case.image for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        probability, cam = case.disagreement(answer.probabilities, answer.grid)
        assert probability <= tolerance
        assert cam <= 0.01


def test_the_answer_follows_the_contract(predictor, sample_images):
    [answer] = predictor.predict([sample_images[0]])
    body = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert list(body) == [
        "schema", "model", "prediction", "probabilities", "classes", "suspicion", "uncertainty", "gradcam", "image",
        "disclaimer",
    ]  # fmt: skip
    assert list(body["probabilities"]) == list(CODES)
    assert sum(body["probabilities"].values()) == pytest.approx(1, abs=1e-9)
    assert body["model"]["version"] == "7"
    assert body["model"]["digest"] == predictor.bundle.digest
    assert body["prediction"]["probability"] == max(body["probabilities"].values())
    assert body["prediction"]["code"] in body["uncertainty"]["conformal_set"] or body["prediction"]["code"] == "UNK"
    grid = np.array(body["gradcam"]["grid"])
    assert grid.shape == (4, 4)
    assert grid.min() >= 0
    assert grid.max() in (0, 1)
    opened = Image.open(io.BytesIO(sample_images[0]))
    assert (body["image"]["width"], body["image"]["height"]) == opened.size
    p = np.array(list(body["probabilities"].values()))
    assert body["uncertainty"]["entropy"] == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_a_batch_answers_each_request_as_if_it_were_alone(predictor, sample_images):
    a, b, c, *_ = sample_images
    requests = [
        a,
        Request(b, gradcam="overlay", target="BCC"),
        b"not an image",
        Request(c, tta=True),
        Request(a, target="XYZ"),
        Request(c, gradcam="none"),
        Request(a, target="UNK"),
        Request(b, tta=True, target="DF"),
    ]
    together = predictor.predict(requests)
    for request, answer in zip(requests, together, strict=True):
        [alone] = predictor.predict([request])
        assert type(alone) is type(answer)
        if isinstance(answer, Prediction):
            assert answer.target == alone.target
            assert list(answer.probabilities.values()) == pytest.approx(list(alone.probabilities.values()), abs=1e-5)
            if answer.grid is not None:
                assert np.allclose(answer.grid, alone.grid, atol=1e-3)
    assert [type(answer) for answer in together].count(ImageError) == 1
    assert together[1].target == "BCC"
    assert Image.open(io.BytesIO(together[1].overlay_png)).format == "PNG"
    assert together[5].to_dict()["gradcam"] is None
    assert together[6].target == max(
        (code for code in CODES if code != "UNK"), key=together[6].probabilities.__getitem__
    )
    assert together[7].target == "DF"


@pytest.mark.parametrize("half_turn", [False, True])
def test_test_time_augmentation_does_not_depend_on_mirroring(tmp_path, bundle, drawn_image, half_turn):
    network = {"architecture": "resnet18", "options": {"half_turn": True}}
    predictor = Predictor(tiny_bundle(tmp_path / "turned", graph=False, **network) if half_turn else bundle)
    image = Image.open(io.BytesIO(drawn_image("MEL", 5)))
    answers = []
    for view in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.transpose(Image.Transpose.ROTATE_180)):
        buffer = io.BytesIO()
        view.save(buffer, "PNG")
        answers += predictor.predict([Request(buffer.getvalue(), tta=True)])
    first = list(answers[0].probabilities.values())
    for answer in answers[1:]:
        assert list(answer.probabilities.values()) == pytest.approx(first, abs=1e-3)


def test_the_map_after_augmentation_is_that_of_the_averaged_top_class(predictor, sample_images):
    for image in sample_images:
        [averaged] = predictor.predict([Request(image, tta=True)])
        [explicit] = predictor.predict([Request(image, target=averaged.target)])
        assert np.allclose(averaged.grid, explicit.grid, atol=1e-3)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(b"", gradcam="heat"), "gradcam is 'heat': it must be one of"),
        (Request(b"", target="mel"), "target is 'mel': it must be one of"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(predictor, request_, message):
    [answer] = predictor.predict([request_])
    assert isinstance(answer, RequestError)
    assert answer.status == 400
    assert message in str(answer)


def test_a_class_the_model_never_saw_has_no_map_and_no_probability(tmp_path, sample_images):
    predictor = Predictor(tiny_bundle(tmp_path / "bundle", classes=("MEL", "NV", "BCC")), precision="f32")
    [answer, refused] = predictor.predict([sample_images[0], Request(sample_images[0], target="SCC")])
    assert answer.probabilities["SCC"] == 0
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert "not trained on SCC" in str(refused)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_answer_does_not_depend_on_the_batch(bundle, sample_images, threads):
    runtime = OpenVinoRuntime(bundle, threads=threads)
    pixels = np.stack([bundle.config.preprocessing(image)[0] for image in sample_images[:5]])
    for count in (1, 2, 3, 5):
        together = runtime(pixels[:count], np.full(count, -1))
        alone = [runtime(pixels[row : row + 1], np.array([-1])) for row in range(count)]
        for values, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert values == pytest.approx(np.concatenate(parts), abs=1e-5)


@pytest.mark.parametrize(("runtime", "kind"), [("openvino", OpenVinoRuntime), ("torch", TorchRuntime)])
def test_bf16_is_taken_only_if_it_gains_and_gives_the_golden_answers(bundle, monkeypatch, runtime, kind):
    for gains, error, precision in ((True, 0.004, "bf16"), (True, 0.006, "f32"), (False, 0.004, "f32")):
        monkeypatch.setattr(kind, "gains_by_bf16", lambda gains=gains: gains)
        monkeypatch.setattr(runtimes, "golden_difference", lambda *_, error=error: error)
        assert Predictor(bundle, runtime=runtime).runtime.precision == precision


@pytest.mark.parametrize(("seconds", "is_faster"), [({"bf16": 7, "f32": 10}, True), ({"bf16": 9, "f32": 10}, False)])
def test_bf16_must_be_clearly_faster_than_f32(monkeypatch, seconds, is_faster):
    times = iter([[seconds["bf16"]], [seconds["f32"]]])
    monkeypatch.setattr(runtimes.timeit, "repeat", lambda *_, **__: next(times))
    assert runtimes._multiplies_faster_in_bf16.__wrapped__() is is_faster


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("vit_tiny_patch16_224", None), ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg"}),
     ("resnet18", {}), ("vit_tiny_patch16_224", {"depth": 2, "qk_norm": True})],
)  # fmt: skip
def test_autocast_gives_the_same_answers_up_to_rounding(tmp_path, sample_images, architecture, options):
    """What a GPU computes in, on the CPU: every kind of Grad-CAM comes through it."""
    given = tiny_bundle(tmp_path / "bundle", options=options, architecture=architecture, graph=False)
    pixels = np.stack([given.config.preprocessing(image)[0] for image in sample_images[:3]])
    full, low = (TorchRuntime(given, precision, device="cpu")(pixels, np.full(3, -1)) for precision in ("f32", "bf16"))
    for ours, theirs in zip(low, full, strict=True):
        assert ours.dtype == np.float32
        assert ours == pytest.approx(theirs, abs=0.05 * max(1.0, float(np.abs(theirs).max())))
    assert not np.array_equal(low[0], full[0])
    assert np.abs(full[1]).max() > 0
    assert np.corrcoef(low[1].ravel(), full[1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("size", [(600, 450), (200, 1500), (40, 30)])
def test_the_overlay_is_the_blend_of_picture_and_colour_map(size):
    picture = draw_lesion(1, "MEL", size=size)
    grid = np.random.default_rng(1).random((7, 7))
    drawn = np.asarray(Image.open(io.BytesIO(overlay(picture, grid / grid.max()))), float)
    picture.thumbnail((640, 640))
    heat = cv2.resize(grid / grid.max(), picture.size, interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    colour = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    assert np.abs(drawn - (1 - 0.6 * heat) * np.asarray(picture) - 0.6 * heat * colour).max() < 7  # of 255


def test_the_overlay_is_larger_than_the_networks_input(predictor, sample_images):
    photo = io.BytesIO()
    Image.open(io.BytesIO(sample_images[0])).resize((2400, 1800)).save(photo, "JPEG")
    [drawn, plain] = predictor.predict([Request(photo.getvalue(), gradcam="overlay"), photo.getvalue()])
    assert Image.open(io.BytesIO(drawn.overlay_png)).size == (640, 480)
    assert drawn.probabilities == pytest.approx(plain.probabilities, abs=1e-6), "what is drawn changes no answer"


def test_the_picture_in_an_answer_is_upright_in_srgb_and_without_metadata(predictor, sample_images):
    photo = Image.open(io.BytesIO(sample_images[0])).resize((1200, 900))
    exif = Image.Exif()
    exif[0x0112] = 6
    sent = io.BytesIO()
    photo.save(sent, "JPEG", exif=exif, quality=95, comment=b"a name")
    [answer, plain] = predictor.predict([Request(sent.getvalue(), picture=True, gradcam="none"), sent.getvalue()])
    shown = Image.open(io.BytesIO(answer.picture_jpeg))
    upright = photo.transpose(Image.Transpose.ROTATE_270).resize((480, 640))
    assert shown.size == (480, 640)
    assert np.abs(np.asarray(shown).astype(float) - np.asarray(upright)).mean() < 4
    assert shown.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert plain.picture_jpeg is answer.overlay_png is None


def test_an_empty_batch_is_answered_empty(predictor):
    assert predictor.predict([]) == []


def test_features_outside_the_known_space_raise_the_ninth_probability(tmp_path, sample_images):
    """ViM in serving: the graph's residual is that of the features, in both runtimes, and counts in the rejection."""
    space = known_space()
    without = tiny_bundle(tmp_path / "without")
    bundle = tiny_bundle(tmp_path / "with", residual_weight=0.2, space=space)
    pixels = np.stack([bundle.config.preprocessing(image)[0] for image in sample_images[:3]])
    anything = np.full(3, -1)
    module = serving_module(bundle)
    with torch.inference_mode():
        images = module.images(torch.tensor(pixels))
        features = module.cam(images, torch.tensor(anything))[2].numpy()
    expected = space.residuals(features)
    for runtime in (OpenVinoRuntime(bundle), TorchRuntime(bundle)):
        logits, _, residuals = runtime(pixels, anything)
        assert residuals == pytest.approx(expected, rel=1e-4)
    assert OpenVinoRuntime(without)(pixels, anything)[2].tolist() == [0, 0, 0]

    plain, strict = (Predictor(one, precision="f32").predict(sample_images[:3]) for one in (without, bundle))
    for row, (one, other) in enumerate(zip(plain, strict, strict=True)):
        energy = float(np.log(np.exp(logits[row]).sum()))
        p_unknown = 1 / (1 + np.exp((energy - 0.2 * expected[row] - 1.0) / 0.5))
        assert other.probabilities["UNK"] == pytest.approx(p_unknown, abs=1e-4)
        assert other.probabilities["UNK"] > one.probabilities["UNK"]
        assert sum(other.probabilities.values()) == pytest.approx(1)
    # and it is averaged over the views, as the logits are
    [tta] = Predictor(bundle, precision="f32").predict([Request(sample_images[0], tta=True)])
    [torch_tta] = Predictor(bundle, runtime="torch").predict([Request(sample_images[0], tta=True)])
    assert tta.probabilities == pytest.approx(torch_tta.probabilities, abs=1e-4)
    with pytest.raises(BundleError, match="needs rejection.basis"):
        tiny_bundle(tmp_path / "none", residual_weight=0.2)
    with pytest.raises(ValueError, match="needs the residuals"):
        bundle.config.calibration.probabilities(logits, bundle.config.classes)
