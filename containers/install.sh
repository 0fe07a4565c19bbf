#!/bin/sh
# While an image is built: install requirements/GROUP.txt into /opt/venv.
set -eu
wanted=$(mktemp)
cp "/requirements/$1.txt" "$wanted"
install() { /opt/uv/bin/uv pip install --quiet --python /opt/venv/bin/python --no-cache --no-deps --compile-bytecode "$@"; }

if [ -n "${TORCH_INDEX:-}" ]; then
  if python3 -c "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '/torch/', timeout=20)" "$TORCH_INDEX" 2>/dev/null; then
    # shellcheck disable=SC2046  # two requirements
    install --index-url "$TORCH_INDEX" $(grep -oE '^(torch|torchvision)==[^ ;]+' "$wanted")
  else
    echo "$TORCH_INDEX cannot be reached: taking torch from the default index, with CUDA." >&2
  fi
fi
# PyTorch's CPU wheels say so in their version (2.15.0+cpu), and what the others bring for CUDA is not for them.
if [ -n "$(find /opt/venv/lib -maxdepth 3 -name 'torch-*+cpu.dist-info')" ]; then
  sed -i -E '/^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/d' "$wanted"
fi
install -r "$wanted"
