"""A bundle's weights, as tensors: what serves the network reads them, and what trains on from it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from handlers.bundle import WEIGHTS, Bundle

if TYPE_CHECKING:
    from torch import Tensor, nn

# Beside the network's tensors in the weights file: a point of the features' space (D,), and orthonormal directions out
# of the part of it that known lesions take (D, R).
ORIGIN, BASIS = "rejection.origin", "rejection.basis"


class Weights(NamedTuple):
    """The network's tensors by name, and the known space's origin (D,) and basis (D, R), None without one; all fp32."""

    network: "dict[str, Tensor]"
    origin: "Tensor | None"
    basis: "Tensor | None"


def read_weights(bundle: Bundle) -> Weights:
    """The weights of a bundle, whatever precision it keeps them in."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(bundle.path / WEIGHTS).items()}
    origin, basis = (tensors.pop(name, None) for name in (ORIGIN, BASIS))
    return Weights(tensors, origin, basis)


def load_weights(backbone: "nn.Module", weights: "dict[str, Tensor]", anew: Sequence[str] = ()) -> None:
    """Load the network's tensors into the backbone.

    Args:
        anew: names of modules that have no weights and keep their own.

    Raises:
        ValueError: what does not fit, in a few words.
    """
    try:
        missing, unexpected = backbone.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes: a heading, and a line for each
        raise ValueError(str(error).strip().splitlines()[-1].strip(" \t.")) from error
    own = tuple(f"{name}." for name in anew)
    # Batch norm's counter of batches is the one entry that export leaves out.
    lacking = [name for name in missing if not name.startswith(own) and not name.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise ValueError(", ".join([*lacking, *unexpected][:3]))
