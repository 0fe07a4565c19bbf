"""Review: a reader says what a kept picture shows, then sees the model's answer, and keeps or changes the reading."""

import time
import uuid
from dataclasses import dataclass, field

import streamlit as st

from streamlit_app import (
    charts,
    connections,
    heatmap,
    html_blocks,
    monitor_blocks,
    pictures,
    review_access,
    review_blocks,
)
from streamlit_app import review_wording as wording
from streamlit_app.answer_schema import UNKNOWN, Answer
from streamlit_app.client import ServingError
from streamlit_app.monitor_client import MonitorError
from streamlit_app.review_schema import Kind, ReviewPicture, ReviewStatus

REFRESH_SECONDS = 10  # while no picture waits
DOUBLE_PRESS_SECONDS = 0.4  # a key that was pressed twice must not decide before the answer is seen


@dataclass
class OpenPicture:
    """The picture in this session, and what the reader has said so far. It is fetched again after each reading."""

    picture: ReviewPicture
    jpeg: bytes
    submission: str = field(default_factory=lambda: str(uuid.uuid4()))
    first_opinion: str = ""
    said_at: float = 0.0  # of the clock
    live: Answer | None = None  # with the heatmap, once the reader may see it


def review() -> None:
    """Draw this part of the page."""
    access = review_access.access()
    with st.container(key="review-head", horizontal=True, vertical_alignment="center"):
        st.html(review_blocks.TITLE)
        if access.signed_in:
            st.markdown(wording.SIGNED_IN_AS.format(reader=access.reader))
            st.button(wording.SIGN_OUT, on_click=st.logout, type="tertiary")
    if access.reason:
        draw_access(access)
        return
    try:
        status = connections.review_client().status(access.reader)
        draw_queue(access.reader, status)
    except MonitorError as error:
        st.session_state.pop("open_picture", None)
        st.html(monitor_blocks.problem(wording.AWAY, wording.AWAY_TEXT, str(error)))
        st.button(wording.TRY_AGAIN, icon=":material/refresh:")


def draw_access(access: review_access.Access) -> None:
    """Draw why this session may not review yet, and what to do."""
    if access.reason == "sign in":
        st.html(monitor_blocks.problem(wording.SIGN_IN_HEADING, wording.SIGN_IN_TEXT, kind="mild"))
        st.button(wording.SIGN_IN, on_click=st.login, type="primary", icon=":material/login:")
    elif access.reason == "not listed":
        text = wording.NOT_LISTED_TEXT.format(reader=access.reader)
        st.html(monitor_blocks.problem(wording.NOT_LISTED, text))
    elif access.reason == "off":
        st.html(monitor_blocks.problem(wording.OFF, wording.OFF_TEXT, kind="mild"))
    else:
        with st.form("reader-form", width=420):
            st.html(html_blocks.heading(wording.NAME_HEADING))
            st.caption(wording.NAME_HINT)
            name = st.text_input(wording.NAME_LABEL, max_chars=review_access.LONGEST_NAME)
            if st.form_submit_button(wording.NAME_BUTTON, type="primary") and name.strip():
                st.session_state.reader = st.query_params["reader"] = name.strip()
                st.rerun()


def draw_queue(reader: str, status: ReviewStatus) -> None:
    """Draw the progress and the next picture, or why there is none. Raises MonitorError."""
    kind = chosen_queue(status)
    st.html(review_blocks.note(_progress(status)))
    if kind == "reading" and not status.waiting and status.second:
        st.html(review_blocks.note(wording.SECOND.format(count=f"{status.second:,}")))
    if st.session_state.pop("late", False):
        st.warning(wording.LATE)
    if problem := st.session_state.pop("unrecorded", ""):
        st.error(wording.UNRECORDED.format(problem=problem))
    opened = open_picture(reader, kind)
    if opened:
        draw_picture(reader, status, opened)
    elif not status.keep_days and not status.kept:
        st.html(monitor_blocks.problem(wording.NOT_KEEPING, wording.NOT_KEEPING_TEXT, kind="mild"))
    elif kind == "adjudication":
        st.html(monitor_blocks.problem(wording.NO_DISPUTES, wording.NO_DISPUTES_TEXT, kind="mild"))
    else:
        st.html(monitor_blocks.problem(wording.EMPTY, wording.EMPTY_TEXT, kind="mild"))
        wait_for_pictures(reader)


def chosen_queue(status: ReviewStatus) -> Kind:
    """Draw the choice of the queue, if there are two, and return it."""
    if not status.disputed and st.session_state.get("queue") != "adjudication":
        return "reading"
    names: dict[Kind, str] = {
        "reading": wording.READ, "adjudication": wording.ADJUDICATE.format(count=status.disputed),
    }  # fmt: skip
    kind: Kind = st.segmented_control(
        wording.QUEUE_LABEL, list(names), format_func=names.__getitem__, default="reading", required=True, key="queue",
        label_visibility="collapsed",
    )  # fmt: skip
    return kind


def open_picture(reader: str, kind: Kind) -> OpenPicture | None:
    """Return the picture in this session, or fetch the reader's next one. Raises MonitorError."""
    opened: OpenPicture | None = st.session_state.get("open_picture")
    if opened is None or opened.picture.kind != kind:
        client = connections.review_client()
        picture = client.next_picture(reader, kind)
        opened = OpenPicture(picture, client.jpeg(picture.image_sha256)) if picture else None
        st.session_state.open_picture = opened
    return opened


