"""Training settings, checked before anything starts.

`TrainConfig` is a flat table for people, and the sum of five groups for code: a function takes the group that it uses.
A preset (`training/configs/NAME.yaml`) sets values; `key=value` on the command line overrides it. An unknown setting or
a value of the wrong type is an error, never ignored.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import timm
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from handlers.backbone import PRETRAINED_STEMS
from handlers.errors import UsageError
from handlers.metadata import Metadata
from handlers.preprocessing import Preprocessing
from mlflow_tracking.stack_settings import ROOT

PRESETS = ROOT / "training" / "configs"
DEFAULT_PRESET = "vit_small"

Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


# Common names of other tools, and the settings that they mean here.
SYNONYMS = {
    "learning_rate": "lr", "batch": "batch_size", "model": "architecture", "arch": "architecture",
    "img_size": "image_size", "amp": "precision", "opt": "optimizer", "mixup": "mixup_alpha", "cutmix": "cutmix_alpha",
    "early_stopping": "patience", "dropout": "drop_rate", "weights": "initial_bundle", "data": "data_dir",
}  # fmt: skip


class ConfigError(UsageError):
    """Settings that cannot be used."""


@cache
def timm_names() -> tuple[str, ...]:
    """Return timm's architectures, with and without a tag. Deprecated names are left out: they have no mean and std."""
    return (*timm.list_models(), *timm.list_pretrained())


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSettings(_Group):
    """Where images come from. Sizes in pixels."""

    manifest: str = Field(str(ROOT / "data" / "manifest.csv"), description="the data set, written by prepare_data.py")
    data_dir: str = Field(str(ROOT / "data"), description="folder of images that a missing manifest is made from")
    cache_dir: str = Field("", description="folder of resized images; empty: `cache` next to the manifest")
    reference_dir: str = Field(
        "", description="folder of pictures as they arrive, for the reference of drift; empty: the calibration split"
    )
    cache_size: Count = Field(0, description="side of the cached training images, at least image_size")


class ModelSettings(_Group):
    """The network and its inputs."""

    image_size: int = Field(224, ge=16, description="side of the network's input in pixels")
    architecture: str = Field("vit_small_patch16_224", description="a timm model name")
    pretrained: bool = Field(
        False, description="start from weights in pretrained_file, on timm's hub or its cache, or in a Python package"
    )
    pretrained_file: str = Field("", description="pretrained weights of the architecture: a .safetensors or .pth file")
    initial_bundle: str = Field(
        "", description="bundle with the same backbone to start from; image_size and classes may differ"
    )
    stem: Literal["patch", "conv", "resnet", "efficientnet_lite0"] = Field(
        "patch", description="convolutions instead of a ViT's patch projection"
    )
    depth: Count = Field(0, description="blocks of a ViT; 0: the architecture's own number")
    head_hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="widths of hidden layers in the head, each with batch norm; served by torch only"
    )
    symmetric_padding: bool = Field(
        False, description="for tf_ models: symmetric padding, which trains faster on CPUs, in place of TensorFlow's"
    )
    output_stride: Literal[16, 32] = Field(
        32, description="pixels between the cells of a convolutional network's last feature map, the heatmap's grid"
    )
    half_turn: bool = Field(
        False, description="validate and serve by the mean over the picture and its half turn, for twice the work"
    )
    drop_rate: Probability = Field(0.0, description="dropout before the head, and in its hidden layers")
    drop_path_rate: Probability = Field(0.0, description="stochastic depth")
    metadata: list[Literal["age", "sex", "site"]] = Field([], description="patient data that the model takes as input")
    metadata_drop: Probability = Field(
        0.25, description="share of training images that lose all metadata; the others lose each value with this chance"
    )

    @field_validator("architecture")
    @classmethod
    def _exists(cls, architecture: str) -> str:
        if architecture not in (names := timm_names()):
            nearest = difflib.get_close_matches(architecture, names, n=1, cutoff=0)[0]
            raise ValueError(f"timm has no model {architecture!r}; the nearest is {nearest!r}.")
        return architecture

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of handlers.backbone.build_backbone that differ from timm's defaults."""
        values: dict[str, Any] = {
            "depth": self.depth,
            "drop_rate": self.drop_rate,
            "drop_path_rate": self.drop_path_rate,
            "head_hidden": list(self.head_hidden),
            "stem": self.stem.removeprefix("patch"),
            "half_turn": self.half_turn,
        }
        padding = {"pad_type": ""} if self.symmetric_padding else {}
        stride = {"output_stride": self.output_stride} if self.output_stride != 32 else {}
        return {key: value for key, value in values.items() if value} | padding | stride

    @property
    def metadata_inputs(self) -> Metadata:
        """The metadata that the model takes, as its bundle describes them."""
        return Metadata.of(self.metadata)

    @property
    def preprocessing(self) -> Preprocessing:
        """The network's input, with the mean and standard deviation of timm's weights for this architecture."""
        pretrained_cfg: Any = timm.get_pretrained_cfg(self.architecture)  # never None: see _exists
        mean, std = (tuple(float(value) for value in values) for values in (pretrained_cfg.mean, pretrained_cfg.std))
        return Preprocessing(self.image_size, mean, std)  # type: ignore[arg-type]  # timm: three channels


