"""The page: upload pictures of skin lesions; see nine probabilities, a heatmap, and how sure the model is.

    streamlit run streamlit_app/app.py

Settings, all from the environment: TORCHSERVE_URL, PROMOTER_URL, MLFLOW_PUBLIC_URL.
"""

from dataclasses import replace
from pathlib import Path

import streamlit as st
from PIL import Image

from streamlit_app import cards, utils
from streamlit_app.client import (
    OF_THE_PICTURE,
    UNKNOWN,
    Answer,
    Promotion,
    ServingError,
    TorchServe,
    promotion,
    setting,
)
from streamlit_app.readings import Reading, Readings, Upload

HERE = Path(__file__).parent
FILE_TYPES = ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"]
MOST = 50  # pictures at a time: what a table shows well and one session may hold in memory


@st.cache_resource(show_spinner=False)
def torchserve(url: str) -> TorchServe:
    """One pool of connections for all sessions."""
    return TorchServe(url)


@st.cache_data(ttl=5, show_spinner=False)
def server_is_up(url: str) -> bool:
    """Asked at most every five seconds."""
    return torchserve(url).is_up()


@st.cache_data(ttl=5, show_spinner=False)
def promoter(url: str) -> Promotion | None:
    """Asked at most every five seconds."""
    return promotion(url)


@st.cache_resource(max_entries=64, show_spinner=False)
def picture(sha256: str, _data: bytes) -> Image.Image | None:
    """A picture for display; decoded once, and only after the model server has accepted it."""
    return utils.open_picture(_data)


@st.cache_data(max_entries=512, show_spinner=False)
def thumbnail(sha256: str, _data: bytes) -> str | None:
    """A picture for the table."""
    shown = picture(sha256, _data)
    return utils.thumbnail(shown) if shown else None


def sidebar(promoted: Promotion | None) -> None:
    """What runs behind the page."""
    up = server_is_up(setting("TORCHSERVE_URL"))
    entries = [("TorchServe", up, "answers" if up else "does not answer")]
    if promoted:
        entries.append(("Promoter", promoted.settled, promoted.words))
    with st.sidebar:
        st.html(cards.services(entries))
        if promoted and promoted.refused:
            st.html(cards.not_served(promoted.refused))
        st.html(cards.guide())
        st.link_button("Models and runs in MLflow", setting("MLFLOW_PUBLIC_URL"), icon=":material/open_in_new:")


def chosen_uploads() -> list[Upload]:
    """Pictures from the reader's files or camera, each named by its bytes once."""
    with st.container(key="intake"):
        invitation = st.empty()
        source = st.segmented_control(
            "Where the pictures come from", ["Files", "Camera"], default="Files", required=True, key="source",
            label_visibility="collapsed",
        )  # fmt: skip
        if source == "Camera":
            st.caption("Through a dermoscope only: of an ordinary photograph of skin the classes mean nothing.")
            taken = st.camera_input("Photograph the lesion", label_visibility="collapsed", resolution="1080p")
            files = [taken] if taken else []
        else:
            files = st.file_uploader(
                "Dermoscopy pictures", FILE_TYPES, accept_multiple_files=True, key="files",
                label_visibility="collapsed",
            )  # fmt: skip
        if not files:
            invitation.html(cards.hero())
    if len(files) > MOST:
        st.warning(f"These are {len(files)} pictures; the first {MOST} are read.", icon=":material/filter_list:")
    known: dict[str, Upload] = st.session_state.setdefault("uploads", {})
    now = {file.file_id: known.get(file.file_id) or Upload.of(file.name, file.getvalue()) for file in files[:MOST]}
    st.session_state.uploads = now  # what was removed is let go
    told = st.session_state.setdefault("told", {})
    return [replace(upload, told=dict(told.get(upload.sha256, {}))) for upload in now.values()]


def read(uploads: list[Upload], readings: Readings) -> list[Reading]:
    """Ask about every picture that has no answer yet."""
    bar = st.progress(0.0, "Reading the pictures …")
    try:
        return readings.ask_all(
            torchserve(setting("TORCHSERVE_URL")), uploads, lambda share: bar.progress(share, "Reading the pictures …")
        )
    finally:
        bar.empty()


def choose(answered: list[Reading], everything: list[Reading]) -> Reading:
    """A table of many pictures; returns the one that is selected in it."""
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.html(cards.counts(everything), width="content")
        st.download_button(
            "Download as CSV", utils.to_csv(everything), "skin_lesions.csv", "text/csv", on_click="ignore",
            icon=":material/download:",
        )  # fmt: skip
    percent = st.column_config.ProgressColumn(format="%.1f %%", min_value=0, max_value=100, width="small")
    event = st.dataframe(
        utils.overview(answered, [thumbnail(r.upload.sha256, r.upload.image) for r in answered]),
        key="overview", hide_index=True, row_height=52, on_select="rerun", selection_mode="single-row-required",
        column_config={
            "Picture": st.column_config.ImageColumn("", width="small"),
            "Probability": percent, "All malignant": percent, "None of these": percent,
        },
        alt="One row for each picture: file, most likely class, probabilities, certainty",
    )  # fmt: skip
    rows = event.selection.rows
    return answered[rows[0] if rows and rows[0] < len(answered) else 0]