@st.fragment(run_every=REFRESH_SECONDS)
def wait_for_pictures(reader: str) -> None:
    """Draw the page again once a picture waits."""
    try:
        status = connections.review_client().status(reader)
    except MonitorError:
        return
    if status.waiting + status.second + status.disputed:
        st.rerun()


def draw_picture(reader: str, status: ReviewStatus, opened: OpenPicture) -> None:
    """Draw a picture with the question, or with the model's answer after the first opinion."""
    left, right = st.columns([6, 5], gap="large")
    shown = pictures.open_picture(opened.jpeg)
    with left:
        if shown is None:
            st.warning(wording.PICTURE_GONE)
        else:
            st.image(pictures.data_url(shown), width="stretch", alt=wording.PICTURE_ALT)
        if opened.first_opinion and shown is not None:
            draw_heatmap(opened)
    with right:
        if opened.picture.readings:
            st.html(review_blocks.opinions(opened.picture.readings, _names(status)))
        if opened.first_opinion:
            draw_answer(reader, status, opened)
        else:
            st.html(html_blocks.heading(wording.QUESTION))
            st.caption(wording.QUESTION_TEXT)
            verdict_buttons(status, opened, reader)


def draw_answer(reader: str, status: ReviewStatus, opened: OpenPicture) -> None:
    """Draw the model's answer, and the choice to keep the reading, to agree with the model, or to change it."""
    answer, names = opened.picture.answer(status.classes), _names(status)
    top, said = answer.ranking[0], opened.first_opinion
    st.html(review_blocks.comparison(opened.picture, answer, names[said]))
    st.button(
        wording.KEEP.format(verdict=names[said]), type="primary", shortcut="K", width="stretch", key="keep",
        on_click=record, args=(reader, opened, said),
    )  # fmt: skip
    if top != said:
        st.button(
            wording.AGREE.format(name=names[top]), shortcut="A", width="stretch", key="agree",
            on_click=record, args=(reader, opened, top),
        )  # fmt: skip
    chart = charts.probability_chart(answer)
    st.plotly_chart(chart, key="bars", config={"displayModeBar": False}, alt=charts.in_words(answer))
    with st.expander(wording.CHANGE, expanded=True):
        verdict_buttons(status, opened, reader)


def verdict_buttons(status: ReviewStatus, opened: OpenPicture, reader: str) -> None:
    """Draw one button for each verdict, with its key."""

    def choose(verdict: str) -> None:
        if not opened.first_opinion:
            opened.first_opinion, opened.said_at = verdict, time.monotonic()
        elif time.monotonic() - opened.said_at > DOUBLE_PRESS_SECONDS:
            record(reader, opened, verdict)

    keys = {code: str(number) for number, code in enumerate(status.classes, 1)} | wording.OTHER_KEYS
    with st.container(key="verdicts"):
        for code, name in _names(status).items():
            st.button(
                name, key=f"verdict-{code}", shortcut=keys[code], width="stretch", wrap=True, on_click=choose,
                args=(code,),
            )  # fmt: skip


def record(reader: str, opened: OpenPicture, verdict: str) -> None:
    """Record the reading and close the picture. A monitor that is away keeps it open, and the same reading is sent."""
    try:
        connections.review_client().record(reader, opened.picture, opened.submission, opened.first_opinion, verdict)
    except MonitorError as error:
        if error.status != 409:
            st.session_state.unrecorded = str(error)
            return
        st.session_state.late = True
    st.session_state.open_picture = None


def draw_heatmap(opened: OpenPicture) -> None:
    """Draw the heatmap of the model's first class, by the version that serves now; the monitor stores none."""
    if opened.live is None:
        top = max(opened.picture.probabilities, key=opened.picture.probabilities.__getitem__)
        target = None if top == UNKNOWN else top
        try:
            opened.live = connections.prediction_client().predict(opened.jpeg, target, recorded=False)
        except ServingError:
            st.caption(wording.NO_HEAT)
            return
    live, shown = opened.live, pictures.open_picture(opened.jpeg)
    assert shown is not None, "the caller has shown it"
    name = live.classes[live.gradcam.target].name
    is_same = live.model.version == opened.picture.version
    text = wording.HEAT_OF if is_same else wording.HEAT_OTHER_VERSION
    st.html(html_blocks.heading(text.format(name=name, version=live.model.version)))
    overlay = heatmap.overlay(shown, live.gradcam.grid, heatmap.DEFAULT_OPACITY)
    st.image(pictures.data_url(overlay), width="stretch", alt=wording.HEAT_ALT.format(name=name))
    st.html(html_blocks.HEAT_SCALE)


def _names(status: ReviewStatus) -> dict[str, str]:
    """Return the name of each verdict, in the order of the buttons."""
    return {code: lesion.name for code, lesion in status.classes.items()} | wording.OTHER_VERDICTS


def _progress(status: ReviewStatus) -> str:
    everything = status.random.read + status.random.waiting
    return wording.progress(status.mine, status.waiting, status.settled, status.random.read, everything)
