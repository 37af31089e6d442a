"""How a configuration names its models, in an export and elsewhere."""

from functools import partial
from pathlib import Path

from latentwire import model_addresses


def test_an_address_says_as_little_as_it_can(tmp_path: Path) -> None:
    (tmp_path / "home" / "models" / "llama").mkdir(parents=True)
    model = str(tmp_path / "home" / "models" / "llama")
    assert (
        model_addresses.beside(tmp_path / "home" / "runs" / "best", model) == "../../models/llama"
    )
    assert model_addresses.beside(tmp_path / "home", model) == "./models/llama"
    assert model_addresses.below(tmp_path / "home", model) == "models/llama"
    assert model_addresses.below(tmp_path / "home" / "runs", model) == model
    assert model_addresses.by_name(model) == "./llama"
    for address in (
        model_addresses.by_name,
        partial(model_addresses.beside, tmp_path),
        partial(model_addresses.below, tmp_path),
    ):
        assert [address(name) for name in ("toy-llama", "org/model", "receiver:llama")] == [
            "toy-llama",
            "org/model",
            "receiver:llama",
        ]