class OptimizationSettings(_Group):
    """Optimiser, schedule and length of the training."""

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(64, ge=1, description="images of a step, over all processes")
    accumulate: int = Field(
        1, ge=1, description="parts of a batch that each process computes one after another, to save memory"
    )
    sync_batch_norm: bool = Field(
        True, description="of several processes: batch norm takes mean and variance of the images of all"
    )
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: Positive = Field(3e-4, description="peak learning rate")
    weight_decay: NonNegative = Field(0.05, description="not applied to norms, biases, position and class tokens")
    scheduler: Literal["cosine", "restarts", "constant"] = "cosine"
    restart_epochs: Positive = Field(10.0, description="first period of scheduler=restarts; each period doubles")
    layer_decay: Probability = Field(
        1.0, gt=0, description="each layer's learning rate is this times that of the layer above"
    )
    freeze_epochs: Count = Field(
        0, description="first epochs that train only the new heads, or all heads if none is new"
    )
    frozen_stages: Count = Field(
        0, description="first stages that keep their first weights, the stem included: training is faster"
    )
    warmup_epochs: NonNegative = Field(2.0, description="linear warm-up")
    min_lr: NonNegative = Field(1e-6, description="learning rate at the end of the cosine")
    grad_clip: NonNegative = Field(1.0, description="largest gradient norm; 0: no clipping")
    ema_decay: Probability = Field(
        0.999, description="moving average of the weights: decay at step s is 1 - s^-ema_power, at most this; 0: off"
    )
    ema_power: Positive = Field(2 / 3, description="see ema_decay; 1: the plain mean of all steps so far")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="autocast; auto: bf16 or fp16 on GPUs, on CPUs the faster of fp32 and bf16, as measured"
    )


class LossSettings(_Group):
    """Loss, sampling, and the correction for class frequencies."""

    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: NonNegative = 2.0
    label_smoothing: Probability = 0.0
    class_weight_power: Probability = Field(0.0, description="loss weight = frequency^-power: 0 equal, 1 balanced")
    sampler_power: Probability = Field(0.0, description="sampling weight = frequency^-power: 0 unchanged, 1 balanced")
    sampler_groups: Literal["class", "source_and_class"] = Field(
        "class", description="the groups whose frequencies sampler_power balances"
    )
    outliers: Probability = Field(
        0.0, description="share of training images that become pictures without a lesion, of class UNK"
    )
    logit_adjustment: Probability = Field(
        0.0, description="share of the log class frequencies, as drawn, subtracted from the trained logits"
    )


class AugmentationSettings(_Group):
    """Random changes of the training images. Angles in degrees, shares in [0, 1]."""

    flip: bool = Field(True, description="random mirror image")
    rotate90: bool = Field(True, description="random quarter turns")
    rotate_degrees: NonNegative = Field(15.0, description="further rotation, up to +- this")
    translate: Probability = Field(0.05, description="shift, up to +- this share of the side")
    crop_scale: Probability = Field(
        0.7, gt=0, description="random resized crop: smallest share of the area, before stretching"
    )
    crop_aspect: float = Field(1.2, ge=1, description="random resized crop: largest stretch of one side")
    brightness: Probability = 0.2
    contrast: Probability = 0.2
    saturation: Probability = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.03, description="share of the colour circle, up to +- this")
    white_balance: Probability = Field(0.0, description="gain of each colour channel by itself, up to +- this")
    randaugment: Annotated[int, Field(ge=0, le=30)] = Field(
        0, description="magnitude of RandAugment, two operations per image, before all others; 0: off"
    )
    resample: Probability = Field(
        0.0, description="share of images that pass through a lower resolution, as in blurred data sets"
    )
    resample_side: int = Field(56, ge=8, description="lowest resolution of resample: its side in pixels")
    mixup_alpha: NonNegative = Field(0.0, description="Beta(alpha, alpha); 0: no mixup")
    cutmix_alpha: NonNegative = Field(0.0, description="Beta(alpha, alpha); 0: no cutmix")
    mix_probability: Probability = Field(0.5, description="share of batches that mixup or cutmix change")


