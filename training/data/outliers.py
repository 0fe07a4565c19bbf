"""Pictures that show no lesion, made from training images for the class UNK (outlier exposure).

Hendrycks et al. 2019, "Deep Anomaly Detection with Outlier Exposure". They come from the training split alone, so no
picture of another split is seen. The kinds that scripts/studies/far_images.py evaluates are not among them.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.draws import Draws

Pixels = NDArray[np.uint8]  # (C, C, 3), RGB
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPRSTUVW0123456789 .,:-"))


class Outliers:
    """Replace a share of each batch by pictures without a lesion.

    Args:
        share: of the images, in [0, 1].
        label: index of UNK among the model's classes.
    """

    def __init__(self, share: float, label: int) -> None:
        self.share, self.label = share, label

    def __call__(self, pixels: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return pixels uint8 (N, C, C, 3) and labels int64 (N,) with outliers among them; both are copies."""
        chosen, seeds = draws.uniform() < self.share, draws.integers(2**31)
        kinds: list[Callable[[Pixels, np.random.Generator], Pixels]] = [bare_skin, blank, page]
        pixels, labels = pixels.clone(), labels.clone()
        for row in chosen.nonzero()[:, 0].tolist():
            rng = np.random.default_rng(int(seeds[row]))
            outlier = kinds[rng.integers(len(kinds))](pixels[row].cpu().numpy(), rng)
            pixels[row] = torch.from_numpy(outlier).to(pixels.device)
            labels[row] = self.label
        return pixels, labels


def bare_skin(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Enlarge the brightest corner of a dermoscopy image: lesions are darker than skin and lie in the middle."""
    side = len(image)
    part = int(side * rng.uniform(0.12, 0.25))
    corners = [image[y : y + part, x : x + part] for y in (0, side - part) for x in (0, side - part)]
    brightest = max(corners, key=lambda corner: float(corner.mean()))
    return np.asarray(cv2.resize(brightest, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)


def blank(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw one colour, or a gradient of two, with noise on some: a closed lens cap, a wall, an empty frame."""
    side = len(image)
    colours = rng.uniform(0, 255, (2, 3))
    if rng.random() < 0.5:
        colours = colours.mean(1, keepdims=True).repeat(3, axis=1)  # grey
    if rng.random() < 0.3:
        colours = np.rint(colours / 255) * 255  # black and white
    if rng.random() < 0.6:
        colours[1] = colours[0]
    ramp = np.linspace(0, 1, side)[:, None, None]
    picture = colours[0] + (colours[1] - colours[0]) * ramp + np.zeros((side, side, 3))
    if rng.random() < 0.5:
        picture += rng.normal(0, rng.uniform(1, 12), picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def page(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw lines of random letters: a label, a letter, a screen."""
    side = len(image)
    dark = rng.random() < 0.25
    paper, ink = sorted((int(rng.integers(0, 90)), int(rng.integers(165, 256))), reverse=not dark)
    picture = np.full((side, side, 3), paper, np.uint8)
    height = int(rng.integers(7, 30))
    for y in range(height, side + height, int(height * rng.uniform(1.2, 1.8))):
        line = "".join(rng.choice(LETTERS, int(rng.integers(3, 60))))
        left = int(rng.integers(0, side // 4))
        cv2.putText(picture, line, (left, y), cv2.FONT_HERSHEY_SIMPLEX, height / 30, (ink,) * 3, 1, cv2.LINE_AA)
    return picture
