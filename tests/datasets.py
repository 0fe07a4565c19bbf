"""Tiny data sets for the tests of the manifest: patterned pictures, and CSV files written as text."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A random pattern: another seed is another photograph, the same seed at another size the same one."""
    grid = np.random.default_rng(seed).integers(0, 256, (14, 18, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, seed: int, size: tuple[int, int] = (96, 72), quality: int = 92) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path, quality=quality)
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def ham10000(root: Path, rows: list[str]) -> Path:
    """Rows `lesion_id,image_id,dx,dx_type,age,sex,localization`; draws each row's image, seeded by its number."""
    write(root / "HAM10000_metadata.csv", "\n".join(["lesion_id,image_id,dx,dx_type,age,sex,localization", *rows]))
    for row in rows:
        image_id = row.split(",")[1]
        save(root / "images" / f"{image_id}.jpg", int(image_id[-7:]))
    return root


def isic2019_truth(path: Path, labels: dict[str, str]) -> Path:
    """`labels`: image name -> class code."""
    codes = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    rows = [f"{name}," + ",".join(f"{float(code == label)}" for code in codes) for name, label in labels.items()]
    return write(path, "\n".join([f"image,{','.join(codes)}", *rows]) + "\n")


def class_folders(root: Path, images: dict[str, int]) -> Path:
    """`images`: path below the root -> seed of the picture."""
    for path, seed in images.items():
        save(root / path, seed)
    return root


def count(part: dict, words: str) -> int:
    """Return how often the report counts a kind whose name holds `words`. Every kind has an example."""
    assert all(entry["examples"] for entry in part.values())
    return sum(entry["count"] for kind, entry in part.items() if words in kind)
