#!/usr/bin/env bash
# Start the MLflow server: runs, artifacts and the model registry. Runs from any folder; Ctrl-C stops it.
#
#   mlflow_tracking/mlflow_server.sh                    http://127.0.0.1:5001, SQLite and files in .stack/
#   MLFLOW_PORT=5002 mlflow_tracking/mlflow_server.sh   another port
#
# A SQLite database of an older MLflow is backed up next to it and upgraded. Options are passed to `mlflow server`.
#
# Other settings are MLflow's own: MLFLOW_BACKEND_STORE_URI (postgresql://…), MLFLOW_ARTIFACTS_DESTINATION (s3://…),
# MLFLOW_SERVER_ALLOWED_HOSTS (host:port, comma-separated; replaces the list below). The environment keeps a database's
# password out of the list of processes.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
state="${STACK_STATE:-.stack}"
[[ "$state" = /* ]] || state="$root/$state"

if [[ -x "$root/.venv/bin/mlflow" ]]; then PATH="$root/.venv/bin:$PATH"; fi
if ! command -v mlflow >/dev/null; then
  echo "mlflow is not installed. Run \`make env\` in $root first." >&2
  exit 1
fi
if ! mkdir -p "$state/mlartifacts"; then
  echo "The state folder $state cannot be made. Set another one in STACK_STATE." >&2
  exit 1
fi

export MLFLOW_BACKEND_STORE_URI="${MLFLOW_BACKEND_STORE_URI:-sqlite:///$state/mlflow.db}"
export MLFLOW_ARTIFACTS_DESTINATION="${MLFLOW_ARTIFACTS_DESTINATION:-$state/mlartifacts}"
# MLflow rejects other Host headers, so that a page on another site cannot reach a server on this machine.
export MLFLOW_SERVER_ALLOWED_HOSTS="${MLFLOW_SERVER_ALLOWED_HOSTS:-127.0.0.1,127.0.0.1:*,localhost,localhost:*}"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
# The job runner needs eight processes and 2 GB for features that this project does not use.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$(dirname "$(command -v mlflow)")/python" -m mlflow_tracking.registry_database

exec mlflow server --host "${MLFLOW_HOST:-127.0.0.1}" --port "${MLFLOW_PORT:-5001}" \
  --workers "${MLFLOW_WORKERS:-1}" --serve-artifacts "$@"
