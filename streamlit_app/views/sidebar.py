"""The sidebar: the state of the services, and advice on reading an answer."""

import streamlit as st

from streamlit_app import connections, html_blocks, wording
from streamlit_app.client import setting


def sidebar() -> None:
    """Draw the sidebar."""
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
