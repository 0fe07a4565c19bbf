"""Test-time augmentation: average a model's outputs over a picture and its mirror images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

VIEWS = (np.s_[:, :], np.s_[:, ::-1], np.s_[::-1, :], np.s_[::-1, ::-1])  # as sent, and its three mirror images
HALF_TURN_VIEWS = VIEWS[:2]  # handlers.backbone.HalfTurn adds the half turn of each, so the four are complete


class AveragedOutputs(NamedTuple):
    """Logits (R, K), residuals (R,), Grad-CAM maps (R, h, w) and the maps' class indices (R,) of R pictures."""

    logits: np.ndarray
    residuals: np.ndarray
    maps: np.ndarray
    targets: np.ndarray


def averaged_outputs(
    run: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]],
    pictures: Sequence[np.ndarray],
    augmented: Sequence[bool],
    targets: np.ndarray,
    metadata: np.ndarray,
    lesion_classes: int,
    views: Sequence[Any] = VIEWS,
) -> AveragedOutputs:
    """Run R pictures in one call, averaging logits and residuals over the views of those that are `augmented`.

    A map is that of the picture as sent. The graph is run again for a map if the views change a picture's top class,
    or if UNK has the largest logit: people want to see the evidence for a diagnosis.

    Args:
        run: a runtime (handlers.runtimes.Runtime).
        pictures: uint8 (S, S, 3) each.
        augmented: True for pictures to be averaged over the views.
        targets: class indices (R,) for the maps; -1 for the top class other than UNK.
        metadata: encoded metadata (R, D).
        lesion_classes: number of classes other than UNK, which come first.
        views: indices into a picture, of which the first is the picture as sent.
    """
    viewed = [
        [picture[view] for view in (views if several else views[:1])]
        for picture, several in zip(pictures, augmented, strict=True)
    ]
    counts = [len(of_picture) for of_picture in viewed]
    starts = np.cumsum([0, *counts[:-1]])
    rows = np.stack([view for of_picture in viewed for view in of_picture])
    row_logits, row_maps, row_residuals = run(rows, np.repeat(targets, counts), np.repeat(metadata, counts, axis=0))
    logits = np.add.reduceat(row_logits, starts) / np.array(counts)[:, None]
    residuals = np.add.reduceat(row_residuals, starts) / np.array(counts)
    maps = np.array(row_maps[starts])
    final = np.where(targets < 0, logits[:, :lesion_classes].argmax(1), targets)
    mapped = np.where(targets < 0, row_logits[starts].argmax(1), targets)
    changed = np.flatnonzero(mapped != final)
    if len(changed):
        maps[changed] = run(rows[starts[changed]], final[changed], metadata[changed])[1]
    return AveragedOutputs(logits, residuals, maps, final)
