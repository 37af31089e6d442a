"""A quantised receiver is loaded by its package."""

import pytest

from latentwire.config import ReceiverConfig
from latentwire.models.quantization import quantization_config
from latentwire.models.weights import ReceiverError


def test_quantisation_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ReceiverError, match=r"needs bitsandbytes, .* pip install 'latentwire\[quantization\]'"
    ):
        quantization_config(ReceiverConfig(name="a", model="toy-llama", quantization="nf4"))
