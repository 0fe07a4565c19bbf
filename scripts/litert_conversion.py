"""Convert a bundle's serving module to LiteRT, and run it there on the golden pictures.

scripts/export_model.py starts this program in an environment of its own, because litert-torch needs an older torch than
the project. It prints one JSON object: the model's inputs and outputs, and the outputs for each row of INPUTS.
"""

import json
import sys
from pathlib import Path

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter

from handlers.bundle import Bundle
from handlers.serving_graph import serving_module


def main(bundle: Path, inputs: Path, out: Path) -> None:
    """Write the model to `out`; `inputs` is an .npz file with pixels, targets and, if the model has them, metadata."""
    arrays = np.load(inputs)
    columns = [arrays["pixels"], arrays["target"], *([arrays["metadata"]] if "metadata" in arrays else [])]
    example = tuple(torch.from_numpy(column[:1]) for column in columns)
    litert_torch.convert(serving_module(Bundle.load(bundle)), example).export(str(out))
    interpreter = Interpreter(str(out))
    interpreter.allocate_tensors()
    slots = sorted(interpreter.get_input_details(), key=lambda slot: slot["name"])
    outputs = []
    for row in range(len(columns[0])):
        for slot, column in zip(slots, columns, strict=True):
            interpreter.set_tensor(slot["index"], column[row : row + 1].astype(slot["dtype"]))
        interpreter.invoke()
        outputs.append([interpreter.get_tensor(slot["index"])[0].tolist() for slot in interpreter.get_output_details()])
    described = [{"name": slot["name"], "type": np.dtype(slot["dtype"]).name} for slot in slots]
    print(json.dumps({"inputs": described, "outputs": outputs}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
