"""Every sentence that people read on the page. Backticks mark code, asterisks bold text, {braces} values.

The names and descriptions of the classes and the reasons for a refusal come from the model server.
"""

from collections import Counter
from fractions import Fraction

from streamlit_app.answer_schema import Answer, ClassKind, PromoterState
from streamlit_app.certainty import certainty, equal_choices
from streamlit_app.client import ProblemKind

PAGE_TITLE = "Skin lesion reader"
NOTICE = "**Research use only.** Not a medical device."
READ_PICTURES = "Read pictures"  # the name of this part in the navigation

# Upload
UPLOAD_HEADING = "Read dermoscopy pictures"
UPLOAD_TEXT = (
    "The model gives nine probabilities and a heatmap for each picture. {kept} A log keeps each picture’s fingerprint "
    "(SHA-256) and its probabilities."
)
NOT_KEPT = "Pictures are not stored."
KEPT = "**Each picture is stored for {days} for review**, as a copy without metadata such as names and places."
UPLOAD_LABEL = "Drop one or several pictures here"
SOURCE_LABEL, FILES, CAMERA = "Source of the pictures", "Files", "Camera"
CAMERA_LABEL = "Photograph of the lesion"
CAMERA_ADVICE = "Use a dermoscope. The model was not trained on ordinary photographs of skin."
READING = "Reading the pictures …"
FEATURES = [  # icon of the Material Symbols that Streamlit ships, heading, text
    ("bar_chart", "Nine probabilities", "Eight diagnoses and “none of the above”. Malignant classes are marked."),
    ("blur_on", "A heatmap", "The parts of the picture that support the class you choose."),
    ("balance", "A measure of certainty", "A rating in plain words and a short list of likely classes."),
]

# Examples
EXAMPLES_HEADING = "No picture at hand?"
EXAMPLES_TEXT = "Try an example. These pictures are **drawn, not real**: they show how the page works, nothing more."
EXAMPLE_ALT = "{title}, not real"
EXAMPLES_READ_ALL = "Read all three"
EXAMPLES_SHOWN = "**Drawn, not real.** The answer shows how the page works and says nothing about the model."
EXAMPLES_CLOSE = "Close the examples"

# Answer
TOP_CLASS, TOP_PROBABILITY = "Most likely class", "probability"
TOP_CLASS_CAUTION = (
    "This is the most probable class, not a diagnosis. Malignant lesions can receive a benign class. A doctor decides."
)
ALL_MALIGNANT = "all malignant classes ({codes})"
DETAILS_HEADING = "Patient details"
DETAILS_TEXT = "Optional. Fields you leave empty are not used."
AGE, EMPTY_FIELD = "Age in years", "not given"
PICTURE, PICTURE_ALT = "Picture", "The uploaded picture {name}"
CONVERTED = "Before reading: {changes}."
NOT_SHOWN = "The model has read this picture. The model server sent no copy of it to show."
HEAT_TARGET, HEAT_DEFAULT = "Evidence for", "the most likely class"
HEAT_HEADING, HEAT_ALT = "Evidence for {name}", "Heatmap for {name}"
HEAT_OPACITY = "Opacity of the heatmap"
HEAT_LEAST, HEAT_MOST = "least", "most evidence in this map"
PROBABILITIES = "Nine probabilities"
LIKELY_CLASSES, LIKELY_NONE = "Likely classes", "none"
LIKELY_TEXT = (
    "For pictures like those used for calibration, this list is designed to contain the right class in {level} of 100 "
    "cases. A class that is not listed is not ruled out."
)
UNKNOWN_HEADING = "None of the above (UNK): {percent}"
UNKNOWN_TEXT = (
    "The higher this value, the less the other eight probabilities mean. The model notices most pictures that show no "
    "lesion. It mistakes most diseases that it has not learned for one that it has. A low value rules nothing out."
)
GLOSSARY = "The nine classes explained"
MODEL, MODEL_VERSION, MODEL_ALONE = "Model:", "{name} version {version}", "{name}, not registered"
TRAINING_RUN, REGISTRY_ENTRY = "training run", "registry entry"
KINDS: dict[ClassKind, str] = {"malignant": "malignant", "other": "not malignant", "unknown": "no known class"}
PRECANCEROUS = {"AK": "precancerous"}  # actinic keratosis can progress to a carcinoma

# Alarm
FLAGGED, NOT_FLAGGED = "Flagged as suspicious", "Not flagged"
ALARM_PROMISE = "Set to miss at most {misses} malignant lesions."
ALARM_PRICE = "On the calibration pictures it also flags {benign} in 100 other lesions."
NOT_FLAGGED_CAUTION = "A lesion that is not flagged can still be malignant. A doctor decides."
FLAGGED_CAUTION = "Most flagged lesions are benign. A doctor decides."
MELANOMA_FLAGGED = "Melanoma by itself: flagged"
MELANOMA_NOT_FLAGGED = "Melanoma by itself: not flagged"
NO_ALARM = (
    "**Suspicious or not: unknown.** This model promises no sensitivity for malignant lesions. A benign class rules "
    "nothing out."
)
SENSITIVITY_LABEL = "Miss at most"

# Report
REPORT, REPORT_OF_ALL, REPORT_FILE = "Report", "Report of all", "skin_lesion_report.html"
REPORT_HELP = "One HTML file with pictures, probabilities and the model’s version. Open it and print it."
REPORT_NOTE = "Note"
REPORT_NOTE_LABEL = "Note for the report"
REPORT_NOTE_HINT = "Optional. It appears in your report only."
REPORT_TITLE = "Skin lesion reader: report"
REPORT_WRITTEN, REPORT_READ = "Written {time}.", "Read {time}."
REPORT_DIGEST, REPORT_PICTURE = "Model digest", "Picture file’s SHA-256"
REPORT_DISCLAIMER = "Research use only. Not a medical device; not for diagnosis or treatment decisions."

