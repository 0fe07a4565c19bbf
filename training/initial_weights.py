"""Start training from the weights of a bundle: at another image size, for other classes, on other data."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from handlers.bundle import Bundle, BundleError
from handlers.metadata import Metadata
from handlers.receipt import DIGITS, Receipt, image_identities, overlap, read_receipt
from handlers.weights import load_weights, read_weights
from training.data.image_cache import DataError
from training.recipe import heads_of


@dataclass(frozen=True)
class InitialWeights:
    """A bundle to start from, and its receipt, which becomes part of the new model's receipt."""

    bundle: Bundle
    receipt: Receipt

    @classmethod
    def read(cls, path: Path | str) -> "InitialWeights":
        """Read a bundle and its receipt. Raises BundleError."""
        bundle = Bundle.load(path)
        return cls(bundle, read_receipt(bundle.path))

    def check(self, frame: pd.DataFrame) -> None:
        """Raise DataError if a split other than train has images that the bundle has seen in another split.

        Images that it has seen in the same split are accepted, so its own manifest may have grown.
        """
        for split, rows in frame[frame["split"] != "train"].groupby("split"):
            seen = overlap(self.receipt.without(str(split)), image_identities(rows[~self.has_seen(rows, str(split))]))
            if seen.leaks:
                raise DataError(
                    f"{self.bundle.path} has seen images of this manifest's split {split} in another one. {seen} "
                    "Start from another bundle, or put their lesions into the split train."
                )

    def has_seen(self, rows: pd.DataFrame, split: str) -> "pd.Series[bool]":
        """Return which images the bundle has seen in a split (N,)."""
        digests = self.receipt.splits[split].sha256 if split in self.receipt.splits else ()
        return rows["sha256"].str[:DIGITS].isin(digests)

    def to_dict(self) -> dict[str, Any]:
        """Return the part of a run's checkpoints that names the bundle."""
        return {"digest": self.bundle.digest, "receipt": self.receipt.to_dict()}

    def put_into(self, backbone: nn.Module, classes: tuple[str, ...], inputs: Metadata | None = None) -> list[str]:
        """Load the weights, with a transformer's positions resampled to the backbone's grid of patches.

        Returns:
            The heads that keep their random weights, because `classes` or metadata `inputs` differ from the bundle's.

        Raises:
            BundleError: the backbone differs from the bundle's.
        """
        model: Any = backbone
        config, weights = self.bundle.config, read_weights(self.bundle).network
        if convert := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):
            weights = convert(weights, model)  # timm's own way to resample positions

        new_heads = []
        if classes != config.classes:
            new_heads = [model.default_cfg["classifier"], "metadata_head"]
        elif (inputs or Metadata()) != config.metadata:
            new_heads = ["metadata_head"]
        kept = {
            name: weight
            for name, weight in weights.items()
            if not name.startswith(tuple(f"{head}." for head in new_heads))
        }
        new_heads = [head for head in heads_of(model) if head in new_heads]
        try:
            load_weights(model, kept, new_heads)
        except ValueError as error:
            raise BundleError(
                f"{self.bundle.path} is {config.architecture} with {config.options}, which differs from the settings "
                f"({error}); set its architecture, stem, depth and head_hidden."
            ) from error
        return new_heads
