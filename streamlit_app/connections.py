"""The services behind the page, shared by all sessions."""

import streamlit as st

from streamlit_app import example_pictures
from streamlit_app.answer_schema import PromoterState
from streamlit_app.client import PredictionClient, promoter_state, setting
from streamlit_app.monitor_client import MonitorClient
from streamlit_app.readings import Upload
from streamlit_app.review_client import ReviewClient

STATE_SECONDS = 5  # the oldest state that the page shows


@st.cache_resource(show_spinner=False)
def prediction_client() -> PredictionClient:
    """Return the client of the model server, with one pool of connections."""
    return PredictionClient(setting("TORCHSERVE_URL"))


@st.cache_resource(show_spinner=False)
def monitor_client() -> MonitorClient:
    """Return the client of the monitor."""
    return MonitorClient(setting("MONITOR_URL"))


@st.cache_resource(show_spinner=False)
def review_client() -> ReviewClient:
    """Return the client of the monitor's reviews."""
    return ReviewClient(setting("MONITOR_URL"))


@st.cache_resource(show_spinner=False)
def examples() -> list[Upload]:
    """Return the example pictures."""
    return example_pictures.uploads()


@st.cache_data(ttl=STATE_SECONDS, show_spinner=False)
def model_server_is_up() -> bool:
    """Return whether the model server answers."""
    return prediction_client().is_up()


@st.cache_data(ttl=STATE_SECONDS, show_spinner=False)
def promoter() -> PromoterState | None:
    """Return the promoter's status, or None if no promoter answers."""
    return promoter_state(setting("PROMOTER_URL"))
