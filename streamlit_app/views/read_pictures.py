"""Read pictures: upload or examples, the answer for each picture, its heatmap, its report, and the table of many."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from streamlit_app import (
    charts,
    connections,
    example_pictures,
    heatmap,
    html_blocks,
    many_pictures,
    pictures,
    report,
    wording,
)
from streamlit_app.answer_schema import UNKNOWN, Answer
from streamlit_app.client import PICTURE_PROBLEMS, ServingError, keep_days, setting
from streamlit_app.readings import Reading, Readings, Upload

NOTE_LENGTH = 500  # characters
MAX_PICTURES = 50  # at a time: what a table shows well and one session may hold in memory
ROW_HEIGHT, THUMBNAIL_WIDTH, EXAMPLE_WIDTH = 52, 76, 190  # pixels


def read_pictures() -> None:
    """Draw this part of the page, from the upload down to the model that answered."""
    uploads = chosen_uploads()
    if not uploads:
        offer_examples()
        st.html(html_blocks.FEATURES)
        return
    readings: Readings = st.session_state.setdefault("readings", Readings())
    promoter = connections.promoter()
    readings.announce(promoter.serving if promoter else None)
    results = read(uploads, readings)
    show_problems(results)
    answered = [reading for reading in results if reading.answer]
    if answered:
        show_reading(choose(answered, results) if len(uploads) > 1 else answered[0], readings)
        offer_report(results)


def offer_examples() -> None:
    """Draw the examples, each with a button that reads it."""

    def choose_examples(examples: Sequence[Upload]) -> None:
        st.session_state.examples = examples

    examples = connections.examples()
    with st.container(key="examples"):
        st.html(html_blocks.EXAMPLES)
        with st.container(key="example-cards", horizontal=True, horizontal_alignment="center"):
            for example in examples:
                with st.container(width=EXAMPLE_WIDTH):
                    name = example_pictures.title(example)
                    st.image(example.image, width="stretch", alt=wording.EXAMPLE_ALT.format(title=name))
                    st.button(name, key=example.name, on_click=choose_examples, args=([example],), width="stretch")
        st.button(wording.EXAMPLES_READ_ALL, on_click=choose_examples, args=(examples,), type="tertiary")


def chosen_uploads() -> list[Upload]:
    """Return the pictures from the reader's files or camera, with the details of each patient."""
    with st.container(key="intake"):
        invitation = st.empty()
        source = st.segmented_control(
            wording.SOURCE_LABEL, [wording.FILES, wording.CAMERA], default=wording.FILES, required=True, key="source",
            label_visibility="collapsed",
        )  # fmt: skip
        if source == wording.CAMERA:
            st.caption(wording.CAMERA_ADVICE)
            photo = st.camera_input(wording.CAMERA_LABEL, label_visibility="collapsed", resolution="1080p")
            files = [photo] if photo else []
        else:  # any file name: the model server decides by the bytes
            files = st.file_uploader(
                wording.UPLOAD_LABEL, accept_multiple_files=True, key="files", label_visibility="collapsed"
            )
        if files:
            st.session_state.pop("examples", None)
        examples: Sequence[Upload] = st.session_state.get("examples", ())
        if examples:
            with invitation.container(key="examples-shown", horizontal=True, vertical_alignment="center"):
                st.html(html_blocks.EXAMPLES_SHOWN)
                st.button(wording.EXAMPLES_CLOSE, on_click=lambda: st.session_state.pop("examples"))
        elif not files:
            invitation.html(html_blocks.upload_invitation(keep_days()))
    if len(files) > MAX_PICTURES:
        st.warning(wording.TOO_MANY.format(count=len(files), limit=MAX_PICTURES), icon=":material/filter_list:")
    earlier: dict[str, Upload] = st.session_state.get("uploads", {})
    uploads = {example.sha256: example for example in examples} | {
        file.file_id: earlier.get(file.file_id) or Upload.of(file.name, file.getvalue())
        for file in files[:MAX_PICTURES]
    }
    st.session_state.uploads = uploads  # frees the pictures that were removed
    details = st.session_state.setdefault("details", {})
    return [replace(upload, details=dict(details.get(upload.sha256, {}))) for upload in uploads.values()]


