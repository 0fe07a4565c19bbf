"""Is the candidate what it says it is? Its digest and signature, its answers, its pixels, and what it has seen."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from pydantic import Field

from handlers.bundle import Bundle
from handlers.predictor import Predictor
from handlers.preprocessing import fingerprint
from handlers.receipt import image_identities, overlap, read_receipt
from mlflow_tracking.promotion.answers import ask_one
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import Candidate, Gate, SetGate, Verdict
from mlflow_tracking.promotion.torchserve_client import TorchServeError
from mlflow_tracking.version_card import signature_types

SECONDS = 300.0  # for the eager model and the graph to answer a few pictures, on a machine that trains beside it


class DigestAndSignature(Gate):
    """The archive holds the bundle that was registered, and MLflow's signature promises what it gives.

    Nobody may overrule this one: what is not the registered model is nobody's candidate.
    """

    name: ClassVar[str] = "digest and signature"
    decisive: ClassVar[bool] = True

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Compare bundle, alias and registry."""
        found, wanted = candidate.bundle.digest, candidate.release.digest
        if found != wanted or candidate.registered_digest != wanted:
            return self.holds(False, f"the archive holds {found}, the registry says {candidate.registered_digest}")
        if candidate.signature is None:
            return self.holds(False, "the registered version has no signature: register it with register_model.py")
        inputs, outputs = candidate.signature
        takes, gives = signature_types(candidate.bundle)
        if [kind for _, kind in inputs] != [kind for _, kind in takes] or outputs != gives:
            told = " and ".join(["one image", *candidate.bundle.config.metadata.fields])
            return self.holds(False, f"its signature is not {told} in, nine probabilities in taxonomy order out")
        return self.holds(True, "archive, registry and signature agree", digest=found)


class GoldenParity(Gate):
    """Checkpoint, graph and TorchServe give the bundle's golden answers.

    Over REST this proves the whole way at once: archive, handler, preprocessing, graph, calibration. Probabilities may
    differ by 1e-3 where TorchServe computes in f32, by 1e-2 in a lower precision (the answer says which). The
    checkpoint's eager model and the graph, both in f32, run in a process of their own and may differ by 1e-3.
    """

    name: ClassVar[str] = "golden parity"
    decisive: ClassVar[bool] = True

    checkpoint: bool = True

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Ask about the golden pictures."""
        release, worst, precision = candidate.release, 0.0, ""
        cases = candidate.bundle.golden()
        if not cases:
            return self.holds(False, "the bundle has no golden images")

        def go_on() -> None:
            candidate.progress(f"version {release.version} is asked about its golden pictures")

        for case in cases:
            go_on()
            try:
                answer, _ = ask_one(candidate.torchserve, release, case.image, case.metadata, go_on)
            except TorchServeError as error:
                if error.transient:  # a worker died, which may be for want of memory: no reason to refuse it for good
                    raise
                return self.holds(False, f"{case.name} got no answer: {error}")
            precision = answer["model"].get("precision", "f32")
            tolerance = 1e-3 if precision == "f32" else 1e-2
            difference = case.difference(answer["probabilities"])
            worst = max(worst, difference)
            if not difference <= tolerance:  # nor when it is no number
                reason = (
                    f"{case.name}: a probability is off by {difference:.2g}; {precision} may differ by {tolerance:g}"
                )
                return self.holds(False, reason, max_difference=difference, precision=precision)
        figures = {"rest": worst, "precision": precision}
        reason = f"probabilities differ by at most {worst:.1e} in {precision} over REST"
        if not self.checkpoint:
            return self.holds(True, reason, **figures)
        local = run_locally(
            candidate.bundle, lambda: candidate.progress("checkpoint and graph answer the golden pictures")
        )
        if local is None:
            return self.skips(f"{reason}; torch is not installed here to run the checkpoint", **figures)
        for runtime, found in local.items():
            if not found <= 1e-3:
                return self.holds(False, f"its {runtime} gives a golden probability off by {found:.2g}", **figures)
        told = ", ".join(f"{found:.1e} in the {runtime}" for runtime, found in local.items())
        return self.holds(True, f"{reason}, {told}", **figures, **local)


class PreprocessingFingerprint(Gate):
    """Serving turns the golden pictures into the pixels that training saw.

    The bundle keeps the mean colours of a 4×4 grid over each golden picture as the network gets it; here they are
    computed anew. A decoder of another version moves them by less than one level of 255.
    """

    name: ClassVar[str] = "preprocessing"

    tolerance: float = Field(1.0, gt=0)

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Compare the grids."""
        cases = candidate.bundle.golden()
        preprocess = candidate.bundle.config.preprocessing
        worst = max(
            float(np.abs(fingerprint(preprocess(case.image)[0]) - np.array(case.colours)).max()) for case in cases
        )
        reason = f"the golden pictures' colours differ by {worst:.2g} of 255 from those in training"
        return self.holds(worst <= self.tolerance, reason, max_difference=worst)


class LeakageReceipt(SetGate):
    """None of the evaluation set's pictures or lesions took part in the training."""

    name: ClassVar[str] = "leakage"

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare the bundle's receipt with the set."""
        receipt = read_receipt(candidate.bundle.path)
        found = overlap(receipt, image_identities(evaluation.frame))
        figures = {
            "same_image": len(found.same_image),
            "same_lesion": len(found.same_lesion),
            "near": len(found.near),
            "dataset_fingerprint": receipt.dataset_fingerprint,
        }
        return self.holds(not found.leaks, str(found).rstrip("."), **figures)


def run_locally(bundle: Bundle, progress: Callable[[], None] = lambda: None) -> dict[str, float] | None:
    """How far checkpoint and graph, in f32, are from the golden answers; None where torch is not installed.

    In a process of its own: torch would stay in the promoter's memory, and takes seconds in which `progress`, called
    a few times a second, may raise to stop. OSError when it fails.
    """
    command = [sys.executable, "-m", __name__, str(bundle.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + SECONDS
        try:
            while True:
                try:
                    out, said = process.communicate(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    progress()
                    if time.monotonic() > end:
                        raise TimeoutError(f"the golden answers were not computed within {SECONDS:g} s") from None
        except BaseException:
            process.kill()
            raise
    if process.returncode == 3:
        return None
    if process.returncode:
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        raise OSError(f"the golden answers could not be computed here: {last[0]}")
    found: dict[str, float] = json.loads(out)
    return found


def _main(folder: str) -> int:
    """Print the differences as JSON; exit code 3 without torch."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return 3
    bundle = Bundle.read(folder)
    differences = {}
    for name, runtime in (("checkpoint", "torch"), ("graph", "openvino")):
        if runtime == "openvino" and not bundle.has_graph:
            continue
        differences[name] = Predictor(bundle, runtime=runtime, precision="f32").golden_difference()
    print(json.dumps(differences))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
