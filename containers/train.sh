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

# A signal is the training's, which keeps what it has; without a trap this shell, and with it the container, would be
# gone before.
trap : TERM INT
started=$(mktemp)
python training/train.py manifest=/app/runs/manifest.csv data_dir=/app/data "$@"
# Of runs side by side each may find the other's as well: what is registered already is told so, and left.
find /app/runs -path '*/bundle/bundle.json' -newer "$started" | while IFS= read -r bundle; do
  python scripts/register_model.py --bundle "$(dirname "$bundle")" || exit 1
done
