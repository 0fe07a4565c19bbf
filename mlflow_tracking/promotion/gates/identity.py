"""Identity gates: the candidate is the registered model, gives its golden answers, has not seen the evaluation set."""

import json
import subprocess
import sys
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from handlers.bundle import Bundle, GoldenCase
from handlers.predictor import Predictor
from handlers.preprocessing import fingerprint
from handlers.receipt import image_identities, overlap, read_receipt
from mlflow_tracking.promotion.answers import ask_one
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import Candidate, Gate, SetGate, Verdict
from mlflow_tracking.torchserve_client import TorchServeError
from mlflow_tracking.version_card import signature_types

LOCAL_TOLERANCE = 1e-3
LOCAL_SECONDS = 240.0  # for a few pictures on a machine that may be training; less than service.ALIVE_SECONDS
NO_TORCH = 3  # exit code


class RegistrationGate(Gate):
    """The archive holds the registered bundle, and MLflow's signature fits it. --force cannot overrule this gate."""

    name: ClassVar[str] = "digest and signature"
    decisive: ClassVar[bool] = True

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Compare archive, alias and registry."""
        digest, registered = candidate.bundle.digest, candidate.registered_digest
        if digest != candidate.release.digest or registered != candidate.release.digest:
            return self.verdict(False, f"The archive holds {digest}, but the registry says {registered}.")
        if candidate.signature is None:
            return self.verdict(
                False, "The registered version has no signature. Register its bundle with register_model.py."
            )
        inputs, outputs = candidate.signature
        expected_inputs, expected_outputs = signature_types(candidate.bundle)
        if [kind for _, kind in inputs] != [kind for _, kind in expected_inputs] or outputs != expected_outputs:
            names = ", ".join(name for name, _ in expected_inputs)
            return self.verdict(
                False,
                f"Its signature does not fit the model, which takes {names} and returns nine probabilities.",
            )
        return self.verdict(True, "Archive, registry and signature agree.", digest=digest)


class GoldenParityGate(Gate):
    """TorchServe, checkpoint and graph give the bundle's golden answers.

    Over REST this checks archive, handler, preprocessing, graph and calibration at once. Probabilities may differ by
    1e-3 if TorchServe computes in f32, by 1e-2 in a lower precision; the answer names its precision. The eager
    checkpoint and the graph run in f32 in a process of their own and may differ by 1e-3.
    """

    name: ClassVar[str] = "golden parity"
    decisive: ClassVar[bool] = True

    checkpoint: bool = True

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Compare the answers to the golden pictures."""
        cases = candidate.bundle.golden()
        if not cases:
            return self.verdict(False, "The bundle has no golden pictures.")
        figures: dict[str, Any] = {"max_difference": 0.0}
        for case in cases:
            if refusal := self._over_rest(candidate, case, figures):
                return refusal
        reason = f"Probabilities differ by at most {figures['max_difference']:.1e} in {figures['precision']} over REST."
        if not self.checkpoint:
            return self.verdict(True, reason, **figures)
        candidate.progress("checkpoint and graph answer locally")
        local = local_differences(candidate.bundle)
        if local is None:
            return self.skipped(f"{reason} The checkpoint did not run, because torch is not installed.", **figures)
        figures |= local
        for runtime, difference in local.items():
            if not difference <= LOCAL_TOLERANCE:
                return self.verdict(
                    False, f"Its {runtime} differs from a golden answer by {difference:.2g}.", **figures
                )
        worst = max(local.values())
        return self.verdict(True, f"{reason} Checkpoint and graph differ by at most {worst:.1e} locally.", **figures)

    def _over_rest(self, candidate: Candidate, case: GoldenCase, figures: dict[str, Any]) -> Verdict | None:
        """Ask about one case and update `figures`; return a verdict if it failed."""

        def progress() -> None:
            candidate.progress(f"version {candidate.release.version} answers its golden pictures")

        progress()
        try:
            answer, _ = ask_one(candidate.torchserve, candidate.release, case.image, case.metadata, progress)
        except TorchServeError as error:
            if error.transient:  # a worker died, perhaps for lack of memory, which is no reason to refuse the version
                raise
            return self.verdict(False, f"{case.name} got no answer: {error}")
        precision = answer["model"].get("precision", "f32")
        tolerance = 1e-3 if precision == "f32" else 1e-2
        difference = case.difference(answer["probabilities"])
        figures["max_difference"], figures["precision"] = max(figures["max_difference"], difference), precision
        if difference <= tolerance:
            return None
        figures["max_difference"] = difference  # also if it is NaN
        return self.verdict(
            False,
            f"{case.name}: a probability differs by {difference:.2g}; the tolerance in {precision} is {tolerance:g}.",
            **figures,
        )


class PreprocessingGate(Gate):
    """Serving turns the golden pictures into the pixels that training saw.

    The bundle keeps the mean colours of a 4×4 grid over each golden picture as the network gets it. This gate computes
    them again. Another version of a decoder changes them by less than one level of 255.
    """

    name: ClassVar[str] = "preprocessing"

    tolerance: float = Field(1.0, gt=0)

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Compare the grids."""
        preprocess = candidate.bundle.config.preprocessing
        worst = max(
            float(np.abs(fingerprint(preprocess(case.image)[0]) - np.array(case.colours)).max())
            for case in candidate.bundle.golden()
        )
        reason = f"The golden pictures' colours differ from training by {worst:.2g} of 255."
        return self.verdict(worst <= self.tolerance, reason, max_difference=worst)


class LeakageGate(SetGate):
    """No picture, lesion or patient of the evaluation set took part in the training."""

    name: ClassVar[str] = "leakage"

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare the bundle's receipt with the set."""
        receipt = read_receipt(candidate.bundle.path)
        seen = overlap(receipt, image_identities(evaluation.frame))
        figures = {
            "same_image": len(seen.same_image),
            "same_lesion": len(seen.same_lesion),
            "same_patient": len(seen.same_patient),
            "near": len(seen.near),
            "dataset_fingerprint": receipt.dataset_fingerprint,
        }
        return self.verdict(not seen.leaks, str(seen), **figures)


def local_differences(bundle: Bundle) -> dict[str, float] | None:
    """Return how far checkpoint and graph, in f32, are from the golden answers; None if torch is not installed.

    They run in a process of their own, so that torch does not stay in the promoter's memory. Raises OSError.
    """
    command = [sys.executable, "-m", __name__, str(bundle.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOCAL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"Checkpoint and graph did not answer the golden pictures within {LOCAL_SECONDS:g} s."
        ) from error
    if done.returncode == NO_TORCH:
        return None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise OSError(f"Checkpoint and graph could not answer the golden pictures here: {''.join(last)}")
    differences: dict[str, float] = json.loads(done.stdout)
    return differences


def _main(folder: str) -> int:
    """Print the differences as JSON and return the exit code."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return NO_TORCH
    bundle = Bundle.read(folder)  # the promoter verified it
    differences = {"checkpoint": Predictor(bundle, runtime="torch", precision="f32").golden_difference()}
    if bundle.has_graph:
        differences["graph"] = Predictor(bundle, runtime="openvino", precision="f32").golden_difference()
    print(json.dumps(differences))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
