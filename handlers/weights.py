"""A bundle's weights as tensors, for serving and for training from a bundle."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from handlers.bundle import WEIGHTS, Bundle

if TYPE_CHECKING:
    from torch import Tensor, nn

# The space of known lesions, stored with the network's tensors: a point in it (D,), and the orthonormal directions that
# leave it (D, R).
ORIGIN, BASIS = "rejection.origin", "rejection.basis"


class Weights(NamedTuple):
    """The network's tensors by name, and the known space's origin (D,) and basis (D, R) or None; all in fp32."""

    network: "dict[str, Tensor]"
    origin: "Tensor | None"
    basis: "Tensor | None"


def read_weights(bundle: Bundle) -> Weights:
    """Read the weights of a bundle, stored in fp16 or fp32."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(bundle.path / WEIGHTS).items()}
    origin, basis = (tensors.pop(name, None) for name in (ORIGIN, BASIS))
    return Weights(tensors, origin, basis)


def load_weights(backbone: "nn.Module", weights: "dict[str, Tensor]", untouched: Sequence[str] = ()) -> None:
    """Load the network's tensors into the backbone.

    Args:
        untouched: names of modules that keep their own weights.

    Raises:
        ValueError: the names or shapes that do not fit.
    """
    try:
        missing, unexpected = backbone.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes: a heading, and a line for each
        raise ValueError(str(error).strip().splitlines()[-1].strip(" \t.")) from error
    own = tuple(f"{name}." for name in untouched)
    # Export leaves out batch norm's counter of batches.
    lacking = [name for name in missing if not name.startswith(own) and not name.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise ValueError(", ".join([*lacking, *unexpected][:3]))
