"""What one browser session has asked and been told: each picture once for each class, as long as the model stays."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from streamlit_app.client import PARALLEL, Answer, ServingError, TorchServe


@dataclass(frozen=True)
class Upload:
    """One picture as it came from the browser, not decoded."""

    name: str
    image: bytes
    sha256: str

    @classmethod
    def of(cls, name: str, image: bytes) -> "Upload":
        """Name the bytes by their SHA-256."""
        return cls(name, image, hashlib.sha256(image).hexdigest())


@dataclass(frozen=True)
class Reading:
    """An upload and what came of it: an answer, or why there is none."""

    upload: Upload
    answer: Answer | None = None
    problem: ServingError | None = None


class Readings:
    """Remembers answers and refusals; not outages, so that the next run asks again."""

    def __init__(self) -> None:
        self.announced: str | None = None  # the version that the promoter named last
        self.model: tuple[str | None, str | None] | None = None  # version and digest of all that is remembered
        self._known: dict[tuple[str, str | None], Answer | ServingError] = {}

    def announce(self, version: str | None) -> None:
        """Forget everything when the promoter names another version than before; None: it names none."""
        if None not in (version, self.announced) and version != self.announced:
            self._forget()
        self.announced = version or self.announced

    def ask(self, server: TorchServe, upload: Upload, target: str | None = None) -> Answer:
        """The answer for one picture and class, remembered or fresh.

        Raises:
            ServingError: there is none.
        """
        key = (upload.sha256, target)
        if key not in self._known:
            self._remember(key, _ask(server, upload, target))
        return _raised(self._known[key])

    def ask_all(
        self, server: TorchServe, uploads: Sequence[Upload], progress: Callable[[float], object] = lambda _: None
    ) -> list[Reading]:
        """A reading of each upload, in order, all by one model; after an outage the rest is not asked."""
        for _ in range(3):  # again when the model was changed in between
            outage = self._ask_missing(server, uploads, progress)
            if outage or all((upload.sha256, None) in self._known for upload in uploads):
                break
        otherwise = outage or ServingError("busy", "The model was changed while it was being asked.")
        results = [self._known.get((upload.sha256, None), otherwise) for upload in uploads]
        return [
            Reading(upload, problem=result) if isinstance(result, ServingError) else Reading(upload, answer=result)
            for upload, result in zip(uploads, results, strict=True)
        ]

    def _ask_missing(
        self, server: TorchServe, uploads: Sequence[Upload], progress: Callable[[float], object]
    ) -> ServingError | None:
        """Ask what is not known yet, several at a time; returns the first outage."""
        missing = {u.sha256: u for u in uploads if (u.sha256, None) not in self._known}
        with ThreadPoolExecutor(PARALLEL) as pool:
            asked = {pool.submit(_ask, server, upload, None): sha for sha, upload in missing.items()}
            for number, done in enumerate(as_completed(asked), 1):
                result = done.result()
                if isinstance(result, ServingError) and result.kind != "refused":
                    pool.shutdown(wait=False, cancel_futures=True)
                    return result
                self._remember((asked[done], None), result)
                progress(number / len(missing))
        return None

    def _remember(self, key: tuple[str, str | None], result: Answer | ServingError) -> None:
        if isinstance(result, ServingError):
            if result.kind != "refused":
                raise result
        else:
            model = (result.model.version, result.model.digest)
            if self.model not in (None, model):
                self._forget()
            self.model = model
        self._known[key] = result

    def _forget(self) -> None:
        self.model = None
        self._known.clear()


def _ask(server: TorchServe, upload: Upload, target: str | None) -> Answer | ServingError:
    try:
        return server.predict(upload.image, target)
    except ServingError as error:
        return error


def _raised(result: Answer | ServingError) -> Answer:
    if isinstance(result, ServingError):
        raise result
    return result