def read(uploads: list[Upload], readings: Readings) -> list[Reading]:
    """Return a reading of each upload, with a progress bar while requests run."""
    bar = st.progress(0.0, wording.READING)
    try:
        client = connections.prediction_client()
        return readings.read_all(client, uploads, lambda share: bar.progress(share, wording.READING))
    finally:
        bar.empty()


def show_problems(results: list[Reading]) -> None:
    """Draw the outage, if there is one, and the pictures that the model server refused or failed on."""
    problems = [reading.problem for reading in results if reading.problem]
    if outage := next((problem for problem in problems if problem.kind not in PICTURE_PROBLEMS), None):
        st.html(html_blocks.outage(outage))
        st.button(wording.TRY_AGAIN, type="primary", icon=":material/refresh:")
    if unread := [r for r in results if r.problem and r.problem.kind in PICTURE_PROBLEMS]:
        st.html(html_blocks.unread(unread))


def choose(answered: list[Reading], results: list[Reading]) -> Reading:
    """Draw the table of many pictures and return the selected one."""
    sensitivity = st.session_state.get("sensitivity")
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.html(html_blocks.counts(results, sensitivity), width="content")
        st.download_button(
            wording.DOWNLOAD, many_pictures.to_csv(results, sensitivity), "skin_lesions.csv", "text/csv",
            on_click="ignore", icon=":material/download:",
        )  # fmt: skip
    columns: dict[str, Any] = {
        many_pictures.PICTURE: st.column_config.ImageColumn("", width=THUMBNAIL_WIDTH),
        **wording.COLUMNS,
    }
    for name in many_pictures.PERCENTAGES:
        columns[name] = st.column_config.ProgressColumn(
            wording.COLUMNS[name], format="%.1f %%", min_value=0, max_value=100, width="small"
        )
    rows = [
        (r.upload.name, thumbnail(r.upload.sha256, r.answer.image.picture_jpeg), r.answer) for r in answered if r.answer
    ]
    event = st.dataframe(
        many_pictures.overview(rows, sensitivity), key="overview", hide_index=True, row_height=ROW_HEIGHT,
        on_select="rerun", selection_mode="single-row-required", column_config=columns, alt=wording.TABLE_ALT,
    )  # fmt: skip
    selected = event.selection.rows
    return answered[selected[0] if selected and selected[0] < len(answered) else 0]


def show_reading(reading: Reading, readings: Readings) -> None:
    """Draw the answer for one picture."""
    answer = reading.answer
    assert answer is not None, "only answered readings are shown"
    show_alarm(answer)
    st.html(html_blocks.verdict(answer, reading.upload.name))
    if answer.model.takes:
        patient_details(reading.upload, answer)
    left, right = st.columns([7, 5], gap="large")
    with left:
        show_heatmap(reading.upload, answer, readings)
    with right:
        st.html(html_blocks.chart_heading(answer))
        chart = charts.probability_chart(answer)
        st.plotly_chart(chart, key="bars", config={"displayModeBar": False}, alt=charts.in_words(answer))
    st.html(html_blocks.uncertainty(answer))
    with st.expander(wording.GLOSSARY):
        st.html(html_blocks.glossary(answer))
    st.html(html_blocks.provenance(answer, setting("MLFLOW_PUBLIC_URL")))


def offer_report(results: list[Reading]) -> None:
    """Draw the field for a note and the button that downloads the report of all pictures shown."""
    with st.container(key="report", horizontal=True, vertical_alignment="bottom"):
        note = st.text_input(
            wording.REPORT_NOTE_LABEL, max_chars=NOTE_LENGTH, key="note", placeholder=wording.REPORT_NOTE_HINT,
        )  # fmt: skip
        sensitivity, mlflow = st.session_state.get("sensitivity"), setting("MLFLOW_PUBLIC_URL")
        st.download_button(
            wording.REPORT if len(results) == 1 else wording.REPORT_OF_ALL,
            lambda: report.render(results, datetime.now(UTC), mlflow, note, sensitivity),
            wording.REPORT_FILE, "text/html", on_click="ignore", icon=":material/print:", help=wording.REPORT_HELP,
        )  # fmt: skip


