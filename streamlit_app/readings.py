"""The answers of one browser session. Each picture is sent once per class and per set of the patient's details, as
long as the same model serves."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from streamlit_app.answer_schema import Answer, ServedModel
from streamlit_app.client import PARALLEL, PICTURE_PROBLEMS, PredictionClient, ServingError

# SHA-256 of the picture, class of the heatmap, the patient's details that the model takes
RequestKey = tuple[str, str | None, tuple[tuple[str, float | str], ...]]
ROUNDS = 4  # requests of a batch: before and after the model says what it takes, and twice if it is replaced meanwhile


@dataclass(frozen=True)
class Upload:
    """A file as it came from the browser, not decoded, with the patient's details that the reader filled in."""

    name: str
    image: bytes
    sha256: str
    details: dict[str, float | str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, image: bytes) -> "Upload":
        """Return the upload of a file, with the SHA-256 of its bytes."""
        return cls(name, image, hashlib.sha256(image).hexdigest())


@dataclass(frozen=True)
class Reading:
    """An upload with its answer, or with the problem that prevented one."""

    upload: Upload
    answer: Answer | None = None
    problem: ServingError | None = None


class Readings:
    """Remembered answers and refusals. Outages are not remembered, so the next run of the page retries."""

    def __init__(self) -> None:
        self.announced: str | None = None  # the version that the promoter named last
        self.model: ServedModel | None = None  # the model of all remembered answers
        self._results: dict[RequestKey, Answer | ServingError] = {}

    @property
    def identity(self) -> tuple[str | None, str | None] | None:
        """Version and digest of the model that all remembered answers come from."""
        return _identity(self.model) if self.model else None

    def announce(self, version: str | None) -> None:
        """Forget all answers if the promoter names another version than before; None: it names no version."""
        if None not in (version, self.announced) and version != self.announced:
            self._forget()
        self.announced = version or self.announced

    def answer(self, client: PredictionClient, upload: Upload, target: str | None = None) -> Answer:
        """Return the answer for one picture and class, remembered or fresh.

        Raises:
            ServingError: there is no answer.
        """
        key = self._key(upload, target)
        if key not in self._results:
            self._remember(key, _request(client, upload, key))
        result = self._results[key]
        if isinstance(result, ServingError):
            raise result
        return result

    def read_all(
        self, client: PredictionClient, uploads: Sequence[Upload], progress: Callable[[float], object] = lambda _: None
    ) -> list[Reading]:
        """Return a reading of each upload, in order, all from the same model.

        An outage ends the batch. A picture on which the model fails is not retried in this batch. The patient's details
        are sent once the model's first answer says which it takes.
        """
        failed: dict[RequestKey, ServingError] = {}
        for _ in range(ROUNDS):
            outage = self._read_missing(client, uploads, progress, failed)
            if outage or all(self._key(upload) in (self._results | failed) for upload in uploads):
                break
        unread = outage or ServingError("busy", "The model was replaced during the requests.")
        results = [(failed | self._results).get(self._key(upload), unread) for upload in uploads]
        return [
            Reading(upload, problem=result) if isinstance(result, ServingError) else Reading(upload, answer=result)
            for upload, result in zip(uploads, results, strict=True)
        ]

    def _read_missing(
        self,
        client: PredictionClient,
        uploads: Sequence[Upload],
        progress: Callable[[float], object],
        failed: dict[RequestKey, ServingError],
    ) -> ServingError | None:
        """Send the uploads without a result, several at a time. Return the first outage and extend `failed`."""
        missing = {key: upload for upload in uploads if (key := self._key(upload)) not in (self._results | failed)}
        outage: ServingError | None = None

        def request(key: RequestKey, upload: Upload) -> Answer | ServingError | None:
            return _request(client, upload, key) if outage is None else None

        with ThreadPoolExecutor(PARALLEL) as pool:
            pending = {pool.submit(request, key, upload): key for key, upload in missing.items()}
            for number, done in enumerate(as_completed(pending), 1):
                key, result = pending[done], done.result()
                if isinstance(result, ServingError) and result.kind not in PICTURE_PROBLEMS:
                    outage = outage or result
                elif isinstance(result, ServingError) and result.kind == "failed":
                    failed[key] = result
                # After an outage, the answer of another model would forget answers that are not requested again.
                elif result and (outage is None or self._is_ours(result)):
                    self._remember(key, result)
                progress(number / len(missing))
        return outage

    def _is_ours(self, result: Answer | ServingError) -> bool:
        return isinstance(result, Answer) and self.identity in (None, _identity(result.model))

    def _key(self, upload: Upload, target: str | None = None) -> RequestKey:
        details = [(n, v) for n, v in sorted(upload.details.items()) if self.model and self.model.accepts(n, v)]
        return upload.sha256, target, tuple(details)

    def _remember(self, key: RequestKey, result: Answer | ServingError) -> None:
        if isinstance(result, ServingError):
            if result.kind != "refused":
                raise result
            if key[2]:
                self._forget()  # a new model may take fewer details: the next round sends the picture alone
        else:
            if self.identity not in (None, _identity(result.model)):
                self._forget()
            self.model = result.model
        self._results[key] = result

    def _forget(self) -> None:
        self.model = None
        self._results.clear()


def _identity(model: ServedModel) -> tuple[str | None, str | None]:
    return model.version, model.digest


def _request(client: PredictionClient, upload: Upload, key: RequestKey) -> Answer | ServingError:
    _, target, details = key
    try:
        return client.predict(upload.image, target, dict(details))
    except ServingError as error:
        return error
