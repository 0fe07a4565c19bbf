#!/bin/sh
# Install requirements/GROUP.txt into /opt/venv, while an image is built.
set -eu
requirements=$(mktemp)
cp "/requirements/$1.txt" "$requirements"
install() { /opt/uv/bin/uv pip install --quiet --python /opt/venv/bin/python --no-cache --no-deps --compile-bytecode "$@"; }

if [ -n "${TORCH_INDEX:-}" ]; then
  if python3 -c "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '/torch/', timeout=20)" "$TORCH_INDEX" 2>/dev/null; then
    # shellcheck disable=SC2046  # two requirements
    install --index-url "$TORCH_INDEX" $(grep -oE '^(torch|torchvision)==[^ ;]+' "$requirements")
  else
    echo "$TORCH_INDEX is unreachable. torch comes from the default index, with CUDA." >&2
  fi
fi
# With PyTorch's CPU wheels (version 2.15.0+cpu), the packages for CUDA are not needed.
if [ -n "$(find /opt/venv/lib -maxdepth 3 -name 'torch-*+cpu.dist-info')" ]; then
  sed -i -E '/^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/d' "$requirements"
fi
install -r "$requirements"
