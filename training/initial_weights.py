"""Starting from the weights of a bundle: at another image size, for other classes, on other data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from timm.layers import resample_abs_pos_embed
from torch import nn

from handlers.backbone import is_vision_transformer
from handlers.bundle import Bundle, BundleError
from handlers.metadata import Metadata
from handlers.receipt import Receipt, image_identities, overlap, read_receipt
from handlers.weights import load_weights, read_weights
from training.data.image_cache import DataError


@dataclass(frozen=True)
class InitialWeights:
    """A bundle to start from, and the receipt of what it was made from, which every model made of it has to carry."""

    bundle: Bundle
    receipt: Receipt

    @classmethod
    def read(cls, path: Path | str) -> "InitialWeights":
        """Read a bundle and its receipt. Raises BundleError."""
        bundle = Bundle.load(path)
        return cls(bundle, read_receipt(bundle.path))

    def check(self, frame: pd.DataFrame, dataset_fingerprint: str) -> None:
        """Refuse a manifest by which a model would be tuned or judged on images that this bundle has learnt from.

        The manifest it was made from itself has the same images in the same splits.

        Raises:
            DataError: images of other splits than train are in the receipt.
        """
        if self.receipt.dataset_fingerprint == dataset_fingerprint:
            return
        rows = frame[frame["split"] != "train"]
        seen = overlap(self.receipt, image_identities(rows))
        if seen.leaks:
            raise DataError(
                f"{self.bundle.path} has seen images outside this manifest's training split. {seen} "
                "Start from another bundle, or put their lesions into the split train."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what a run's checkpoints record."""
        return {"digest": self.bundle.digest, "receipt": self.receipt.to_dict()}

    def put_into(self, backbone: nn.Module, classes: tuple[str, ...], inputs: Metadata | None = None) -> list[str]:
        """Load the weights, with positions resampled to the backbone's grid. Returns the names of the heads that begin
        anew, as their `classes` or their `inputs` beside the picture (None: no metadata) are others.

        Raises:
            BundleError: the backbone is another than the bundle's.
        """
        model: Any = backbone
        config, own = self.bundle.config, model.state_dict()
        weights = read_weights(self.bundle).network
        if is_vision_transformer(model) and "pos_embed" in weights and model.pos_embed is not None:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            grid = list(model.patch_embed.grid_size)
            weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], grid, num_prefix_tokens=prefix)

        anew = []
        for head in (model.default_cfg["classifier"], "metadata_head"):
            shapes, given = ({n: w.shape for n, w in s.items() if n.startswith(f"{head}.")} for s in (own, weights))
            told = (inputs or Metadata()) == config.metadata or head != "metadata_head"
            if classes != config.classes or not told:
                weights = {name: tensor for name, tensor in weights.items() if name not in given}
                anew += [head] if shapes else []
        try:
            load_weights(model, weights, anew)
        except ValueError as error:
            raise BundleError(
                f"{self.bundle.path} is {config.architecture} with {config.options}, which these settings do not "
                f"describe ({error}); give its architecture, stem, depth and head_hidden."
            ) from error
        return anew
