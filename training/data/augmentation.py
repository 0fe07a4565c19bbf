"""Random views of the training images, one batch at a time on the training device."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from handlers.preprocessing import Preprocessing
from training.config import AugmentationSettings
from training.data.draws import Draws, seeded

LUMA = [0.299, 0.587, 0.114]  # ITU-R BT.601


class Augment:
    """Random views of a batch: uint8 (N, C, C, 3) of any side C to standardised float32 (N, 3, S, S).

    Flips, quarter turns, rotation, shift, crop and stretch are one affine map, hence one grid_sample. Brightness,
    contrast, saturation, hue, white balance and the standardisation are one affine map of the colours, hence one matrix
    product. Each image has its own random numbers. Dermoscopy has no upside, so every turn is allowed. RandAugment
    (Cubuk et al. 2020) comes first if it is on. It works image by image and is therefore slower.
    """

    def __init__(self, settings: AugmentationSettings, preprocessing: Preprocessing) -> None:
        self.settings = settings
        self.preprocessing = preprocessing
        self.randaugment = v2.RandAugment(num_ops=2, magnitude=settings.randaugment) if settings.randaugment else None

    def __call__(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Augment the rows that `draws` has numbers for."""
        n, size = len(pixels), self.preprocessing.image_size
        theta = self.geometry(draws).to(pixels.device)
        channels_first = pixels.permute(0, 3, 1, 2)
        if self.randaugment:
            views = []
            for image, seed in zip(channels_first, draws.integers(2**31).tolist(), strict=True):
                with seeded(seed):
                    views.append(self.randaugment(image))
            channels_first = torch.stack(views)
        images = channels_first.float()
        # Contrast turns about each image's mean grey, taken before cropping.
        grey = images.mean((2, 3)) @ images.new_tensor(LUMA)
        grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        matrix, offset = self.colour(grey.cpu(), draws)
        images = torch.baddbmm(offset.to(images.device)[:, :, None], matrix.to(images.device), images.flatten(2)).view(
            n, 3, size, size
        )
        return self.resample(images, draws)

    def resample(self, images: Tensor, draws: Draws) -> Tensor:
        """Pass a share of images (n, 3, S, S) through a lower resolution, log-uniform from resample_side to S.

        Without it, a network learns the sharpness of each data set, and the diagnoses that are frequent there.
        """
        c, size = self.settings, images.shape[-1]
        chosen = (draws.uniform() < c.resample).nonzero()[:, 0].tolist()
        sides = draws.uniform(math.log(min(c.resample_side, size)), math.log(size)).exp().round().int()
        smooth = draws.integers(2)
        for row in chosen:
            side = int(sides[row])
            small = F.interpolate(images[row : row + 1], (side, side), mode="bilinear", antialias=True)
            mode = "bilinear" if smooth[row] else "bicubic"
            images[row : row + 1] = F.interpolate(small, (size, size), mode=mode)
        return images

    def geometry(self, draws: Draws) -> Tensor:
        """Return affine maps (n, 2, 3) from output to input coordinates, both in [-1, 1]."""
        c, n = self.settings, len(draws)
        angle = draws.uniform(-c.rotate_degrees, c.rotate_degrees) * (math.pi / 180)
        turns = draws.integers(4) if c.rotate90 else torch.zeros(n)
        angle = angle + turns * (math.pi / 2)
        side = draws.uniform(c.crop_scale, 1.0).sqrt()
        stretch = torch.exp(draws.uniform(-math.log(c.crop_aspect), math.log(c.crop_aspect)) / 2)
        # A stretched crop still fits inside the picture.
        width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        mirror = 1 - 2 * draws.integers(2) if c.flip else torch.ones(n)
        # The crop may leave the picture by `translate`.
        lies = turns % 2 == 1
        across, down = torch.where(lies, height, width), torch.where(lies, width, height)
        x = draws.uniform(-1, 1) * (1 - across + 2 * c.translate)
        y = draws.uniform(-1, 1) * (1 - down + 2 * c.translate)
        cos, sin = angle.cos(), angle.sin()
        rows = [width * cos * mirror, -height * sin, x, width * sin * mirror, height * cos, y]
        return torch.stack(rows, dim=1).view(n, 2, 3)

    def colour(self, grey: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return matrices (n, 3, 3) and offsets (n, 3) from RGB in [0, 255] to augmented, standardised RGB.

        `grey` (n,) is each image's mean grey.
        """
        c, n = self.settings, len(grey)
        contrast = draws.uniform(1 - c.contrast, 1 + c.contrast)
        gain = draws.uniform(1 - c.brightness, 1 + c.brightness) * contrast
        saturation = draws.uniform(1 - c.saturation, 1 + c.saturation)[:, None, None]
        turn = draws.uniform(-c.hue, c.hue) * (2 * math.pi)

        # Hue: a rotation of the chroma plane of YIQ (NTSC), which leaves brightness alone.
        to_yiq = torch.tensor([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        rotation = torch.eye(3).repeat(n, 1, 1)
        rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
        rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
        hue = to_yiq.inverse() @ rotation @ to_yiq
        to_grey = torch.tensor(LUMA).expand(3, 3)
        matrix = gain[:, None, None] * (saturation * torch.eye(3) + (1 - saturation) * to_grey) @ hue
        # brightness * (contrast * x + (1 - contrast) * grey): the same for all three channels
        offset = (gain / contrast * (1 - contrast) * grey)[:, None].expand(n, 3)

        white = torch.stack([draws.uniform(1 - c.white_balance, 1 + c.white_balance) for _ in range(3)], dim=1)
        scale, shift = torch.tensor(self.preprocessing.standardisation)
        return matrix * (white * scale)[:, :, None], offset * white * scale + shift
