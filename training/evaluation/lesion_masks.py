"""Masks of lesions on plain pictures, by colour: for checks of heatmaps where no drawn masks exist."""

import cv2
import numpy as np
from numpy.typing import NDArray

AREAS = 0.05, 0.45  # the smallest and the largest share of the picture that is taken for a lesion
ON_BORDER = 0.02  # the largest share of the picture's border that it covers
CENTRED = 0.25  # the farthest that its middle is from the picture's, as a share of the side


def lesion_mask(pixels: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Return where the lesion is in pixels (S, S, 3), as (S, S); None unless the picture is plain.

    The lesion is the largest connected part that is darker than Otsu's threshold (Otsu 1979) of the blurred picture. A
    picture is plain if this part has a lesion's size, lies in the middle and hardly touches the border, so pictures
    without a lesion, with a large one, or with one at the edge are left out.
    """
    side = pixels.shape[0]
    grey = cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (0, 0), side / 60)
    _, dark = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    count, parts, figures, centres = cv2.connectedComponentsWithStats(dark)
    if count < 2:
        return None
    largest = 1 + int(figures[1:, cv2.CC_STAT_AREA].argmax())
    mask: NDArray[np.bool_] = parts == largest
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    off_centre = np.abs(centres[largest] / side - 0.5).max()
    is_plain = AREAS[0] <= mask.mean() <= AREAS[1] and border.mean() <= ON_BORDER and off_centre <= CENTRED
    return mask if is_plain else None


def pointing(heat: NDArray[np.float32], pixels: NDArray[np.uint8]) -> dict[str, float | int]:
    """Return how often the hottest cell of a map (N, h, w) lies on the lesion (the pointing game; Zhang et al. 2018).

    Only plain pictures count: `images` of them. `hit` is the share whose hottest cell has its middle on the lesion, and
    `heat_inside` the share of the heat there. `chance` is the share of all cells' middles that lie there, and `centre`
    the share of pictures whose middle lies there: what a map that ignores the picture would reach.
    """
    hits, chances, centres, inside = [], [], [], []
    for cells, picture in zip(heat, pixels, strict=True):
        mask = lesion_mask(picture)
        if mask is None:
            continue
        rows, columns = (((np.arange(n) + 0.5) * len(mask) / n).astype(int) for n in cells.shape)
        on_lesion = mask[np.ix_(rows, columns)]
        hits.append(bool(on_lesion.flat[cells.argmax()]))
        chances.append(on_lesion.mean())
        centres.append(bool(mask[len(mask) // 2, len(mask) // 2]))
        inside.append(cells[on_lesion].sum() / cells.sum())
    if not hits:
        return {"images": 0}
    return {
        "images": len(hits),
        "hit": float(np.mean(hits)),
        "chance": float(np.mean(chances)),
        "centre": float(np.mean(centres)),
        "heat_inside": float(np.mean(inside)),
    }