class TrainConfig(AugmentationSettings, LossSettings, OptimizationSettings, ModelSettings, DataSettings):
    """Every setting of a training run."""

    name: str = Field("skin_vit", description="name of the run and of its default output folder")
    experiment: str = Field("skin_vit", description="MLflow experiment")
    seed: Count = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Count = Field(0, description="CPU threads of a process; 0: torch's choice")
    output: str = Field("", description="folder of checkpoints and bundle; empty: runs/NAME-TIME")
    monitor: Literal["balanced_accuracy", "loss"] = Field(
        "balanced_accuracy", description="validation figure that chooses the best epoch"
    )
    patience: Count = Field(0, description="epochs without improvement before stopping early; 0: never")
    confidence_level: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="coverage of the conformal sets")
    malignant: list[Literal["MEL", "BCC", "SCC", "AK"]] = Field(
        ["MEL", "BCC", "SCC"], description="classes that the alarm is to find"
    )
    bootstrap: Count = Field(500, description="resamples for the confidence intervals")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pretrained and self.stem not in ("patch", *PRETRAINED_STEMS):
            raise ValueError(f"stem={self.stem} has no pretrained weights; use stem=patch or pretrained=false.")
        if self.pretrained_file and not self.pretrained:
            raise ValueError("pretrained_file is read only with pretrained=true; add it.")
        if self.initial_bundle and self.pretrained:
            raise ValueError("initial_bundle and pretrained=true both name initial weights; add pretrained=false.")
        if self.metadata and (self.mixup_alpha or self.cutmix_alpha) and self.mix_probability == 1:
            raise ValueError("Mixed images have no metadata to learn from; use mix_probability below 1.")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by the names used in YAML and on the command line."""
        return self.model_dump()


def load_config(
    preset: str | Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Combine settings; later sources win: `base`, preset, overrides, flags.

    Args:
        preset: a YAML file, or the name of one in training/configs.
        overrides: "key=value" strings, with the value in YAML.
        flags: values of command-line options; None means that the option is absent.
        base: values to start from, such as those of a resumed run.

    Raises:
        ConfigError: unknown keys, wrong types, unreadable files.
    """
    values = dict(base or {})
    if preset is not None:
        values |= _read(find_preset(preset))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"{item!r} is not a setting; write key=value, such as epochs=10.")
        values[key.strip()] = _value(text, key)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        sentences = " ".join(_sentence(detail) for detail in error.errors())
        raise ConfigError(f"The settings cannot be used. {sentences}") from None


def find_preset(preset: str | Path) -> Path:
    """Return the file of a preset given by path or by name. Raises ConfigError."""
    path = Path(preset)
    if path.is_file():
        return path
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if str(preset) not in names:
        raise ConfigError(f"There is no preset {str(preset)!r}; choose one of {', '.join(names)}.")
    return PRESETS / f"{preset}.yaml"


class _Loader(yaml.SafeLoader):
    """A loader with YAML 1.2's floats: PyYAML reads 1e-3 as text because it has no dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def _value(text: str, key: str) -> Any:
    try:
        return yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        if text.count("[") > text.count("]"):  # a shell splits key=[a, b] at the space
            raise ConfigError(
                f'{key} is {text!r}: the list has no closing bracket. Quote the whole setting: "{key}=[…, …]".'
            ) from None
        raise ConfigError(f"{key} is {text!r}: it must be a value in YAML, such as 3, text or [a, b].") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold one `key: value` per line.")
    return values


def _sentence(detail: Any) -> str:
    """Return one sentence for one of pydantic's error details."""
    key = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, [*TrainConfig.model_fields, *SYNONYMS], n=1, cutoff=0)[0]
        return f"There is no setting {key!r}; the nearest is {SYNONYMS.get(nearest, nearest)!r}."
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key} is {detail['input']!r}: {detail['msg'].replace('Input should', 'it must')}."
