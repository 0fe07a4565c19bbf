"""Every sentence of the page's part Monitoring. Backticks mark code, asterisks bold text, {braces} values."""

from datetime import UTC, datetime, timedelta

MONITORING = "Monitoring"
HEADING = "Monitoring"
PERIODS = {"1 hour": 1, "24 hours": 24, "7 days": 168, "30 days": 720}
DEFAULT_PERIOD = "24 hours"
PERIOD_LABEL, VERSION_LABEL, ALL_VERSIONS = "Period", "Version", "all versions"

# Cards: name, and the sentence below the number
SERVING, SERVING_NOTHING = "Serving", "nothing yet"
VERSION = "version {version}"
SINCE = "started {time}"
PREDICTIONS, REFUSED_NOTE = "Predictions", "{refused} refused, {errors} errors"
LATENCY, LATENCY_NOTE = "Latency", "median; 95 % take at most {p95}"
FLAGGED, FLAGGED_NOTE = "Flagged", "of the predictions, as suspicious"
UNKNOWN, UNKNOWN_NOTE = "None of the above", "of the predictions have UNK first"
SETS, SETS_NOTE = "Likely classes", "on average for a picture"
EXPECTED = "{value} in the reference"
BOUNDS = "{low} to {high}"
DRIFT, DRIFT_NONE, DRIFT_ALARM = "Drift", "none", "alarm"
DRIFT_NOTHING = "this version has no reference to compare with"
DRIFT_NONE_NOTE = "{pictures} pictures are like those of the reference"
DRIFT_ALARM_NOTE = "began {since}; the pictures differ from the reference, mostly in {statistics}"
DRIFT_NAMES = 3  # statistics in the note
STATISTICS = {
    "size": "their size",
    "brightness": "brightness",
    "contrast": "contrast",
    "red": "red light",
    "blue": "blue light",
    "sharpness": "sharpness",
    "familiarity": "how familiar they are to the model",
}
ESTIMATED_DOUBTFUL = "do not rely on it: the pictures are not like those of the calibration split"
ESTIMATED, ESTIMATED_NOTE = "Estimated accuracy", "if the model is calibrated for these pictures"
REALISED, REALISED_NOTE = (
    "Realised accuracy",
    "{low} to {high}; {outcomes} outcomes of all time; {missed} of malignant lesions missed",
)
REALISED_NOTHING = "no outcomes yet; `scripts/load_outcomes.py` loads them"
RANDOM = "Realised, random share"
RANDOM_NOTHING = "no randomly chosen picture is settled yet; this will be the honest estimate"
NO_VALUE = "–"

# Charts
TRAFFIC = "Requests"
ANSWERED, REFUSED, FAILED = "answered", "refused", "errors"
LATENCY_CHART = "Latency in milliseconds"
PERCENTILES = {"p50": "median", "p95": "95 %", "p99": "99 %"}
CLASS_MIX = "Most probable classes"
SHARES = "Shares of flagged and of UNK"
DRIFT_CHART = "Evidence of drift (powers of ten)"
DRIFT_LINES = {"joint": "joint", "input": "pictures", "output": "answers"}
ALARM_LINE = "alarm"
FLAGGED_SHARE, UNKNOWN_SHARE = "flagged", "UNK first"

# Tables
ALIAS_REMOVED = "alias {alias} removed"
EVENTS = "Versions"
EVENTS_NONE = "No version was served, refused or rolled back yet."
EVENT_COLUMNS = {"time": "Time", "event": "Event", "version": "Version", "by": "By", "remark": "Remark"}
EVENT_NAMES = {
    "serve": "serves",
    "check": "passed the gates",
    "check refused": "refused by the gates",
    "alias moved": "alias {alias} moved here",
    "alias seen": "alias {alias} seen here",
    "rollback": "target of a roll-back",
}
REFUSALS = "Refused requests"
REFUSALS_NONE = "None in this period."
SLICES = "Realised performance by sex, age and site"
SLICE_COLUMNS = ("Group", "Outcomes", "Accuracy", "Malignant missed")
SLICE_FIELDS = {"sex": "Sex", "age": "Age", "site": "Site"}
SLICE_NOT_SENT = "not sent"
SLICE_FEW = "fewer than 10 outcomes"
SLICE_MISSED = "{missed} of {malignant}"
SLICE_NOTE = "Small figures are 95 % intervals. Differences that lie within them may be chance."
LATEST = "Latest predictions"
LATEST_COLUMNS = {
    "time": "Time",
    "version": "Version",
    "code": "Class",
    "confidence": "Probability",
    "flagged": "Flagged",
    "milliseconds": "Milliseconds",
    "request_id": "Request",
}
LINEAGE = "`python scripts/lineage.py REQUEST` shows the model, the data and the gates behind a prediction."

# The report
REPORT, REPORT_FILE = "Report", "monitoring_report.html"
REPORT_HELP = "One HTML file with these figures. Open it and print it."
REPORT_TITLE = "Monitoring report"
REPORT_PERIOD = "{since} to {now}, {version}"
REPORT_TRAFFIC = ("Version", "Predictions", "Refused", "Errors", "Median", "95 %", "99 %")
REPORT_DRIFT = ("Version", "Alarm since", "Pictures", "Joint", "Pictures only", "Answers only", "Changed most")
REPORT_LINE = "the dashed line at {value} is the alarm"
REPORT_HIGHEST = "Bars are intervals of equal length; the highest has {count} requests."

# States
RECORDING_OFF = "Predictions are not recorded"
EMPTY = "No predictions in this period"
EMPTY_TEXT = "Read a picture, or choose a longer period. The figures refresh by themselves."
AWAY = "The figures cannot be shown"
AWAY_TEXT = "Predictions stay in the log and are counted as soon as the monitor works again."
DATABASE_AWAY = "The monitor's database does not answer; the newest predictions are missing."
BEHIND = "The monitor is {megabytes} MB behind the log; the newest predictions are missing."


def local_time(time: datetime) -> str:
    """Return a time as UTC, to the second."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def since(time: datetime, now: datetime) -> str:
    """Return how long ago a time is: seconds to days."""
    age = max(timedelta(0), now - time)
    for seconds, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if age.total_seconds() >= seconds:
            count = int(age.total_seconds() // seconds)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "less than a minute ago"


def milliseconds(value: float | None) -> str:
    """Return a latency."""
    return NO_VALUE if value is None else f"{value:.0f} ms"


def share(value: float | None) -> str:
    """Return a share in percent."""
    return NO_VALUE if value is None else f"{100 * value:.1f} %"
