"""Training's settings.

A preset sets values, `key=value` wins over it, a command-line flag over both. Whatever is not understood is refused in
one sentence that names the nearest right word, never ignored: a typo must not cost a night of training.
"""

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from training.config import DEFAULT_PRESET, PRESETS, ConfigError, TrainConfig, find_preset, load_config

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def refusal(*overrides: str, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_win_over_overrides_over_preset_over_base(tmp_path):
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
        ("optimizer=adamv", "adam"),
        ("precision=bf_16", "bf16"),
        ("device=gpu", "cpu"),
        ("architecture=vit_smal_patch16_224", "vit_small_patch16_224"),
        ("architecture=vit_small_patch16_224_in21k", "vit_small_patch16_224.augreg_in21k"),
        ("architecture=vit_tiny_patch16_224.augreg", "vit_tiny_patch16_224.augreg_in21k"),
        ("architecture=vit_tiny_patch16_224.nonsense", "vit_tiny_patch16_224"),
    ],
)
def test_unknown_words_are_refused_with_the_nearest_right_one(override, nearest):
    assert f"did you mean '{nearest}'" in refusal(override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("epochs=1.5", "epochs must be a whole number, not 1.5."),
        ("epochs=ten", "epochs must be a whole number, not 'ten'."),
        ("lr=fast", "lr must be a number, not 'fast'."),
        ("flip=1", "flip must be true or false, not 1."),
        ("architecture=7", "architecture must be text, not 7."),
        ("epochs=0", "greater than or equal to 1"),
        ("label_smoothing=1.5", "less than or equal to 1"),
        ("crop_scale=0", "greater than 0"),
        ("seed=-1", "seed must be greater than or equal to 0"),
        ("epochs", "write key=value"),
        ("lr=[1", "cannot be read"),
        ("metadata=[age,", """cannot be read: '[age,'. Put all of it in quotes: "metadata=[…, …]"."""),
        ("metadata=age", "metadata must be a list in brackets, such as [age], not 'age'."),
        ("head_hidden=16", "head_hidden must be a list in brackets, such as [16], not 16."),
    ],
)
def test_wrong_values_are_refused(override, says):
    assert says in refusal(override)


def test_settings_that_contradict_each_other_are_refused():
    assert "cache_size=64 is smaller than image_size=128" in refusal("cache_size=64", "image_size=128")
    assert "pretrained=false" in refusal("stem=conv", "pretrained=true")
    assert "add pretrained=false" in refusal("initial_bundle=runs/NAME/bundle", "pretrained=true")


def test_every_fault_is_told_at_once():
    message = refusal("epochz=3", "flip=maybe")
    assert "epochs" in message
    assert "flip must be" in message


def test_numbers_may_be_written_as_people_write_them():
    for text in ("1e-3", "1.0e-3", "0.001", ".001", "1E-03"):
        assert load_config(None, [f"lr={text}"]).lr == 1e-3
    assert load_config(None, ["lr=1"]).lr == 1.0


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"did you mean 'vit_small'\?.*resnet18") as caught:
        find_preset("vit_smal")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "epochs: [", "just words\n", ""])
def test_a_preset_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_config(tmp_path / "odd.yaml")


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_override_leads_to_anything_but_a_config_or_a_sentence(key, value):
    sentence = ""
    try:
        load_config(None, [f"{key}={value}"])
    except ConfigError as error:
        sentence = str(error)
    assert not sentence or sentence.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_valid_and_say_what_they_are(name):
    config = load_config(name)
    head = find_preset(name).read_text().split("name:")[0]
    assert config.name == name
    assert timm.is_model(config.architecture)
    assert f"python training/train.py --config {name}" in head
    assert "hardware" in head
    assert "expected" in head


def test_the_default_preset_is_pretrained():
    assert DEFAULT_PRESET in NAMES
    assert load_config(DEFAULT_PRESET).pretrained


def test_preprocessing_is_that_of_the_pretrained_weights():
    assert load_config(None, ["architecture=resnet18"]).preprocessing.mean == (0.485, 0.456, 0.406)
    assert load_config(None, ["architecture=vit_small_patch16_224"]).preprocessing.mean == (0.5, 0.5, 0.5)


def test_every_model_that_timm_lists_can_be_trained_from_scratch_whether_it_has_weights_or_not():
    for name in timm.list_models():
        assert TrainConfig(architecture=name).preprocessing.std > (0, 0, 0)
    assert not timm.is_model_pretrained("coatnet_0_224")
    assert load_config(None, ["architecture=coatnet_0_224", "pretrained=false"]).preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_config_survives_being_written_down():
    config = load_config("demo_vit", ["lr=1e-4"])
    assert load_config(base=config.to_dict()) == config
    assert set(config.to_dict()) == set(TrainConfig.model_fields)
