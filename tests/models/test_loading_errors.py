"""Errors of loading weights have one cause and one next move."""

from pathlib import Path

import pytest

from latentwire.config import ReceiverConfig
from latentwire.models.loading_errors import loading_error


@pytest.mark.parametrize(
    ("error", "move"),
    [
        (ValueError("flex attention has no support here"), "set attn_implementation: eager for it, got sdpa"),
        (ValueError("Unrecognized configuration class X"), "its architecture must be one that AutoModelForCausalLM knows"),
        (OSError("no file named model.safetensors\nor others"), "its directory must hold config.json, weights as safetensors"),
        (OSError(""), "its directory must hold config.json, weights as safetensors"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_has_one_cause_and_one_next_move(
    tmp_path: Path, error: Exception, move: str
) -> None:
    config = ReceiverConfig(name="mine", model=str(tmp_path))
    cause = str(error).splitlines()[0] if str(error) else "OSError"
    said = str(loading_error(config, error))
    assert said.startswith(f"receiver mine: {tmp_path} cannot be loaded ({cause}); {move}")
    elsewhere = ReceiverConfig(name="mine", model="nobody/nothing")
    if isinstance(error, OSError):
        missing = f"there is no directory {Path('nobody/nothing').absolute()}; if it is a Hub id"
        assert missing in str(loading_error(elsewhere, error))
