"""A request: one picture with its options, checked against a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from handlers.bundle import BundleConfig
from handlers.errors import ImageError
from handlers.metadata import MetadataError
from handlers.taxonomy import CODES, UNKNOWN

GRADCAM_FORMS = ("grid", "overlay", "none")


class RequestError(ImageError):
    """A request with a wrong option; status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(400, "invalid_request", message)


@dataclass(frozen=True)
class Request:
    """One picture with its options.

    `gradcam` is "grid", "overlay" (a PNG as well) or "none". `target` is the class code of the map (default: the most
    probable). `tta` averages the logits over the picture and its mirror images. `metadata` are the patient's age in
    years, sex, and site of the lesion (handlers.metadata); any may be missing. With `picture`, the answer holds the
    decoded picture, small. `sensitivity` chooses one of the model's promises (handlers.suspicion).
    """

    image: bytes
    gradcam: str = "grid"
    target: str | None = None
    tta: bool = False
    metadata: Mapping[str, Any] | None = None
    picture: bool = False
    sensitivity: float | None = None

    def checked(self, config: BundleConfig) -> "Request":
        """Return the request with its metadata parsed for a model. Raises RequestError."""
        if self.gradcam not in GRADCAM_FORMS:
            raise RequestError(f"gradcam is {self.gradcam!r}: it must be one of {', '.join(GRADCAM_FORMS)}.")
        if self.target is not None and self.target not in CODES:
            raise RequestError(f"target is {self.target!r}: it must be one of {', '.join(CODES)}.")
        if self.target not in (None, UNKNOWN, *config.classes):
            raise RequestError(
                f"This model was not trained on {self.target}. Choose a target among {', '.join(config.classes)}."
            )
        if self.sensitivity is not None:
            alarm = config.calibration.malignant
            promised = alarm.sensitivities if alarm else ()
            if not promised:
                raise RequestError("This model promises no sensitivity; leave the option sensitivity out.")
            if self.sensitivity not in promised:
                raise RequestError(
                    f"sensitivity is {self.sensitivity}: this model promises {', '.join(map(str, promised))}. Choose "
                    "one of them."
                )
        try:
            return replace(self, metadata=config.metadata.parse(self.metadata or {}))
        except MetadataError as error:
            raise RequestError(str(error)) from error
