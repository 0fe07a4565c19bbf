"""Every sentence of the page's part Review. Backticks mark code, asterisks bold text, {braces} values."""

REVIEW = "Review"
HEADING = "Review"
CANNOT_TELL, BAD_PICTURE = "cannot_tell", "bad_picture"
OTHER_VERDICTS = {CANNOT_TELL: "Cannot tell", BAD_PICTURE: "Bad picture"}
OTHER_KEYS = {CANNOT_TELL: "0", BAD_PICTURE: "B"}

# Who may review
NAME_LABEL, NAME_HINT, NAME_BUTTON = "Your name", "Your name is stored with each reading.", "Begin"
NAME_HEADING = "Who is reviewing?"
SIGN_IN_HEADING, SIGN_IN_TEXT, SIGN_IN = "Sign in to review", "Each reading is stored with your name.", "Sign in"
SIGN_OUT, SIGNED_IN_AS = "Sign out", "Reader: **{reader}**"
OFF = "The review is off"
OFF_TEXT = (
    "This page can be reached from other machines, and it has no sign-in. The operator sets `OIDC_CLIENT_ID` and the "
    "settings next to it to let signed-in people review."
)
NOT_LISTED = "You may not review here"
NOT_LISTED_TEXT = "You are signed in as {reader}. The operator lists the reviewers in `OIDC_REVIEWERS`."

# States
AWAY = "The review is not available"
AWAY_TEXT = "All your recorded readings are safe. Try again in a moment."
TRY_AGAIN = "Try again"
NOT_KEEPING = "No pictures are kept for review"
NOT_KEEPING_TEXT = (
    "The operator turns the review on by setting `KEEP_IMAGES_DAYS` to a number of days. From then on, pictures that "
    "the model answers wait here."
)
EMPTY = "No picture waits for you"
EMPTY_TEXT = "You have read everything. New pictures appear here some seconds after the model has answered them."
NO_DISPUTES = "No readings differ"
NO_DISPUTES_TEXT = "Pictures on which two readers differ appear here."
LATE = "This reading was not recorded: the picture was forgotten or decided meanwhile. Here is the next one."
UNRECORDED = "Your reading is not recorded yet. {problem} Choose again in a moment."
PICTURE_GONE = "This picture is not kept any more. Reload the page for the next one."

# The queue
QUEUE_LABEL, READ, ADJUDICATE = "Queue", "Read", "Adjudicate ({count})"
PROGRESS = (
    "**{mine}** read by you · **{waiting}** unread · **{settled}** settled · random share **{read}** of **{all}**"
)
SECOND = "All pictures are read. **{count}** wait for your second opinion."

# A picture
QUESTION = "What do you see?"
QUESTION_TEXT = "The model’s answer appears after you have chosen. Use the keys on the buttons."
PICTURE, PICTURE_ALT = "Picture", "The picture to be read"
DIFFER = "Two readings differ"
READING = "{reader}: **{verdict}**"
YOU_SAID = "You said: {verdict}"
MODEL_SAID = "The model says: **{name}** ({percent}), version {version}. {flagged}"
FLAGGED, NOT_FLAGGED = "It flags the picture as suspicious.", "It does not flag the picture."
KEEP, AGREE = "Keep {verdict}", "Agree with the model: {name}"
CHANGE = "Or change your reading"
HEAT_ALT = "Heatmap for {name}"
HEAT_OF = "Evidence for {name}"
HEAT_OTHER_VERSION = "Evidence for {name}, by version {version}, which serves now"
NO_HEAT = "There is no heatmap: the model server does not answer."


def progress(mine: int, waiting: int, settled: int, read: int, everything: int) -> str:
    """Return the line of progress."""
    return PROGRESS.format(mine=f"{mine:,}", waiting=f"{waiting:,}", settled=f"{settled:,}", read=read, all=everything)
