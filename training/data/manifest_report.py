"""The report on a manifest: counts by class, source and split, duplicates, dropped files and notes."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from handlers.taxonomy import CODES
from training.data.data_sets import authorities, source_names
from training.data.image_files import Faults
from training.data.photos import SAME_BYTES, SAME_ID, Photo, components
from training.data.sources import Sources
from training.data.splits import SPLITS

_EXAMPLES = 5


def make_report(
    frame: pd.DataFrame,
    roots: list[Path],
    sources: Sources,
    photos: list[Photo],
    near: list[tuple[int, int]],
    settled: Counter[str],
    dropped: Faults,
    fixed_test: int,
) -> dict[str, Any]:
    """Return the content of manifest.report.json, and add weak spots of the manifest `frame` to its notes.

    `photos` are the rows of `frame`; `near` are pairs of indices into them that were joined as near-duplicates;
    `settled` counts the labels by authority; `fixed_test` is the number of groups that are test by their source.
    """
    sizes = frame["lesion_id"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    files = [[str(image.path) for image, _ in photo.copies] for photo in photos]
    sets = [sorted(path for index in members for path in files[index]) for members in components(len(photos), near)]
    largest = max(sets, key=lambda paths: (len(paths), paths))
    _note_weak_spots(frame, photos, sources.faults)
    return {
        "data": [
            {
                "directory": str(root),
                "image_files": sum(image.root == root for image in sources.images),
                "images_kept": sum(photo.kept.root == root for photo in photos),
                "tables": [
                    {"file": str(table.path), "kind": table.kind, "rows": len(table.rows)}
                    | ({"official_test": True} if table.official_test else {})
                    for table in sources.tables
                    if table.path.is_relative_to(root)
                ],
            }
            for root in roots
        ],
        "ignored_tables": sources.ignored_files,
        "image_files": len(sources.images),
        "images": len(frame),
        "groups": len(sizes),
        "patients": frame.loc[frame["patient_id"] != "", "patient_id"].nunique(),
        "images_with_a_patient": int((frame["patient_id"] != "").sum()),
        "groups_fixed_as_test": fixed_test,
        "counts": {
            "class_by_split": _crosstab(frame, "label", "split"),
            "source_by_split": _crosstab(frame, "source", "split"),
            "class_by_source": _crosstab(frame, "label", "source"),
        },
        "labels_settled_by": {name: settled[name] for name in authorities() if settled[name]},
        "duplicates": {
            "copies_of_one_file": len(dropped.examples.get(SAME_BYTES, [])),
            "copies_by_isic_identifier": len(dropped.examples.get(SAME_ID, [])),
            "near_pairs": len(near),
            "near_examples": [[photos[i].name, photos[j].name] for i, j in near[:_EXAMPLES]],
            "sets": sum(len(paths) > 1 for paths in sets),
            "largest_set": largest if len(largest) > 1 else [],
        },
        "largest_group": {"lesion_id": sizes.index[0], "images": int(sizes.iloc[0])},
        "dropped": _tally(dropped),
        "notes": _tally(sources.faults),
    }


def _note_weak_spots(frame: pd.DataFrame, photos: list[Photo], notes: Faults) -> None:
    groups: dict[str, set[str]] = defaultdict(set)
    for photo in photos:
        for lesion in photo.lesions:
            groups[lesion.name].add(photo.lesion)
    for name, apart in groups.items():
        if len(apart) > 1:
            notes.add("lesion id in tables of several folders: taken for different lesions", name)
    for photo in photos:
        if not photo.lesions:
            notes.add("image without a lesion id: its group is itself and its near-duplicates", photo.name)
    for group, labels in frame.groupby("lesion_id")["label"]:
        if labels.nunique() > 1:
            notes.add("group with more than one diagnosis", f"{group}: {', '.join(sorted(set(labels)))}")
    for code in CODES:
        here = set(frame["split"][frame["label"] == code])
        for split in SPLITS:
            if here and split not in here:
                notes.add(f"class without an image in {split}", code)


def _crosstab(frame: pd.DataFrame, rows: str, columns: str) -> dict[str, dict[str, int]]:
    order = {"label": CODES, "source": source_names(), "split": SPLITS}
    counts = Counter(zip(frame[rows], frame[columns], strict=True))
    return {
        row: {column: counts[row, column] for column in order[columns] if (frame[columns] == column).any()}
        for row in order[rows]
        if (frame[rows] == row).any()
    }


def _tally(faults: Faults) -> dict[str, dict[str, Any]]:
    return {
        kind: {"count": len(examples), "examples": sorted(examples)[:_EXAMPLES]}
        for kind, examples in sorted(faults.examples.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def summary(dropped: Faults) -> str:
    """Return the reasons and their counts in one line."""
    return "; ".join(f"{kind}: {entry['count']:,}" for kind, entry in _tally(dropped).items())
