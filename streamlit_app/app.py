"""The page: its configuration, its frame, and the navigation between its parts.

    streamlit run streamlit_app/app.py

Settings, all from the environment: TORCHSERVE_URL, PROMOTER_URL, MONITOR_URL, MLFLOW_PUBLIC_URL,
KEEP_IMAGES_DAYS.
"""

from pathlib import Path

import streamlit as st

from streamlit_app import connections, html_blocks, monitor_wording, review_wording, wording
from streamlit_app.client import setting
from streamlit_app.views.monitoring import monitoring
from streamlit_app.views.read_pictures import read_pictures
from streamlit_app.views.review import review

HERE = Path(__file__).parent
# A further part is a file in views/ and a line here.
PARTS = [
    st.Page(read_pictures, title=wording.READ_PICTURES, icon=":material/image_search:", default=True),
    st.Page(monitoring, title=monitor_wording.MONITORING, icon=":material/monitoring:"),
    st.Page(review, title=review_wording.REVIEW, icon=":material/rate_review:"),
]


def sidebar() -> None:
    """Draw the sidebar: the state of the services, and advice on reading an answer."""
    up, promoter = connections.model_server_is_up(), connections.promoter()
    services = [(wording.MODEL_SERVER, up, wording.RUNNING if up else wording.NO_ANSWER)]
    if promoter:
        services.append((wording.DEPLOYMENT, promoter.settled, wording.deployment(promoter)))
    with st.sidebar:
        st.html(html_blocks.services(services))
        if promoter and promoter.refused:
            st.html(html_blocks.not_deployed(promoter.refused))
        st.html(html_blocks.GUIDE)
        st.link_button(wording.MLFLOW_LINK, setting("MLFLOW_PUBLIC_URL"), icon=":material/open_in_new:")


st.set_page_config(wording.PAGE_TITLE, HERE / "icon.svg", layout="wide", initial_sidebar_state="collapsed")
st.html(HERE / "style.css")
part = st.navigation(PARTS, position="hidden")  # Streamlit's own menus cover the masthead, or hide with the sidebar
with st.container(key="masthead"):
    st.html(html_blocks.MASTHEAD)
    with st.container(key="parts", horizontal=True):
        for link in PARTS:
            st.page_link(link)
sidebar()
part.run()
