"""A quantised receiver is loaded by its package."""

import pytest
import torch

from latentwire.config import ReceiverConfig
from latentwire.pretrained.quantization import keep_layout, quantization_config
from latentwire.pretrained.weights import ReceiverError


def test_quantisation_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ReceiverError, match=r"needs bitsandbytes, .* pip install 'latentwire\[quantization\]'"
    ):
        quantization_config(ReceiverConfig(name="a", model="toy-llama", quantization="nf4"))


def test_four_bit_weights_keep_their_layout_on_every_processor() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers[1].support_avx512bf16_for_cpu = True
    keep_layout(layers)
    assert layers[1].support_avx512bf16_for_cpu is False
    assert not hasattr(layers[0], "support_avx512bf16_for_cpu")
