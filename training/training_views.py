"""What the network sees of the training images: outliers among them, random views, mixed images, missing metadata."""

from collections.abc import Sequence

from torch import Tensor

from handlers.taxonomy import UNKNOWN
from training.config import TrainConfig
from training.data.augmentation import Augment
from training.data.batches import withhold
from training.data.draws import Draws
from training.data.outliers import Outliers
from training.recipe import make_mix


class TrainingViews:
    """Random changes of a batch or of a part of it."""

    def __init__(self, config: TrainConfig, classes: Sequence[str]) -> None:
        self.metadata, self.metadata_drop = config.metadata_inputs, config.metadata_drop
        self.add_outliers = Outliers(config.outliers, classes.index(UNKNOWN)) if config.outliers else None
        self.augment, self.mix = Augment(config, config.preprocessing), make_mix(config, len(classes))

    def __call__(self, pixels: Tensor, labels: Tensor, metadata: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Return standardised images float32 (N, 3, S, S), targets (N,) or mixed (N, K), and metadata (N, D).

        Args:
            pixels: uint8 (N, C, C, 3), the rows that `draws` has numbers for.
            labels: int64 (N,).
            metadata: float32 (N, D), encoded.
        """
        if self.add_outliers:
            pixels, labels = self.add_outliers(pixels, labels, draws)
        images, targets = self.mix(self.augment(pixels, draws), labels, draws)
        # A mixed image belongs to no patient, so the model gets no metadata with it.
        drop = self.metadata_drop if targets.ndim == 1 else 1.0
        return images, targets, withhold(metadata, self.metadata, drop, draws)
