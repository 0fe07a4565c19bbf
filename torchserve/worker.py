#!/usr/bin/env python3
"""TorchServe's worker without torch, which costs nearly 300 MB of memory and more than a second of each start.

TorchServe's message handler imports torch for answers that are tensors. This project's answers are bytes. Where a model
runs on torch, handlers/runtimes.py imports it.

start_torchserve.sh names this file as TorchServe's Python. Its arguments are TorchServe's script and what that takes.
"""

import importlib
import runpy
import sys
import types


class Tensor:
    """What the message handler compares answers with."""


def main() -> None:
    """Run the script named by the first argument that is no option."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # TorchServe reads it for its log
    import_message_handler()
    script = next(index for index, argument in enumerate(sys.argv) if index and not argument.startswith("-"))
    sys.argv = sys.argv[script:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def import_message_handler() -> None:
    """Import TorchServe's message handler with a module in the place of torch, which later imports do not see."""
    torch = types.ModuleType("torch")
    torch.Tensor = Tensor  # type: ignore[attr-defined]
    sys.modules["torch"] = torch
    importlib.import_module("ts.protocol.otf_message_handler")
    del sys.modules["torch"]


if __name__ == "__main__":
    main()
