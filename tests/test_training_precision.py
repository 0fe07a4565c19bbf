"""precision=auto: on a CPU that multiplies in bf16, training takes the faster of fp32 and bf16 by a few timed steps,
says so in one line, and a resumed run keeps it. Measuring leaves the network alone."""

from types import SimpleNamespace

import pytest
import torch

from handlers.backbone import build_backbone
from tests.tiny_lesions import printed
from training import checkpoints, precision, train
from training.config import load_config

pytest_plugins = ["tests.fixtures_training"]
pytestmark = pytest.mark.usefixtures("only_the_loop")

NEVER = SimpleNamespace(watch=lambda: None, check=lambda agree=int: None, number=0)  # interrupted
CPU = torch.device("cpu")
TINY = ["architecture=test_vit", "image_size=32", "batch_size=16", "threads=1", "pretrained=false"]


@pytest.fixture
def with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize(("slow", "fast"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_faster_type_is_taken_and_kept_in_the_checkpoint(
    slow, fast, with_bf16, monkeypatch, manifest, calls, tmp_path
):
    monkeypatch.setattr(precision, "step_seconds", lambda *args: {slow: 0.2, fast: 0.1})
    types = []
    monkeypatch.setattr(
        train, "outputs_of", lambda *args, run=train.outputs_of: (types.append(args[-1]), run(*args))[1]
    )
    settings = [*TINY, f"manifest={manifest}"]
    train.train(load_config(None, [*settings, "epochs=1"]), tmp_path, None, NEVER)
    assert printed(calls, f"200 ms in {slow}") or printed(calls, f"100 ms in {fast}")
    assert printed(calls, f"training uses {fast}.")

    monkeypatch.setattr(precision, "step_seconds", lambda *args: pytest.fail("a resumed run measured again"))
    checkpoint = checkpoints.load(tmp_path / "last.pt")
    assert checkpoint["measured_precision"] == {"cpu": fast}
    train.train(load_config(None, [*settings, "epochs=2"]), tmp_path, checkpoint, NEVER)
    assert types == [precision.TYPES[fast]] * 2


@pytest.mark.parametrize(
    ("setting", "capabilities", "expected"),
    [("auto", {"avx512_f": True}, "fp32"), ("bf16", {}, "bf16"), ("fp32", {"amx_bf16": True}, "fp32")],
)
def test_nothing_is_measured_without_bf16_or_with_a_set_type(setting, capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "step_seconds", lambda *args: pytest.fail("measured"))
    config = load_config(None, [*TINY, f"precision={setting}"])
    assert precision.choose_precision(config, torch.nn.Identity(), CPU, {}) == (precision.TYPES[expected], {})


def test_measuring_times_both_types_and_leaves_the_network_alone():
    config = load_config(None, [*TINY, "architecture=test_resnet", "frozen_stages=1"])
    model = build_backbone(config.architecture, 3, config.image_size).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seconds = precision.step_seconds(config, model, CPU)
    assert set(seconds) == {"fp32", "bf16"}
    assert all(value > 0 for value in seconds.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
