#!/bin/sh
# `docker compose run --rm training [OPTIONS] [KEY=VALUE ...]` trains with training/train.py and registers the model.
# Any other command runs as it is: `docker compose run --rm training python scripts/prepare_data.py --help`.
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

# The training handles a signal and saves its state. Without a trap this shell, and so the container, would end first.
trap : TERM INT
note=$(mktemp) # the training writes the path of its bundle here; the volume may hold others
BUNDLE_NOTE=$note python training/train.py "$@"
if [ -s "$note" ]; then
  python scripts/register_model.py --bundle "$(cat "$note")"
fi
