import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as Grid

from handlers.errors import UsageError
from handlers.taxonomy import CODES
from mlflow_tracking.command_line import console, progress_bar, run, table
from mlflow_tracking.promotion.evaluation_set import freeze, publish
from mlflow_tracking.registry import EVALUATION_SET, Registry
from mlflow_tracking.stack_settings import Settings
from training.data.data_sets import data_sets
from training.data.manifest import ManifestError, fingerprint, read_manifest, report_path
from training.data.preparation import build_manifest, open_sources
from training.data.splits import DEFAULT_FRACTIONS, DEFAULT_SEED, SPLITS, Split

EXAMPLES = [
    "python scripts/prepare_data.py --data data/HAM10000",
    "python scripts/prepare_data.py --data data/HAM10000 --data data/isic2019_csv --out data/manifest.csv",
    "python scripts/prepare_data.py --data my_photos --val 0.15 --calibration 0.15 --test 0.2 --seed 7",
    "python scripts/prepare_data.py --sources",
    "python scripts/prepare_data.py --out data/manifest.csv --freeze-eval --eval-images 400",
]


def prepare(
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder of a data set; repeat for more.", metavar="DIR")
    ] = None,
    out: Annotated[Path, typer.Option(help="The manifest to write. Its report stands next to it.")] = Path(
        "data/manifest.csv"
    ),
    val: Annotated[float, typer.Option(help="Share of the images that choose the epoch.")] = DEFAULT_FRACTIONS["val"],
    calibration: Annotated[
        float, typer.Option(help="Share that fits temperature, rejection and conformal sets.")
    ] = DEFAULT_FRACTIONS["calibration"],
    test: Annotated[float, typer.Option(help="Share for the final test.")] = DEFAULT_FRACTIONS["test"],
    seed: Annotated[int, typer.Option(help="Another seed gives another split.")] = DEFAULT_SEED,
    clinical: Annotated[
        bool | None,
        typer.Option(
            "--clinical/--no-clinical",
            help="Use or leave out other pictures than dermoscopy. Default: use those of data sets without dermoscopy.",
        ),
    ] = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="List the known data sets, and what --data has of them; write nothing.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read images.", show_default="one per core")
    ] = None,
    freeze_eval: Annotated[bool, typer.Option("--freeze-eval", help="Store a split as the evaluation set.")] = False,
    eval_split: Annotated[
        Split | None, typer.Option(help="The split of the manifest to freeze.", show_default="test")
    ] = None,
    eval_images: Annotated[
        int | None, typer.Option(min=1, help="About how many pictures to freeze.", show_default="all")
    ] = None,
) -> None:
    """Make one checked manifest of training images from your data sets.

    Each --data folder is recognised by its tables (--sources lists them) or by folders named after classes. A table
    describes an ISIC image wherever it lies, so tables and images may be in different folders.

    Every image is decoded. Copies and near-duplicates are found. The best source decides each diagnosis: ISIC 2019
    first, folders last. No split divides a lesion, its near-duplicates or a patient. A Test/ folder and official test
    sets stay test.

    --freeze-eval stores a split in the MLflow registry as the evaluation set of the gates (docs/operations.md). With
    --data the manifest is made first, otherwise that of --out is used.
    """
    if sources:
        _show_data_sets()
        for folder in data or ():
            _show_folder(folder)
        return
    if not data and not freeze_eval:
        raise UsageError(
            "There is nothing to do. Name a data set with --data, or freeze a manifest with --freeze-eval."
        )
    if not freeze_eval and (eval_split or eval_images):
        raise UsageError("--eval-split and --eval-images need --freeze-eval. Add it, or leave them out.")
    if data:
        fractions = dict(zip(SPLITS, (round(1 - val - calibration - test, 6), val, calibration, test), strict=True))
        with progress_bar("reading images") as progress:
            report = build_manifest(
                data, out, fractions=fractions, seed=seed, clinical=clinical, workers=workers, progress=progress
            )
        _show(report)
        console.print(f"\nWritten: {out} and {report_path(out)}")
    if freeze_eval:
        _freeze(out, eval_split or "test", eval_images)


