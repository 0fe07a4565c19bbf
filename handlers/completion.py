"""Completion: derive a bundle's serving graph from its weights, and check it against the golden answers."""

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from handlers.backbone import split_attention
from handlers.bundle import CONFIG, GRAPH, GRAPH_WEIGHTS, Bundle, BundleConfig, BundleError, seal
from handlers.files import new_folder
from handlers.predictor import Predictor, Request
from handlers.runtimes import serving_module

log = logging.getLogger(__name__)

# The exported graph must give the eager model's answers in fp32 within these tolerances.
PROBABILITY_TOLERANCE = 1e-4
MAP_TOLERANCE = 0.01


def complete(source: Path, out: Path) -> Bundle:
    """Copy a bundle to `out` with the serving graph derived from its weights, checked against the eager model.

    A bundle that has its graph is copied as it is. One whose backbone cannot be exported is marked runtime "torch".

    Raises:
        BundleError: the source is damaged, or the exported graph disagrees with the eager model.
    """
    bundle = Bundle.load(source)
    with new_folder(Path(out), CONFIG) as folder:
        for name in bundle.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
        if bundle.config.runtime:
            shutil.copyfile(bundle.path / CONFIG, folder / CONFIG)
        else:
            module = serving_module(bundle)
            runtime = "torch"
            if module.cam.exportable:
                try:
                    split_attention(module.cam.backbone)
                    export_graph(module, bundle.config, folder)
                    runtime = "openvino"
                # The exporters fail in their own many ways; whichever it is, the eager model still works.
                except Exception as error:
                    log.warning(
                        "%s cannot be exported and will be served by torch, more slowly: %s",
                        bundle.config.architecture,
                        str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
                    )
            sealed = seal(folder, replace(bundle.config, runtime=runtime))
            _check(sealed)
    return Bundle.load(out)


def export_graph(module, config: BundleConfig, folder: Path) -> None:  # type: ignore[no-untyped-def]
    """Write a module that takes what the serving module takes to `folder` as a graph for any size of batch."""
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
    graph.reshape({given: [-1, *one.shape[1:]] for given, one in zip(graph.inputs, example, strict=True)})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        openvino.save_model(graph, Path(temporary) / GRAPH, compress_to_fp16=False)
        for name in (GRAPH, GRAPH_WEIGHTS):
            (Path(temporary) / name).rename(folder / name)


def _check(bundle: Bundle) -> None:
    """Hold the graph, in fp32, against the answers that the eager model gave at export. Raises BundleError."""
    cases = bundle.golden()
    predictor = Predictor(bundle, precision="f32")
    requests = [Request(case.image, metadata=case.metadata) for case in cases]
    for case, answer in zip(cases, predictor.predict(requests), strict=True):
        if isinstance(answer, Exception):
            raise BundleError(f"The golden image {case.name} is refused: {answer}") from answer
        probability, cam = case.disagreement(answer.probabilities, answer.grid or [])
        if not (probability <= PROBABILITY_TOLERANCE and cam <= MAP_TOLERANCE):  # so that NaN disagrees
            raise BundleError(
                f"The serving graph disagrees with the model on {case.name}: probabilities by {probability:.2g}, "
                f"1 - correlation of the maps {cam:.2g}."
            )
