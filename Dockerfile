# The images of the stack: `docker compose build`. Each target is one image. Heavy layers are shared, and the code comes
# last. Its user owns the code, so that a clone with a strict umask works too.
#
#   base ─┬─ prediction (torch, OpenVINO) ─┬─ torchserve
#         │                                └─ promoter ── training
#         ├─ mlflow
#         ├─ monitor
#         ├─ page
#         └─ proxy
#
# TORCH_INDEX is the package index of PyTorch's CPU wheels. If it is empty or unreachable, torch comes from the default
# index, with CUDA and several gigabytes.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 LANG=C.UTF-8
# A volume takes its owner from the folder on which it is first mounted: these are all writable folders.
RUN python3 -m venv --without-pip /opt/venv \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin app \
    && install -d /secrets \
    && install -d -o app -g app -m 0700 /run/management /run/torchserve /var/lib/kept_images /app/runs /secrets/kept /secrets/mlflow /secrets/monitor \
        /secrets/page /secrets/promoter \
    && install -d -o app -g app /app /var/lib/model_store /var/lib/minio /var/log/predictions \
        /secrets/postgres /secrets/minio /secrets/grafana
WORKDIR /app

FROM ${PYTHON_IMAGE} AS uv
COPY requirements/all.txt /tmp/
RUN pip install --no-cache-dir --no-deps --target /opt/uv "$(grep -o '^uv==[^ ;]*' /tmp/all.txt)"

FROM base AS prediction
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/prediction.txt,target=/requirements/prediction.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    TORCH_INDEX=$TORCH_INDEX sh /install.sh prediction

FROM prediction AS torchserve
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/torchserve.txt,target=/requirements/torchserve.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    sh /install.sh torchserve
COPY --chown=app containers/healthcheck.py containers/
COPY --chown=app torchserve/ torchserve/
USER app
ENTRYPOINT ["/app/torchserve/start_torchserve.sh"]

FROM prediction AS promoter
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/promoter.txt,target=/requirements/promoter.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    sh /install.sh promoter
ENV PYTHONPATH=/app GIT_PYTHON_REFRESH=quiet
COPY --chown=app containers/healthcheck.py containers/promoters.py containers/
COPY --chown=app model_store/ model_store/
COPY --chown=app torchserve/model-config.yaml torchserve/
COPY --chown=app handlers/ handlers/
COPY --chown=app mlflow_tracking/ mlflow_tracking/
COPY --chown=app scripts/__init__.py scripts/lineage.py scripts/promote.py scripts/register_model.py scripts/replay.py scripts/
RUN python -m compileall -q .
USER app
CMD ["python", "-m", "mlflow_tracking.promotion.service"]

FROM promoter AS training
ARG CODE_REVISION=unknown
ENV CODE_REVISION=$CODE_REVISION
USER root
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/training.txt,target=/requirements/training.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    sh /install.sh training
COPY --chown=app containers/train.sh containers/
COPY --chown=app training/ training/
COPY --chown=app scripts/ scripts/
USER app
ENTRYPOINT ["/app/containers/train.sh"]

FROM base AS mlflow
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/mlflow.txt,target=/requirements/mlflow.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    sh /install.sh mlflow
ENV PYTHONPATH=/app
COPY --chown=app handlers/__init__.py handlers/errors.py handlers/files.py handlers/
COPY --chown=app containers/healthcheck.py containers/make_secrets.py containers/make_bucket.py containers/
COPY --chown=app mlflow_tracking/mlflow_server.sh mlflow_tracking/registry_database.py mlflow_tracking/
USER app
ENTRYPOINT ["/app/mlflow_tracking/mlflow_server.sh"]

FROM base AS monitor
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/monitor.txt,target=/requirements/monitor.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    sh /install.sh monitor
ENV PYTHONPATH=/app
COPY --chown=app containers/healthcheck.py containers/
COPY --chown=app handlers/ handlers/
COPY --chown=app mlflow_tracking/ mlflow_tracking/
COPY --chown=app monitoring/ monitoring/
COPY --chown=app scripts/forget.py scripts/load_outcomes.py scripts/
RUN python -m compileall -q .
USER app
CMD ["python", "-m", "monitoring.monitor_service"]

FROM base AS page
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/page.txt,target=/requirements/page.txt \
    --mount=type=bind,source=containers/install.sh,target=/install.sh \
    sh /install.sh page
ENV PYTHONPATH=/app
COPY --chown=app containers/healthcheck.py containers/
COPY --chown=app streamlit_app/ streamlit_app/
RUN python -m compileall -q .
USER app
CMD ["python", "-m", "streamlit_app.page_server"]

FROM base AS proxy
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light libnginx-mod-stream >/dev/null \
    && rm -rf /var/lib/apt/lists/*
COPY --chown=app containers/healthcheck.py containers/nginx.conf containers/replicas.conf containers/proxy.py containers/
USER app
ENTRYPOINT ["python", "containers/proxy.py"]
