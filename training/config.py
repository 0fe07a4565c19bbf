"""Training settings: one flat table, checked before anything starts.

A preset (`training/configs/NAME.yaml`) sets values, `key=value` on the command line wins over it. A setting nobody
knows, or a value of the wrong type, is refused with the nearest right name; nothing is ever silently ignored.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import timm
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from handlers.errors import UsageError
from handlers.metadata import Metadata
from handlers.preprocessing import Preprocessing
from mlflow_tracking.settings import ROOT

PRESETS = ROOT / "training" / "configs"
DEFAULT_PRESET = "vit_small"

Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

# What other tools call a setting; difflib alone would not find these.
SYNONYMS = {
    "batch": "batch_size",
    "bs": "batch_size",
    "learning_rate": "lr",
    "model": "architecture",
    "arch": "architecture",
    "backbone": "architecture",
    "img_size": "image_size",
    "wd": "weight_decay",
    "amp": "precision",
    "opt": "optimizer",
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "gamma": "focal_gamma",
    "tau": "logit_adjustment",
    "early_stopping": "patience",
    "dropout": "drop_rate",
    "hidden": "head_hidden",
    "llrd": "layer_decay",
    "freeze": "freeze_epochs",
    "initial_checkpoint": "initial_bundle",
    "weights": "initial_bundle",
    "rand_augment": "randaugment",
    "data": "data_dir",
    "dataset": "manifest",
}


class ConfigError(UsageError):
    """Settings that cannot be used, with a sentence saying which and what to write instead."""


class TrainConfig(BaseModel):
    """Every setting of a training run. Sizes are in pixels, angles in degrees, shares in [0, 1]."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field("skin_vit", description="names the run and its default output folder")
    experiment: str = Field("skin_vit", description="MLflow experiment")

    # data
    manifest: str = Field(str(ROOT / "data" / "manifest.csv"), description="the data set, as prepare_data writes it")
    data_dir: str = Field(
        str(ROOT / "data"), description="makes the manifest that is not there; where that is named, name this too"
    )
    cache_dir: str = Field("", description="resized images; empty: `cache` beside the manifest")
    image_size: int = Field(224, ge=16, description="side of the network's input")
    cache_size: int = Field(0, ge=0, description="side of the cached training images; 0: image_size")

    # model
    architecture: str = Field("vit_small_patch16_224", description="a timm model name")
    pretrained: bool = Field(False, description="start from the model hub's weights")
    initial_bundle: str = Field(
        "", description="a bundle of the same backbone to start from; image_size and classes may be others"
    )
    stem: Literal["patch", "conv", "resnet"] = Field(
        "patch", description="conv, resnet: convolutions in place of a ViT's patch projection"
    )
    depth: int = Field(0, ge=0, description="blocks of a ViT; 0: the architecture's")
    head_hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="widths of hidden layers in the head, each with batch norm; such a model is served by torch"
    )
    drop_rate: Probability = Field(0.0, description="dropout before the head, and in its hidden layers")
    drop_path_rate: Probability = Field(0.0, description="stochastic depth")
    metadata: list[Literal["age", "sex", "site"]] = Field([], description="what the model takes beside the picture")
    metadata_drop: Probability = Field(
        0.25, description="share of training images that all of it is withheld from, and of each value of the others"
    )

    # optimisation
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(64, ge=1)
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: Positive = Field(3e-4, description="peak learning rate")
    weight_decay: NonNegative = Field(0.05, description="not applied to norms, biases, position and class tokens")
    scheduler: Literal["cosine", "restarts", "constant"] = "cosine"
    restart_epochs: Positive = Field(10.0, description="first period of scheduler=restarts; each next is twice as long")
    layer_decay: Probability = Field(
        1.0, gt=0, description="discriminative learning rates: each layer's is this times that of the one above"
    )
    freeze_epochs: int = Field(
        0, ge=0, description="epochs at first that train only the heads that begin anew; all heads, if none does"
    )
    warmup_epochs: NonNegative = Field(2.0, description="linear warm-up")
    min_lr: NonNegative = Field(1e-6, description="where the cosine ends")
    grad_clip: NonNegative = Field(1.0, description="largest gradient norm; 0: no clipping")
    ema_decay: Probability = Field(
        0.999, description="moving average of the weights: its decay at step s is 1 - s^(-2/3), at most this; 0: none"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="autocast; auto: the device's best")

    # loss and sampling
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: NonNegative = 2.0
    label_smoothing: Probability = 0.0
    class_weight_power: Probability = Field(0.0, description="loss weight = frequency^-power: 0 equal, 1 balanced")
    sampler_power: Probability = Field(
        0.0, description="draw weight = frequency^-power: 0 as is, 1 balanced, .5 between"
    )
    logit_adjustment: Probability = Field(
        0.0, description="share of the logarithm of the class frequencies that is taken off the trained logits"
    )

    # augmentation of the training images
    flip: bool = Field(True, description="mirror at random")
    rotate90: bool = Field(True, description="quarter turns at random")
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
    randaugment: Annotated[int, Field(ge=0, le=30)] = Field(
        0, description="magnitude of RandAugment, two operations an image, before all others; 0: none"
    )
    mixup_alpha: NonNegative = Field(0.0, description="Beta(alpha, alpha); 0: no mixup")
    cutmix_alpha: NonNegative = Field(0.0, description="Beta(alpha, alpha); 0: no cutmix")
    mix_probability: Probability = Field(0.5, description="share of batches that mixup or cutmix touch")

    # the end of training, and after it
    monitor: Literal["balanced_accuracy", "loss"] = Field("balanced_accuracy", description="picks the best epoch (val)")
    patience: int = Field(0, ge=0, description="epochs without a better one before stopping early; 0: never")
    confidence_level: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="of the conformal sets")
    bootstrap: int = Field(500, ge=0, description="resamplings for the confidence intervals")

    # the run
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's choice")
    output: str = Field("", description="folder of checkpoints and bundle; empty: runs/NAME-TIME")

    @field_validator("architecture")
    @classmethod
    def _exists(cls, architecture: str) -> str:
        if not timm.is_model(architecture):
            raise ValueError(f"a timm model{_suggest(architecture, timm.list_models())}")
        try:
            described = timm.get_pretrained_cfg(architecture)
        except RuntimeError:  # a tag that it does not have
            described = None
        if described is None:  # by a former name timm builds a model, but knows no weights and no standardisation
            present = timm.models.get_deprecated_models().get(architecture) or architecture
            name = present.partition(".")[0]
            near = _suggest(present, [name, *timm.list_pretrained(f"{name}.*")])
            raise ValueError(f"a timm model by its present name, with a tag that it has or none{near}")
        return architecture

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stem != "patch" and self.pretrained:
            raise ValueError(f"stem={self.stem} has no pretrained weights: use stem=patch or pretrained=false")
        if self.initial_bundle and self.pretrained:
            raise ValueError("both initial_bundle and pretrained=true name weights to start from: add pretrained=false")
        if 0 < self.cache_size < self.image_size:
            raise ValueError(f"cache_size={self.cache_size} is smaller than image_size={self.image_size}")
        if self.metadata and (self.mixup_alpha or self.cutmix_alpha) and self.mix_probability == 1:
            raise ValueError("metadata is learnt from pictures that are not mixed: use mix_probability below 1")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of handlers.backbone.build_backbone that differ from timm's defaults."""
        given: dict[str, Any] = {
            "depth": self.depth,
            "drop_rate": self.drop_rate,
            "drop_path_rate": self.drop_path_rate,
        }
        given |= {"head_hidden": list(self.head_hidden)}
        options: dict[str, Any] = {key: value for key, value in given.items() if value}
        return options | ({"stem": self.stem} if self.stem != "patch" else {})

    @property
    def metadata_inputs(self) -> Metadata:
        """What the model takes beside the picture, as its bundle keeps it."""
        return Metadata.of(self.metadata)

    @property
    def preprocessing(self) -> Preprocessing:
        """The network's input, standardised as timm's weights of this architecture expect it."""
        pretrained_cfg: Any = timm.get_pretrained_cfg(self.architecture)  # never None: see _exists
        mean, std = (tuple(float(value) for value in values) for values in (pretrained_cfg.mean, pretrained_cfg.std))
        return Preprocessing(self.image_size, mean, std)  # type: ignore[arg-type]  # timm: three channels

    def to_dict(self) -> dict[str, Any]:
        """Plain values by the names used in YAML and on the command line."""
        return self.model_dump()


