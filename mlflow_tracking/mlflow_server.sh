#!/usr/bin/env bash
# The MLflow server: runs, artifacts and the registry of skin_vit. Runs from any folder; Ctrl-C stops it.
#
#   mlflow_tracking/mlflow_server.sh                    http://127.0.0.1:5001, sqlite and files in .stack/
#   MLFLOW_PORT=5002 mlflow_tracking/mlflow_server.sh   another port
#
# Options are handed on to `mlflow server`.
#
# The other settings are MLflow's own: MLFLOW_BACKEND_STORE_URI (postgresql://…), MLFLOW_ARTIFACTS_DESTINATION
# (s3://…), MLFLOW_SERVER_ALLOWED_HOSTS (host:port, comma-separated; it replaces the list below). They are passed on in
# the environment, where a database's password does not show up in the list of processes.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
state="${STACK_STATE:-.stack}"
[[ "$state" = /* ]] || state="$root/$state"

if [[ -x "$root/.venv/bin/mlflow" ]]; then PATH="$root/.venv/bin:$PATH"; fi
if ! command -v mlflow >/dev/null; then
  echo "mlflow is not installed: run \`make env\` in $root first." >&2
  exit 1
fi
if ! mkdir -p "$state/mlartifacts"; then
  echo "The state folder $state cannot be made: name another in STACK_STATE." >&2
  exit 1
fi

export MLFLOW_BACKEND_STORE_URI="${MLFLOW_BACKEND_STORE_URI:-sqlite:///$state/mlflow.db}"
export MLFLOW_ARTIFACTS_DESTINATION="${MLFLOW_ARTIFACTS_DESTINATION:-$state/mlartifacts}"
# A Host header that is not listed is refused: a page on another site must not reach a server on this machine.
export MLFLOW_SERVER_ALLOWED_HOSTS="${MLFLOW_SERVER_ALLOWED_HOSTS:-127.0.0.1,127.0.0.1:*,localhost,localhost:*}"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
# The job runner serves features that this project does not use, with eight processes and 2 GB.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

exec mlflow server --host "${MLFLOW_HOST:-127.0.0.1}" --port "${MLFLOW_PORT:-5001}" \
  --workers "${MLFLOW_WORKERS:-1}" --serve-artifacts "$@"