def show_alarm(answer: Answer) -> None:
    """Draw whether the lesion is suspicious, and the control of the promised sensitivity."""
    with st.container(key="alarm", horizontal=True, vertical_alignment="center"):
        st.html(html_blocks.alarm(answer, st.session_state.get("sensitivity")))
        if answer.suspicion and answer.suspicion.promises:
            choices = [promise.sensitivity for promise in answer.suspicion.promises]
            if st.session_state.get("sensitivity") not in choices:
                st.session_state.sensitivity = answer.suspicion.sensitivity
            st.selectbox(wording.SENSITIVITY_LABEL, choices, key="sensitivity", format_func=wording.misses, width=140)


def patient_details(upload: Upload, answer: Answer) -> None:
    """Draw the fields for the patient's details that the model takes; the reader may leave all of them empty."""

    def keep(name: str) -> None:
        # Streamlit forgets a field that a run does not draw, such as that of another picture.
        details = st.session_state.details.setdefault(upload.sha256, {})
        details.pop(name, None)
        if (value := st.session_state[f"{name}-{upload.sha256}"]) not in (None, ""):
            details[name] = value

    with st.container(key="details"):
        st.html(html_blocks.DETAILS_HEADING)
        takes = answer.model.takes
        for column, (name, choices) in zip(st.columns(len(takes), gap="medium"), takes.items(), strict=True):
            key, value = f"{name}-{upload.sha256}", upload.details.get(name)
            if value is not None and answer.model.accepts(name, value):
                st.session_state.setdefault(key, value)
            if name == "age":
                low, high = (int(float(age)) for age in choices)
                column.number_input(
                    wording.AGE, low, high, None, key=key, placeholder=wording.EMPTY_FIELD, on_change=keep, args=(name,)
                )
            else:
                column.selectbox(
                    name.capitalize(), ["", *choices], key=key, on_change=keep, args=(name,),
                    format_func=lambda word: word or wording.EMPTY_FIELD,
                )  # fmt: skip


@st.fragment
def show_heatmap(upload: Upload, answer: Answer, readings: Readings) -> None:
    """Draw the picture and its heatmap. The slider reruns only this function and sends no request."""
    shown = pictures.open_picture(answer.image.picture_jpeg)
    if answer.image.converted:
        st.caption(wording.CONVERTED.format(changes="; ".join(answer.image.converted)))
    if shown is None:
        st.info(wording.NOT_SHOWN)
        return
    left, right = st.columns(2, gap="medium")
    with st.container(key="heat-controls"):
        target_column, opacity_column = st.columns(2, gap="medium")
    target = target_column.selectbox(
        wording.HEAT_TARGET, ["", *(code for code in answer.ranking if code != UNKNOWN)], key=f"target-{upload.sha256}",
        format_func=lambda code: wording.with_percent(answer, code) if code else wording.HEAT_DEFAULT,
    )  # fmt: skip
    opacity = (
        opacity_column.slider(
            wording.HEAT_OPACITY, 0, 100, round(100 * heatmap.DEFAULT_OPACITY), format="%d %%", key="opacity"
        )
        / 100
    )
    heat = answer.gradcam
    if target:
        try:
            heat = readings.answer(connections.prediction_client(), upload, target).gradcam
        except ServingError as error:
            st.html(html_blocks.outage(error))
        if readings.identity != (answer.model.version, answer.model.digest):
            st.rerun()  # another model answers now: read all pictures again
    name = answer.classes[heat.target].name
    left.html(html_blocks.heading(wording.PICTURE))
    left.image(shown, width="stretch", alt=wording.PICTURE_ALT.format(name=upload.name))
    right.html(html_blocks.heading(wording.HEAT_HEADING.format(name=name)))
    # Within the page's message, not as a file: Streamlit drops the files of a run that a moving slider interrupts.
    overlay = pictures.data_url(heatmap.overlay(shown, heat.grid, opacity))
    right.image(overlay, width="stretch", alt=wording.HEAT_ALT.format(name=name))
    right.html(html_blocks.HEAT_SCALE)


@st.cache_data(max_entries=512, show_spinner=False)
def thumbnail(sha256: str, _jpeg: bytes) -> str | None:
    """Return a picture for the table, as an address."""
    shown = pictures.open_picture(_jpeg)
    return pictures.thumbnail(shown) if shown else None
