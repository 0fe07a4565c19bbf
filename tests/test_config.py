"""Training settings.

Flags override `key=value`, which overrides the preset. Everything that is not understood is an error of whole sentences
with the nearest name: a typo must not cost a night of training.
"""

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from training.config import DEFAULT_PRESET, PRESETS, ConfigError, TrainConfig, find_preset, load_config

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_override_key_value_which_overrides_preset_and_base(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("epochs: 2\nbatch_size: 2\nlr: 2e-3\n")
    base = {"epochs": 1, "batch_size": 1, "lr": 1.0, "seed": 1}
    config = load_config(preset, ["batch_size=3", "lr=3e-3"], {"lr": 4e-3, "epochs": None}, base)
    assert (config.seed, config.epochs, config.batch_size, config.lr) == (1, 2, 3, 4e-3)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("epoch=3", "epochs"),
        ("lerning_rate=1", "lr"),
        ("learning_rate=1", "lr"),
        ("batchsize=4", "batch_size"),
        ("model=vit", "architecture"),
        ("imagesize=64", "image_size"),
        ("early_stopping=3", "patience"),
        ("architecture=vit_smal_patch16_224", "vit_small_patch16_224"),
        ("architecture=vit_small_patch16_224_in21k", "vit_small_patch16_224.augreg_in21k"),
        ("architecture=vit_tiny_patch16_224.augreg", "vit_tiny_patch16_224.augreg_in21k"),
        ("architecture=vit_tiny_patch16_224.nonsense", "vit_tiny_patch16_224"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_name(override, nearest):
    assert f"the nearest is '{nearest}'." in refusal(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=1.5", "epochs is 1.5: it must be a valid integer."),
        ("epochs=ten", "epochs is 'ten': it must be a valid integer."),
        ("lr=fast", "lr is 'fast': it must be a valid number."),
        ("flip=1", "flip is 1: it must be a valid boolean."),
        ("architecture=7", "architecture is 7: it must be a valid string."),
        ("epochs=0", "epochs is 0: it must be greater than or equal to 1."),
        ("label_smoothing=1.5", "label_smoothing is 1.5: it must be less than or equal to 1."),
        ("crop_scale=0", "crop_scale is 0: it must be greater than 0."),
        ("confidence_level=1", "confidence_level is 1: it must be less than 1."),
        ("optimizer=adamv", "optimizer is 'adamv': it must be 'adamw' or 'adam'."),
        ("device=gpu", "device is 'gpu': it must be 'auto', 'cpu', 'cuda' or 'mps'."),
        ("epochs", "'epochs' is not a setting; write key=value, such as epochs=10."),
        ("lr=}", "lr is '}': it must be a value in YAML, such as 3, text or [a, b]."),
        ("metadata=[age,", "the list has no closing bracket. Quote the whole setting: \"metadata=[…, …]\"."),
        ("metadata=age", "metadata is 'age': it must be a valid list."),
        ("head_hidden=16", "head_hidden is 16: it must be a valid list."),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(override, message):
    assert message in refusal(override)


def test_contradictory_settings_are_refused():
    assert "pretrained=false" in refusal("stem=conv", "pretrained=true")
    assert "add pretrained=false" in refusal("initial_bundle=runs/NAME/bundle", "pretrained=true")
    assert "mix_probability below 1" in refusal("metadata=[age]", "mixup_alpha=1", "mix_probability=1")


def test_all_errors_are_reported_at_once():
    message = refusal("epochz=3", "flip=maybe")
    assert "There is no setting 'epochz'" in message
    assert "flip is 'maybe'" in message


def test_numbers_may_be_written_as_people_write_them():
    for text in ("1e-3", "1.0e-3", "0.001", ".001", "1E-03"):
        assert load_config(None, [f"lr={text}"]).lr == 1e-3
    assert load_config(None, ["lr=1"]).lr == 1.0


def test_an_unknown_preset_is_refused_with_the_names_of_all():
    with pytest.raises(ConfigError, match=r"There is no preset 'vit_smal'; choose one of .*resnet18, .*vit_small"):
        find_preset("vit_smal")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "epochs: [", "just words\n", ""])
def test_a_preset_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_config(tmp_path / "odd.yaml")


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_gives_a_config_or_a_sentence(key, value):
    sentence = ""
    try:
        load_config(None, [f"{key}={value}"])
    except ConfigError as error:
        sentence = str(error)
    assert not sentence or sentence.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_valid_and_state_command_hardware_and_expectation(name):
    config = load_config(name)
    head = find_preset(name).read_text().split("name:")[0]
    assert config.name == name
    assert f"python training/train.py --config {name}" in head
    assert "hardware" in head
    assert "expected" in head


def test_the_default_preset_is_pretrained():
    assert load_config(DEFAULT_PRESET).pretrained


def test_preprocessing_is_that_of_the_pretrained_weights():
    assert load_config(None, ["architecture=resnet18"]).preprocessing.mean == (0.485, 0.456, 0.406)
    assert load_config(None, ["architecture=vit_small_patch16_224"]).preprocessing.mean == (0.5, 0.5, 0.5)


def test_every_timm_model_can_be_configured_with_or_without_weights():
    for name in timm.list_models():
        assert TrainConfig(architecture=name).preprocessing.std > (0, 0, 0)
    assert not timm.is_model_pretrained("coatnet_0_224")
    assert load_config(None, ["architecture=coatnet_0_224"]).preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_config_survives_being_written_down():
    config = load_config("demo_vit", ["lr=1e-4"])
    assert load_config(base=config.to_dict()) == config
    assert set(config.to_dict()) == set(TrainConfig.model_fields)
