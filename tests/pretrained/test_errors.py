"""Errors of loading weights have one cause and one next move."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from latentwire.config import ReceiverConfig
from latentwire.pretrained.errors import loading_error, refuse_misfit
from latentwire.pretrained.weights import ReceiverError


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


@pytest.mark.parametrize(
    ("written", "move"),
    [
        (["LlamaForCausalLM"], "fetch both from one place"),
        (["LlamaModel"], "config.json names LlamaModel, where a causal LM is needed; name one"),
        (None, "config.json names no architecture, where a causal LM is needed; name one"),
    ],
)
def test_weights_of_another_size_say_what_to_do(written: list[str] | None, move: str) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
            num_attention_heads=1, architectures=written,
        )
    )  # fmt: skip
    report = {
        "mismatched_keys": [("lm_head.weight", (9, 4), (8, 4))],
        "missing_keys": [],
        "unexpected_keys": [],
    }
    config = ReceiverConfig(name="mine", model="somewhere")
    with pytest.raises(ReceiverError) as refused:
        refuse_misfit(model, config, report)
    assert str(refused.value) == (
        "receiver mine: config.json and weights of somewhere must be of one model, but lm_head.weight is 9 × 4 in the "
        f"weights and 8 × 4 by config.json (1 such); {move}"
    )
