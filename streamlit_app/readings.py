"""What one browser session has asked and been told: each picture once for each class and for what is said of the
patient, as long as the model stays."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from streamlit_app.client import OF_THE_PICTURE, PARALLEL, Answer, Model, ServingError, TorchServe

Key = tuple[str, str | None, tuple[tuple[str, float | str], ...]]  # hash of the picture, class, what was told


@dataclass(frozen=True)
class Upload:
    """One picture as it came from the browser, not decoded, and what the reader says of the patient."""

    name: str
    image: bytes
    sha256: str
    told: dict[str, float | str] = field(default_factory=dict)

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
        self._says: Model | None = None  # the same model in its own words: what it takes
        self._known: dict[Key, Answer | ServingError] = {}

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
        key = self._key(upload, target)
        if key not in self._known:
            self._remember(key, _ask(server, upload, key))
        return _raised(self._known[key])

    def ask_all(
        self, server: TorchServe, uploads: Sequence[Upload], progress: Callable[[float], object] = lambda _: None
    ) -> list[Reading]:
        """A reading of each upload, in order, all by one model; after an outage the rest is not asked, and a picture on
        which the model fails is not asked again this time.

        A model is told of patients once it has said, in its first answer, what it takes.
        """
        failed: dict[Key, ServingError] = {}
        for _ in range(4):  # again when that is known, and when the model was changed in between
            outage = self._ask_missing(server, uploads, progress, failed)
            if outage or all(self._key(upload) in (self._known | failed) for upload in uploads):
                break
        otherwise = outage or ServingError("busy", "The model was changed while it was being asked.")
        results = [(failed | self._known).get(self._key(upload), otherwise) for upload in uploads]
        return [
            Reading(upload, problem=result) if isinstance(result, ServingError) else Reading(upload, answer=result)
            for upload, result in zip(uploads, results, strict=True)
        ]

    def _ask_missing(
        self,
        server: TorchServe,
        uploads: Sequence[Upload],
        progress: Callable[[float], object],
        failed: dict[Key, ServingError],
    ) -> ServingError | None:
        """Ask what is not known yet, several at a time; returns the first outage, and adds to `failed`."""
        missing = {key: upload for upload in uploads if (key := self._key(upload)) not in (self._known | failed)}
        outage: ServingError | None = None
        with ThreadPoolExecutor(PARALLEL) as pool:
            asked = {pool.submit(_ask, server, upload, key): key for key, upload in missing.items()}
            for number, done in enumerate(as_completed(asked), 1):
                if outage := self._note(asked.pop(done), done.result(), failed):
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
                progress(number / len(missing))
        for done, key in asked.items():  # what was under way when the outage showed
            result = None if done.cancelled() else done.result()
            # Another model's answer would make it forget the others, and nobody asks again.
            if isinstance(result, Answer) and self.model in (None, (result.model.version, result.model.digest)):
                self._remember(key, result)
        return outage

    def _note(self, key: Key, result: Answer | ServingError, failed: dict[Key, ServingError]) -> ServingError | None:
        """Keep what came of a picture; an outage, which says nothing of it, is returned."""
        if isinstance(result, ServingError) and result.kind not in OF_THE_PICTURE:
            return result
        if isinstance(result, ServingError) and result.kind != "refused":
            failed[key] = result
        else:
            self._remember(key, result)
        return None

    def _key(self, upload: Upload, target: str | None = None) -> Key:
        """What to ask: with as much of what the reader says as the model takes."""
        says = self._says
        told = [(name, value) for name, value in sorted(upload.told.items()) if says and says.knows(name, value)]
        return upload.sha256, target, tuple(told)

    def _remember(self, key: Key, result: Answer | ServingError) -> None:
        if isinstance(result, ServingError):
            if result.kind != "refused":
                raise result
            if key[2]:
                self._forget()  # perhaps another model answers now, which takes less: the picture alone will tell
        else:
            model = (result.model.version, result.model.digest)
            if self.model not in (None, model):
                self._forget()
            self.model, self._says = model, result.model
        self._known[key] = result

    def _forget(self) -> None:
        self.model = self._says = None
        self._known.clear()


def _ask(server: TorchServe, upload: Upload, key: Key) -> Answer | ServingError:
    _, target, told = key
    try:
        return server.predict(upload.image, target, dict(told))
    except ServingError as error:
        return error


def _raised(result: Answer | ServingError) -> Answer:
    if isinstance(result, ServingError):
        raise result
    return result
