"""Drawn lesions: the same arguments give the same picture, and a small model can learn the classes."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from training.data.synthetic import CLASSES, draw_lesion

SMALL = (96, 72)


def pixels(*args: object, **options: object) -> np.ndarray:
    return np.asarray(draw_lesion(*args, **options), np.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", CLASSES)
def test_same_arguments_same_picture(code):
    first = draw_lesion(7, code, SMALL)
    assert first.size == SMALL
    assert first.mode == "RGB"
    assert first.tobytes() == draw_lesion(7, code, SMALL).tobytes()
    assert first.tobytes() != draw_lesion(8, code, SMALL).tobytes()


@pytest.mark.parametrize("size", [(24, 24), (180, 180), (90, 160)])
def test_any_size(size):
    assert draw_lesion(1, "SCC", size).size == size


def test_a_small_model_can_tell_the_classes_apart():
    """Colour quantiles and a linear model: far from a network, and far above the 1 in 8 of guessing."""

    def features(seed: int, code: str) -> np.ndarray:
        middle = pixels(seed, code, SMALL)[16:-16, 24:-24].reshape(-1, 3)
        ratios = np.column_stack([middle[:, 0] / middle[:, 1], middle[:, 1] / middle[:, 2]])  # less of the skin's tone
        return np.quantile(np.hstack([middle / 255, ratios]), [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98], axis=0).ravel()

    x = np.array([[features(seed, code) for code in CLASSES] for seed in range(36)])
    y = np.tile(np.arange(len(CLASSES)), (36, 1))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    model.fit(x[:24].reshape(-1, x.shape[-1]), y[:24].ravel())
    assert model.score(x[24:].reshape(-1, x.shape[-1]), y[24:].ravel()) > 0.6
