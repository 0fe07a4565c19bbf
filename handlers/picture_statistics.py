"""Statistics of a picture that show a change of camera, light or file: computed for every prediction, for drift."""

import cv2
import numpy as np


def picture_statistics(pixels: np.ndarray) -> dict[str, float]:
    """Return statistics of the network's input, uint8 (S, S, 3), in grey levels of 255.

    `brightness` and `contrast` are mean and standard deviation of the grey picture. `red` and `blue` are how far these
    channels' means lie above that of green: the colour cast. `sharpness` is the logarithm of the Laplacian's standard
    deviation, which falls with blur (Pech-Pacheco et al. 2000).
    """
    red, green, blue = cv2.mean(pixels)[:3]
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    (brightness,), (contrast,) = (value[0] for value in cv2.meanStdDev(grey))
    _, (edges,) = (value[0] for value in cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S)))
    return {
        "brightness": float(brightness),
        "contrast": float(contrast),
        "red": red - green,
        "blue": blue - green,
        "sharpness": float(np.log(edges + 1.0)),
    }