# Many pictures
TOO_MANY = "You chose {count} pictures. The page reads the first {limit}."
COUNT_READ, COUNT_MALIGNANT = "**{number}** read", "**{number}** most likely malignant"
COUNT_FLAGGED = "**{number}** flagged"
COUNT_UNKNOWN, COUNT_REFUSED, COUNT_FAILED = (
    "**{number}** not recognised",
    "**{number}** refused",
    "**{number}** not read",
)
DOWNLOAD = "Download as CSV"
TABLE_ALT = "One row for each picture: file, most likely class, probabilities and certainty"
COLUMNS = {
    "file": "File", "flagged": "Flagged", "top": "Most likely class", "kind": "Kind", "probability": "Probability",
    "malignancy": "All malignant", "unknown": "None of the above", "certainty": "Certainty",
}  # fmt: skip

# Problems
TRY_AGAIN = "Try again"
ONE_REFUSED, MANY_REFUSED = "This picture was refused", "{number} pictures were refused"
ONE_UNREAD, MANY_UNREAD = "This picture was not read", "{number} pictures were not read"
OUTAGES: dict[ProblemKind, tuple[str, str]] = {  # headline, advice
    "unreachable": (
        "The model server does not answer",
        "Your pictures are kept on this page. Press **Try again** when the server is back. The operator can check it "
        "with `make status` or `docker compose ps`.",
    ),
    "timeout": ("The model server takes too long", "It may be starting or overloaded. Try again in a moment."),
    "busy": ("The model server is busy", "Too many requests are waiting. Try again in a moment."),
    "no_model": ("No model is deployed yet", "The operator deploys a version by its alias `champion` in MLflow."),
    "failed": ("The model failed on this picture", "The server’s log has the reason. Other pictures can be read."),
    "refused": ("There is no heatmap for this class", "The heatmap of the most likely class is shown instead."),
    "unexpected": ("The model server sent an unexpected answer", "The server’s log may have the reason."),
}

# Sidebar
STATUS_HEADING, MODEL_SERVER, DEPLOYMENT = "Status", "Model server", "Deployment"
RUNNING, NO_ANSWER, NOT_DEPLOYED = "Running", "Does not answer", "Not deployed"
MLFLOW_LINK = "Models and runs in MLflow"
GUIDE = [
    (
        "About the heatmap",
        "The heatmap (Grad-CAM) marks the parts of the picture that support the chosen class. It shows where the model "
        "looked, not where a disease is. Each map has its own scale: a bright spot does not mean a high probability.",
    ),
    (
        "About the probabilities",
        "The model was trained on dermoscopy pictures from a few clinics. Other cameras, skin types and diseases can "
        "mislead it. A doctor decides.",
    ),
]


def days(count: int) -> str:
    """Return a number of days."""
    return "1 day" if count == 1 else f"{count} days"


def upload_text(keep_days: int) -> str:
    """Return the invitation's text, which says before an upload whether pictures are kept."""
    return UPLOAD_TEXT.format(kept=KEPT.format(days=days(keep_days)) if keep_days else NOT_KEPT)


def percent(p: float) -> str:
    """Return a probability with at most one decimal, never rounded to certainty."""
    if 0 < p < 0.001:
        return "< 0.1 %"
    if 0.999 < p < 1:
        return "> 99.9 %"
    return f"{100 * p:.0f} %" if 0.1 <= p < 0.985 else f"{100 * p:.1f} %"


def kind(answer: Answer, code: str) -> str:
    """Return the kind of a class in a word or two."""
    return PRECANCEROUS.get(code, KINDS[answer.kind(code)])


def misses(sensitivity: float) -> str:
    """Return the promised share of missed lesions, such as "1 in 10"."""
    share = Fraction(1 - sensitivity).limit_denominator(100)
    return f"{share.numerator} in {share.denominator}"


def with_percent(answer: Answer, code: str) -> str:
    """Return a class's name and probability."""
    return f"{answer.classes[code].name} ({percent(answer.probabilities[code])})"


def certainty_text(answer: Answer) -> tuple[str, str]:
    """Return the model's certainty as a headline and a sentence."""
    level = certainty(answer)
    if level == "not recognised":
        return (
            "The model does not recognise this picture",
            "The other eight probabilities mean little here. The model also fails to recognise a few pictures of "
            "lesions that it knows.",
        )
    first, second = (answer.classes[code].name for code in answer.ranking[:2])
    sentences = {
        "high": f"Nearly all of the probability is on {first}.",
        "medium": f"The model leans towards {first}, followed by {second}.",
        "low": "The probability is spread over several classes.",
    }
    choices, entropy = equal_choices(answer), answer.uncertainty.entropy
    measure = f"An even choice among {choices:.1f} classes has the same entropy ({entropy:.2f} nats)."
    return f"Certainty: {level}", f"{sentences[level]} {measure}"


def deployment(state: PromoterState) -> str:
    """Return the state of the deployment in a sentence or two."""
    serving, champion = state.serving, state.champion
    now = f"Version {serving} is deployed." if serving else "No model is deployed."
    if len(state.replicas) > 1:
        counts = Counter(replica.version for replica in state.replicas if replica.version)
        parts = [f"version {version} on {count}" for version, count in sorted(counts.items())]
        now = f"{len(state.replicas)} model servers: {', '.join(parts) or 'none answers'}."
    if champion in {version.version for version in state.refused if version.final} and champion != serving:
        return f"{now} Version {champion} was refused."
    if champion not in (None, serving):
        return f"{now} Version {champion} is on its way."
    return now if state.settled or not state.errors else f"{now} {state.errors[0][:200]}"