def patient(reading: Reading, answer: Answer) -> None:
    """Fields for what the model takes beside the picture; all of it may be left open."""
    sha256, takes = reading.upload.sha256, answer.model.takes

    def tell(name: str) -> None:
        # Streamlit forgets a field that a run does not draw, such as that of another picture; this is kept.
        told = st.session_state.told.setdefault(sha256, {})
        told.pop(name, None)
        if (value := st.session_state[f"{name}-{sha256}"]) not in (None, ""):
            told[name] = value

    st.html(cards.patient())
    for place, (name, choices) in zip(st.columns(len(takes), gap="medium"), takes.items(), strict=True):
        key, known = f"{name}-{sha256}", reading.upload.told.get(name)
        if known is not None and answer.model.knows(name, known):
            st.session_state.setdefault(key, known)
        if name == "age":
            low, high = (int(float(end)) for end in choices)
            place.number_input(
                "Age in years", low, high, None, key=key, placeholder="not known", on_change=tell, args=(name,)
            )
        else:
            place.selectbox(
                name.capitalize(), ["", *choices], key=key, on_change=tell, args=(name,),
                format_func=lambda word: word or "not known",
            )  # fmt: skip


@st.fragment
def heatmap(reading: Reading, answer: Answer, readings: Readings) -> None:
    """Picture beside heatmap; moving the slider runs only this, and asks nobody."""
    upload = reading.upload
    shown = picture(upload.sha256, upload.image)
    if shown is None:
        st.info("The model has read this picture, but the page cannot show its format.")
        return
    known = [code for code in answer.ranking if code != UNKNOWN]
    left, right = st.columns(2, gap="medium")
    with st.container(key="heat-controls"):
        pick, fade = st.columns(2, gap="medium")
    target = pick.selectbox(
        "Evidence for", ["", *known], key=f"target-{upload.sha256}",
        format_func=lambda code: (
            f"{answer.classes[code].name} ({utils.percent(answer.probabilities[code])})" if code
            else "the most likely class"
        ),
    )  # fmt: skip
    opacity = fade.slider("Opacity of the heatmap", 0, 100, 60, format="%d %%", key="opacity") / 100
    heat = answer.gradcam
    if target:
        try:
            heat = readings.ask(torchserve(setting("TORCHSERVE_URL")), upload, target).gradcam
        except ServingError as error:
            st.html(cards.outage(error))
        if readings.model != (answer.model.version, answer.model.digest):
            st.rerun()  # another model answers now: read everything anew
    name = answer.classes[heat.target].name
    left.html("<h4>Picture</h4>")
    left.image(shown, width="stretch", alt=f"The uploaded picture {upload.name}")
    right.html(f"<h4>Evidence for {cards.escape(name)}</h4>")
    # Within the page's message, not as a file: Streamlit drops the file of a run that a moving slider has overtaken.
    overlay = utils.data_url(utils.heat_overlay(shown, heat.grid, opacity))
    right.image(overlay, width="stretch", alt=f"Heatmap for {name}")
    right.html(cards.heat_scale())


st.set_page_config("Skin lesion reader", HERE / "icon.svg", layout="wide", initial_sidebar_state="collapsed")
st.html(HERE / "style.css")
with st.container(key="masthead"):
    st.html(cards.masthead())
promoted = promoter(setting("PROMOTER_URL"))
sidebar(promoted)

uploads = chosen_uploads()
if not uploads:
    st.html(cards.welcome())
    st.stop()

readings: Readings = st.session_state.setdefault("readings", Readings())
readings.announce(promoted.serving if promoted else None)
everything = read(uploads, readings)
answered = [reading for reading in everything if reading.answer]
refused = [reading for reading in everything if reading.problem and reading.problem.kind in OF_THE_PICTURE]
outage = next((r.problem for r in everything if r.problem and r.problem.kind not in OF_THE_PICTURE), None)
if outage:
    st.html(cards.outage(outage))
    st.button("Try again", type="primary", icon=":material/refresh:")
if refused:
    st.html(cards.refused(refused))
if not answered:
    st.stop()

reading = choose(answered, everything) if len(uploads) > 1 else answered[0]
answer = reading.answer
assert answer is not None
st.html(cards.verdict(answer, reading.upload.name))
if answer.model.takes:
    patient(reading, answer)
left, right = st.columns([7, 5], gap="large")
with left:
    heatmap(reading, answer, readings)
with right:
    st.html(f'<div class="sl-head"><h4>Nine probabilities</h4>{cards.legend(answer)}</div>')
    st.plotly_chart(
        utils.probability_figure(answer), key="bars", config={"displayModeBar": False}, alt=utils.in_words(answer)
    )
st.html(cards.uncertainty(answer))
with st.expander("What the nine classes mean"):
    st.html(cards.glossary(answer))
st.html(cards.provenance(answer, setting("MLFLOW_PUBLIC_URL")))