def _freeze(manifest: Path, split: str, images: int | None) -> None:
    """Store a split of a manifest in the registry, and describe it. Raises UserError."""
    frame = read_manifest(manifest)
    rows = frame[frame["split"] == split]
    if rows.empty:
        raise ManifestError(f"{manifest} has no images in the split {split!r}. Choose one of {', '.join(SPLITS)}.")
    with tempfile.TemporaryDirectory() as temporary:
        evaluation = freeze(rows, Path(temporary), images)
        counts = evaluation.frame["label"].value_counts()
        by_class = ", ".join(f"{code} {counts[code]}" for code in CODES if code in counts)
        lesions = evaluation.frame["lesion_id"].nunique()
        registry = Registry(Settings.load().registry_uri)
        tags = {"split": split, "images": str(len(evaluation)), "lesions": str(lesions), "classes": by_class}
        registration = publish(registry, evaluation, tags | {"dataset_fingerprint": fingerprint(frame)})
    console.print(f"\nEvaluation set: {len(evaluation):,} pictures of {lesions:,} lesions ({by_class})")
    console.print(f"Fingerprint: {evaluation.digest}")
    version = f"{EVALUATION_SET} version {registration.version.version} in {registry.uri}"
    if registration.created:
        console.print(f"Stored as {version}")
    else:
        console.print(f"Already stored as {version}")


def _show_data_sets() -> None:
    grid = table("Data sets that are recognised, best authority first", ["Source"], ["Table", "Columns", "Pictures"])
    for data_set in data_sets().values():
        columns = ", ".join(sorted(data_set.needs) or data_set.header or ["any"])
        grid.add_row(data_set.name, data_set.title, columns, data_set.photographs or "dermoscopy")
    grid.add_row("folder", "folders named after classes", "", "")
    console.print(grid)


def _show_folder(folder: Path) -> None:
    """Print the tables that are recognised in a folder, and how many of its images they diagnose."""
    sources = open_sources([folder])
    grid = table(f"\n{folder}", ["Table", "Source"], ["Rows"])
    for source in sources.tables:
        grid.add_row(source.path.name, source.kind, f"{len(source.rows):,}")
    for path, reason in sources.ignored_files.items():
        grid.add_row(Path(path).name, "not used", reason)
    console.print(grid)
    diagnosed = sum(bool(image.claims) for image in sources.images)
    console.print(f"{len(sources.images):,} images, {diagnosed:,} of them with a diagnosis")


def _show(report: dict[str, Any]) -> None:
    console.print("Recognised", style="bold")
    for source in report["data"]:
        console.print(f"  {source['directory']}: {source['image_files']:,} image files")
        for recognised in source["tables"]:
            test = ", official test set" if recognised.get("official_test") else ""
            console.print(f"    {recognised['file']}: {recognised['kind']}, {recognised['rows']:,} rows{test}")
    for file, reason in report["ignored_tables"].items():
        console.print(f"  not used: {file} {reason}", style="yellow")

    for title, name in (("Class", "class_by_split"), ("Source", "source_by_split"), ("Class", "class_by_source")):
        console.print(_count_table(title, report["counts"][name]))
    console.print(
        f"{report['image_files']:,} files -> {report['images']:,} images of {report['groups']:,} lesions. "
        f"{report['groups_fixed_as_test']:,} groups are test by their source."
    )
    console.print(f"{report['images_with_a_patient']:,} images name one of {report['patients']:,} patients.")
    settled = ", ".join(f"{name} {count:,}" for name, count in report["labels_settled_by"].items())
    console.print(f"Diagnoses settled by: {settled}")

    copies = report["duplicates"]
    console.print(
        f"Duplicates: {copies['copies_of_one_file']:,} files with the same bytes as another, "
        f"{copies['copies_by_isic_identifier']:,} with the same ISIC identifier, {copies['near_pairs']:,} near pairs"
    )
    _show_tally("Left out", report["dropped"])
    _show_tally("Noted", report["notes"])
    console.print(f"\nFingerprint: {report['fingerprint']}")


def _count_table(title: str, counts: dict[str, dict[str, int]]) -> Grid:
    columns = list(next(iter(counts.values())))
    grid = table("", [title, *columns, "all"])
    for column in grid.columns[1:]:
        column.justify = "right"
    totals = [sum(cells[column] for cells in counts.values()) for column in columns]
    for row, cells in counts.items():
        grid.add_row(row, *(f"{cells[column]:,}" for column in columns), f"{sum(cells.values()):,}")
    grid.add_row("all", *(f"{count:,}" for count in (*totals, sum(totals))))
    return grid


def _show_tally(title: str, tally: dict[str, dict[str, Any]]) -> None:
    if tally:
        console.print(f"\n{title}", style="bold")
    for kind, entry in tally.items():
        console.print(f"  {entry['count']:>7,}  {kind}")
        console.print(f"           e.g. {entry['examples'][0]}", style="dim")


if __name__ == "__main__":
    run(prepare, EXAMPLES)
