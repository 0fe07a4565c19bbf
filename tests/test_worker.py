"""TorchServe's worker, started by torchserve/worker.py."""

import pytest

from tests.serving import Serving

pytest_plugins = ["tests.fixtures_serving"]


@pytest.mark.live
def test_it_holds_no_torch_where_openvino_serves(serving: Serving):
    assert serving.ask(serving.good).json["model"]["runtime"] == "openvino"
    files = [part.path for part in serving.worker().memory_maps()]
    assert any("openvino" in file for file in files) and not any("libtorch" in file for file in files)
