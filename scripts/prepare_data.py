"""Make one checked manifest of training images from the data sets you have.

Every [bold]--data[/] folder is recognised by looking: ISIC 2019 (truth and metadata CSV), ISIC 2018 task 3 (truth and
lesion groupings), HAM10000 (HAM10000_metadata.csv), a plain labels.csv (columns image and label; lesion_id, age, sex,
site if known), or folders named after classes (Train/melanoma/..., Test/nevus/...). Tables speak of an ISIC image
wherever it lies, so CSV files and images may be in different folders.

Each image is decoded; copies and near duplicates are found; a diagnosis is that of ISIC 2019's truth, else ISIC 2018,
HAM10000, labels.csv, the folder; images that folders alone put into two classes are left out. Lesions, joined with
their duplicates, are never divided between train, val, calibration and test. A Test/ folder and the challenges' own
test sets stay test.

Examples:

  python scripts/prepare_data.py --data data/HAM10000

  python scripts/prepare_data.py --data data/HAM10000 --data data/isic2019_csv --data data/isic9 --out data/manifest.csv

  python scripts/prepare_data.py --data my_photos --val 0.15 --calibration 0.15 --test 0.2 --seed 7

  python scripts/prepare_data.py --out data/manifest.csv --freeze-eval --eval-images 400

[bold]--freeze-eval[/] stores the pictures of one split in the MLflow registry, with labels and lesions: the frozen
evaluation set, on which every version is judged before it serves (docs/operations.md). With --data the manifest is made
first; without, the one of --out is taken as it is. The exit code is 1 when something cannot be used, 2 for wrong
options, 3 when MLflow is away.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from handlers.taxonomy import CODES
from mlflow_tracking.command_line import progress_bar
from mlflow_tracking.promotion.evaluation_set import EvaluationSetError, freeze, publish
from mlflow_tracking.registry import EVALUATION_SET, Registry, RegistryError, RegistryUnavailable
from mlflow_tracking.settings import Settings, SettingsError
from training.data.manifest import ManifestError, SharesError, build_manifest, fingerprint, read_manifest, report_path
from training.data.splits import DEFAULT_FRACTIONS, DEFAULT_SEED, SPLITS, Split

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(help=__doc__)
def prepare(
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder of a data set; repeat for more.", metavar="DIR")
    ] = None,
    out: Annotated[Path, typer.Option(help="The manifest to write; its report goes beside it.")] = Path(
        "data/manifest.csv"
    ),
    val: Annotated[float, typer.Option(help="Share of the images for choosing the epoch.")] = DEFAULT_FRACTIONS["val"],
    calibration: Annotated[
        float, typer.Option(help="Share for fitting temperature, rejection and conformal sets.")
    ] = DEFAULT_FRACTIONS["calibration"],
    test: Annotated[float, typer.Option(help="Share for the final measure.")] = DEFAULT_FRACTIONS["test"],
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = DEFAULT_SEED,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read images.", show_default="one a core")
    ] = None,
    freeze_eval: Annotated[bool, typer.Option("--freeze-eval", help="Store a split as the evaluation set.")] = False,
    eval_split: Annotated[
        Split | None, typer.Option(help="Which split of the manifest to freeze.", show_default="test")
    ] = None,
    eval_images: Annotated[
        int | None, typer.Option(min=1, help="About how many pictures to freeze.", show_default="all")
    ] = None,
) -> None:
    if not data and not freeze_eval:
        raise typer.BadParameter("give a data set with --data, or a manifest with --out and --freeze-eval.")
    if not freeze_eval and (eval_split or eval_images):
        raise typer.BadParameter("--eval-split and --eval-images say what to freeze; add --freeze-eval.")
    # Without a terminal rich would fold the report at 80 columns, in the middle of paths.
    console = Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    fractions = dict(zip(SPLITS, (round(1 - val - calibration - test, 6), val, calibration, test), strict=True))
    try:
        if data:
            with progress_bar("reading images") as progress:
                report = build_manifest(data, out, fractions=fractions, seed=seed, workers=workers, progress=progress)
            _show(console, report)
            console.print(f"\nWritten: {escape(str(out))} and {escape(str(report_path(out)))}")
        if freeze_eval:
            _freeze(console, out, eval_split or "test", eval_images)
    except (ManifestError, EvaluationSetError, SettingsError, RegistryError, RegistryUnavailable, OSError) as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}")
        code = 2 if isinstance(error, SharesError) else 3 if isinstance(error, RegistryUnavailable) else 1
        raise typer.Exit(code) from None


def _freeze(console: Console, manifest: Path, split: str, images: int | None) -> None:
    """Store a split of a manifest in the registry, and say what it is.

    Raises:
        ManifestError: the manifest cannot be read, or has nothing in the split.
        EvaluationSetError: a picture cannot be frozen.
        SettingsError: the registry's address cannot be.
        RegistryError, RegistryUnavailable: the registry refuses it, or is away.
    """
    frame = read_manifest(manifest)
    rows = frame[frame["split"] == split]
    if rows.empty:
        raise ManifestError(f"{manifest} has no images in the split {split!r}; there are {', '.join(SPLITS)}.")
    with tempfile.TemporaryDirectory() as temporary:
        evaluation = freeze(rows, Path(temporary), images)
        counts = evaluation.frame["label"].value_counts()
        by_class = ", ".join(f"{code} {counts[code]}" for code in CODES if code in counts)
        lesions = evaluation.frame["lesion_id"].nunique()
        registry = Registry(Settings.load().registry_uri)
        registration = publish(
            registry,
            evaluation,
            {
                "split": split,
                "images": str(len(evaluation)),
                "lesions": str(lesions),
                "classes": by_class,
                "dataset_fingerprint": fingerprint(frame),
            },
        )
    stored = "stored" if registration.created else "there already"
    console.print(f"\nEvaluation set: {len(evaluation):,} pictures of {lesions:,} lesions ({by_class})")
    console.print(f"Fingerprint: {evaluation.digest}")
    console.print(f"It is {stored} as {EVALUATION_SET} version {registration.version.version} in {registry.uri}")


def _show(console: Console, report: dict[str, Any]) -> None:
    console.print("[bold]Recognised[/]")
    for source in report["data"]:
        console.print(f"  {escape(source['directory'])}: {source['image_files']:,} image files")
        for table in source["tables"]:
            test = ", official test set" if table.get("official_test") else ""
            console.print(f"    {escape(table['file'])}: {table['kind']}, {table['rows']:,} rows{test}")
    for file, reason in report["ignored_tables"].items():
        console.print(f"  [yellow]ignored:[/] {escape(file)} {escape(reason)}")

    for title, name in (("Class", "class_by_split"), ("Source", "source_by_split"), ("Class", "class_by_source")):
        console.print(_count_table(title, report["counts"][name]))
    console.print(
        f"{report['image_files']:,} files -> {report['images']:,} images in {report['groups']:,} groups, "
        f"{report['groups_fixed_as_test']:,} of them test by their source"
    )
    settled = ", ".join(f"{name} {count:,}" for name, count in report["labels_settled_by"].items())
    console.print(f"Diagnoses settled by: {settled}")

    found = report["duplicates"]
    console.print(
        f"Duplicates: {found['copies_of_one_file']:,} files with the same bytes as another, "
        f"{found['copies_by_isic_identifier']:,} with the same ISIC identifier, {found['near_pairs']:,} near pairs"
    )
    if found["largest_set"]:
        console.print(f"  largest set, {len(found['largest_set'])} files:")
        for path in found["largest_set"][:10]:
            console.print(f"    {escape(path)}")
    largest = report["largest_group"]
    console.print(f"Largest group: {escape(largest['lesion_id'])}, {largest['images']} images")

    _show_tally(console, "Left out", report["dropped"])
    _show_tally(console, "Noted", report["notes"])
    console.print(f"\nFingerprint: {report['fingerprint']}")


def _count_table(title: str, counts: dict[str, dict[str, int]]) -> Table:
    columns = list(next(iter(counts.values())))
    table = Table(title, *columns, "all", show_footer=True)
    for row, cells in counts.items():
        table.add_row(row, *(f"{cells[column]:,}" for column in columns), f"{sum(cells.values()):,}")
    totals = [sum(cells[column] for cells in counts.values()) for column in columns]
    for column, total in zip(table.columns, ["all", *(f"{count:,}" for count in (*totals, sum(totals)))], strict=True):
        column.footer = total
        column.justify = "left" if column is table.columns[0] else "right"
    return table


def _show_tally(console: Console, title: str, tally: dict[str, dict[str, Any]]) -> None:
    if tally:
        console.print(f"\n[bold]{title}[/]")
    for kind, entry in tally.items():
        console.print(f"  {entry['count']:>7,}  {escape(kind)}")
        console.print(f"           [dim]e.g. {escape(entry['examples'][0])}[/]")


if __name__ == "__main__":
    app()
