"""Derive a bundle's serving graph from its weights, and check it against the golden answers."""

import hashlib
import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.bundle import CONFIG, GRAPH, GRAPH_WEIGHTS, Bundle, BundleConfig, BundleError, seal
from handlers.errors import UserError
from handlers.files import new_folder
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# The exported graph must give the eager model's answers in fp32 within these tolerances.
PROBABILITY_TOLERANCE = 1e-4
MAP_TOLERANCE = 0.01
# The modules that shape the graph: a graph in a cache is derived again after a change of one.
_GRAPH_MODULES = ("backbone.py", "gradcam.py", "graph_export.py", "serving_graph.py", "unknown_class.py")


def complete_once(bundle: Bundle, cache: Path) -> Bundle:
    """Return a verified bundle with its serving graph, which is derived at the first call and kept in `cache`.

    A completed bundle is returned as it is. Several processes may call this at the same time.

    Raises:
        BundleError: the exported graph disagrees with the eager model.
        UserError: the cache cannot be written.
    """
    if bundle.config.runtime:
        return bundle
    place = _place(bundle, cache)
    if place.exists():
        try:
            return Bundle.load(place)
        except BundleError as error:
            log.warning("The cached bundle is derived again. %s", error)
            shutil.rmtree(place, ignore_errors=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".") as temporary:
            derived = complete(bundle, Path(temporary) / "bundle")
            derived.path.rename(place)
    except OSError as error:
        if not place.exists():  # another process was not faster
            raise UserError(
                f"The folder {cache} for completed bundles cannot be written: {error.strerror}. Make it writable."
            ) from error
    return Bundle.load(place)


def _place(bundle: Bundle, cache: Path) -> Path:
    """Return the folder of a completed bundle: named after its digest, the code of the graph, and OpenVINO."""
    import openvino

    code = hashlib.sha256(openvino.__version__.encode())
    for name in _GRAPH_MODULES:
        code.update(Path(__file__).with_name(name).read_bytes())
    return cache / f"{bundle.digest.removeprefix('sha256:')[:32]}-{code.hexdigest()[:8]}"


def complete(bundle: Bundle, out: Path) -> Bundle:
    """Copy a verified bundle to `out`, with the serving graph derived from its weights if it has none yet.

    Raises:
        BundleError: the exported graph disagrees with the eager model.
    """
    with new_folder(out, CONFIG) as folder:
        bundle.copy_files(folder)
        if bundle.config.runtime:
            shutil.copyfile(bundle.path / CONFIG, folder / CONFIG)
            completed = bundle
        else:
            completed = seal_with_graph(Bundle.draft(folder, bundle.config))
    return replace(completed, path=out)


def seal_with_graph(draft: Bundle) -> Bundle:
    """Add the serving graph to a draft that holds all other files, seal it, and check the graph.

    A backbone that cannot be exported gets no graph; its bundle is marked runtime "torch".

    Raises:
        BundleError: the exported graph disagrees with the eager model.
    """
    from handlers.backbone import split_attention
    from handlers.serving_graph import serving_module

    module = serving_module(draft)
    runtime = "torch"
    if module.cam.exportable:
        try:
            split_attention(module.cam.backbone)
            export_graph(module, draft.config, draft.path)
            runtime = "openvino"
        # The exporters raise errors of many kinds. The eager model works after any of them.
        except Exception as error:
            log.warning(
                "%s cannot be exported, so torch will serve it, more slowly: %s",
                draft.config.architecture,
                next(iter(str(error).strip().splitlines()), type(error).__name__)[:200],
            )
    bundle = seal(draft.path, replace(draft.config, runtime=runtime))
    _check_golden(bundle)
    return bundle


def export_graph(module: "nn.Module", config: BundleConfig, folder: Path) -> None:
    """Write a module with the serving module's inputs to `folder` as a graph for batches of any size."""
    import openvino
    import torch

    size = config.preprocessing.image_size
    # Two rows, as torch.export takes a batch of one for a constant.
    example = [torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.tensor([-1, 0])]
    if width := len(config.metadata.columns):
        example.append(torch.zeros(2, width))
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = tuple({0: batch} for _ in example)
    with torch.no_grad():
        program = torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=False)
    graph = openvino.convert_model(program)
    graph.reshape({port: [-1, *tensor.shape[1:]] for port, tensor in zip(graph.inputs, example, strict=True)})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        openvino.save_model(graph, Path(temporary) / GRAPH, compress_to_fp16=False)
        for name in (GRAPH, GRAPH_WEIGHTS):
            (Path(temporary) / name).rename(folder / name)


def _check_golden(bundle: Bundle) -> None:
    """Compare the bundle in fp32 with the golden answers, which the eager model gave. Raises BundleError."""
    cases = bundle.golden()
    predictor = Predictor(bundle, precision="f32")
    answers = predictor.predict([Request(case.image, metadata=case.metadata) for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        if not isinstance(answer, Prediction):
            raise BundleError(f"The golden image {case.name} is refused. {answer}") from answer
        probability, cam = case.disagreement(answer.probabilities, answer.grid or [])
        if not (probability <= PROBABILITY_TOLERANCE and cam <= MAP_TOLERANCE):  # so that NaN disagrees
            raise BundleError(
                f"The serving graph disagrees with the model on {case.name}: probabilities differ by "
                f"{probability:.2g}, and 1 - correlation of the maps is {cam:.2g}."
            )
