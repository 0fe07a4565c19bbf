"""Precision and recall of the search for near-duplicates, on your own data."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from handlers.decoding import decode
from mlflow_tracking.command_line import console, progress_bar, run
from training.data.near_duplicates import ImageDigest, describe, find_pairs, read_images
from training.data.preparation import open_sources
from training.data.sources import SourceImage

Change = Callable[[Image.Image], Image.Image]
CHANGES: dict[str, tuple[Change, int]] = {
    "JPEG quality 60": (lambda image: image, 60),
    "half size": (lambda image: image.resize((image.width // 2, image.height // 2)), 92),
    "double size": (lambda image: image.resize((image.width * 2, image.height * 2)), 92),
    "squashed by a quarter": (lambda image: image.resize((image.width, image.height * 3 // 4)), 92),
    "brightness x0.8": (lambda image: ImageEnhance.Brightness(image).enhance(0.8), 92),
    "contrast x1.2": (lambda image: ImageEnhance.Contrast(image).enhance(1.2), 92),
    "saturation x0.5": (lambda image: ImageEnhance.Color(image).enhance(0.5), 92),
    "mirrored, quality 60": (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 60),
    "turned by 90 degrees": (lambda image: image.transpose(Image.Transpose.ROTATE_90), 92),
    "turned by 15 degrees": (lambda image: image.rotate(15, Image.Resampling.BICUBIC), 92),
    "cropped by 5 % per side": (
        lambda image: image.crop(
            (image.width // 20, image.height // 20, image.width * 19 // 20, image.height * 19 // 20)
        ),
        92,
    ),
}
EXAMPLES = ["python scripts/studies/near_duplicate_recall.py data/HAM10000 data/isic9 data/isic2019_csv --copies 500"]


def study(
    data: Annotated[list[Path], typer.Argument(help="Folders of data sets, as for prepare_data.py.")],
    copies: Annotated[int, typer.Option(min=1, help="Changed copies of each kind for each folder.")] = 500,
) -> None:
    """Measure precision and recall of the search for near-duplicates.

    Recall: the search looks for changed copies of --copies images of each folder among all originals, and for files
    of one ISIC identifier in two folders. Precision: it counts the pairs of originals whose tables name one lesion,
    two lesions, or no lesion. The tables are printed as Markdown.
    """
    images = open_sources(data).images
    with progress_bar("reading images") as progress:
        digests = read_images([image.path for image in images], progress=progress)
    readable = [index for index, digest in enumerate(digests) if isinstance(digest, ImageDigest)]
    images = [images[index] for index in readable]
    thumbnails = np.stack([digest.thumbnail for digest in digests if isinstance(digest, ImageDigest)])
    folders = sorted({image.root.name for image in images})
    _print_pairs(images, thumbnails, folders)
    _print_recall(images, thumbnails, folders, copies)


def _print_pairs(images: list[SourceImage], thumbnails: NDArray[np.uint8], folders: list[str]) -> None:
    pairs, _ = find_pairs(thumbnails)
    counts: dict[str, Counter[str]] = {folder: Counter() for folder in [*folders, "two folders"]}
    same_id: Counter[str] = Counter()
    for image in images:
        if image.isic_id:
            same_id[image.isic_id] += 1
    for i, j in pairs.tolist():
        first, second = images[i], images[j]
        folder = first.root.name if first.root == second.root else "two folders"
        counts[folder][_relation(first, second)] += 1
    relations = ("one identifier", "one lesion", "no lesion known", "two lesions")
    console.print(f"{len(images):,} images, {len(pairs):,} near-duplicate pairs\n")
    _row("folder", *relations)
    _row(*["---"] * 5)
    for folder, relation in counts.items():
        _row(folder, *(f"{relation[name]:,}" for name in relations))
    console.print(f"\nPairs of files with one identifier: {sum(n * (n - 1) // 2 for n in same_id.values()):,}\n")


def _relation(first: SourceImage, second: SourceImage) -> str:
    if first.isic_id and first.isic_id == second.isic_id:
        return "one identifier"
    if not first.lesions or not second.lesions:
        return "no lesion known"
    shared = {lesion.key for lesion in first.lesions} & {lesion.key for lesion in second.lesions}
    return "one lesion" if shared else "two lesions"


def _print_recall(images: list[SourceImage], thumbnails: NDArray[np.uint8], folders: list[str], copies: int) -> None:
    """Print the share of changed copies that are joined with their original, and pairs with any other image."""
    _row("change", *folders, "pairs with another image")
    _row(*["---"] * (len(folders) + 2))
    rng = np.random.default_rng(0)
    for name, (change, quality) in CHANGES.items():
        cells, others = [], 0
        for folder in folders:
            members = np.array([index for index, image in enumerate(images) if image.root.name == folder])
            chosen = rng.permutation(members)[:copies]
            changed = [_changed_copy(images[index].path, change, quality) for index in chosen]
            pairs, _ = find_pairs(np.concatenate([thumbnails[members], np.stack(changed)]))
            position = {int(index): place for place, index in enumerate(members)}
            expected = {(position[int(index)], len(members) + number) for number, index in enumerate(chosen)}
            copied = {tuple(pair) for pair in pairs.tolist() if pair[1] >= len(members)}
            cells.append(f"{len(copied & expected) / len(expected):.1%}")
            others += len(copied - expected)
        _row(name, *cells, f"{others:,}")


def _changed_copy(path: Path, change: Change, quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    change(decode(path.read_bytes()).image).save(buffer, "JPEG", quality=quality)
    return describe(buffer.getvalue()).thumbnail


def _row(*cells: str) -> None:
    console.print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run(study, EXAMPLES)
