#!/bin/sh
# `docker compose run --rm training [OPTIONS] [KEY=VALUE ...]` trains with training/train.py and registers the model.
# Any other command runs as it is: `docker compose run --rm training python scripts/prepare_data.py --help`.
#
# TRAINING_LAUNCHER replaces `python`: "torchrun --nproc-per-node=2" trains in two processes.
#
# Images come from ./data, mounted read-only at /app/data. Manifest, cache, checkpoints and bundles stay in the volume at
# /app/runs.
set -eu
case "${1:-}" in
  "" | -* | *=*) ;;
  *) exec "$@" ;;
esac

# With both set, training makes the manifest if there is none. A manifest that the caller names must exist, and a resumed
# run has its own.
case " $* " in
  *" manifest="* | *" --resume"*) ;;
  *) set -- manifest=/app/runs/manifest.csv data_dir=/app/data "$@" ;;
esac

note=$(mktemp) # the training writes the path of its bundle here; the volume may hold others
launcher=${TRAINING_LAUNCHER:-python}
export BUNDLE_NOTE="$note"
# shellcheck disable=SC2086  # the launcher may be several words
# The training handles a signal and saves its state. Without a trap this shell, and so the container, would end first.
if [ $$ != 1 ]; then
  trap : TERM INT
  $launcher training/train.py "$@"
else # in a pod; the first process alone gets the signal
  $launcher training/train.py "$@" &
  training=$!
  trap 'kill -TERM $training' TERM INT
  await() { code=0; wait "$training" || code=$?; } # a signal ends the wait
  await
  while kill -0 "$training" 2>/dev/null; do await; done
  [ "$code" = 0 ] || exit "$code"
fi
if [ -s "$note" ]; then
  python scripts/register_model.py --bundle "$(cat "$note")"
fi