def load_config(
    preset: str | Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Put a configuration together; later sources win: `base`, preset, overrides, flags.

    Args:
        preset: a YAML file, or the name of one in training/configs.
        overrides: "key=value" strings, the value in YAML.
        flags: values from command-line options; None means not given.
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
        raise ConfigError(" ".join(_sentence(fault) for fault in error.errors())) from None


def find_preset(preset: str | Path) -> Path:
    """The file of a preset given by path or by name. Raises ConfigError with the nearest name if there is none."""
    path = Path(preset)
    if path.is_file():
        return path
    known = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if str(preset) in known:
        return PRESETS / f"{preset}.yaml"
    raise ConfigError(f"There is no preset {str(preset)!r}{_suggest(path.stem, known)}; known: {', '.join(known)}.")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML would read 1e-3 as a string, for want of a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def _value(text: str, key: str) -> Any:
    try:
        return yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        # A shell divides key=[a, b] at its space.
        hint = f' Put all of it in quotes: "{key}=[…, …]".' if text.count("[") > text.count("]") else ""
        raise ConfigError(f"The value of {key} cannot be read: {text!r}.{hint}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold settings, one `key: value` a line.")
    return values


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _suggest_setting(word: str) -> str:
    """Nearest setting, by its own name or by what other tools call it."""
    near = difflib.get_close_matches(word, [*TrainConfig.model_fields, *SYNONYMS], n=1, cutoff=0.4)
    return f" (did you mean {SYNONYMS.get(near[0], near[0])!r}?)" if near else ""


def _sentence(fault: Any) -> str:
    """One sentence for one of pydantic's error details."""
    key = str(fault["loc"][0]) if fault["loc"] else ""
    given = fault["input"]
    if fault["type"] == "extra_forbidden":
        return f"There is no setting {key!r}{_suggest_setting(key)}."
    if fault["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
        return f"{key} must be one of {', '.join(choices)}, not {given!r}{_suggest(str(given), choices)}."
    if fault["type"] == "list_type":
        return f"{key} must be a list in brackets, such as [{given}], not {given!r}."
    wanted = {
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
    }
    if fault["type"] in wanted:
        return f"{key} must be {wanted[fault['type']]}, not {given!r}."
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key} must be {message}, not {given!r}." if key else f"The settings do not fit together: {message}."
