#!/bin/sh
# `docker compose run --rm training [OPTIONS] [KEY=VALUE ...]`: training/train.py, and the model it makes is registered.
# Anything else is run as it is: `docker compose run --rm training python scripts/prepare_data.py --help`.
#
# Images are read from ./data (mounted at /app/data, read-only); manifest, cache, checkpoints and bundles stay in the
# volume at /app/runs.
set -eu
case "${1:-}" in
  "" | -* | *=*) ;;
  *) exec "$@" ;;
esac

# Both are named, so that the manifest is made where there is none. Who names another means one that is there, and a run
# that is resumed has its own.
case " $* " in
  *" manifest="* | *" --resume"*) ;;
  *) set -- manifest=/app/runs/manifest.csv data_dir=/app/data "$@" ;;
esac

# A signal is the training's, which keeps what it has; without a trap this shell, and with it the container, would be
# gone before.
trap : TERM INT
note=$(mktemp) # where the training writes which bundle it made: others may be made in the same volume
BUNDLE_NOTE=$note python training/train.py "$@"
if [ -s "$note" ]; then
  python scripts/register_model.py --bundle "$(cat "$note")"
fi
