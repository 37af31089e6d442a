"""A GGUF becomes plain weights, once; what stands in the way is said."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentwire.config import ReceiverConfig, RunConfig
from latentwire.models.lm import LMWrapper
from latentwire.pretrained.weights import ReceiverError, resolve

TOY = RunConfig().receivers[0]


class Reading:
    """Reads a GGUF as transformers does: weights of fp32 that bear the marks of a quantisation.

    The weights are those of the toy receiver, which no tool here writes as GGUF.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[str, str, str]] = []
        """Each file's directory and name, and the device that weights are made on."""
        self.missing: list[str] = []
        self.fault: Exception | None = None
        self.plain = {kind: kind.from_pretrained for kind in (AutoModelForCausalLM, AutoTokenizer)}
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", self.model)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", self.tokenizer)

    def model(self, path: Any, *, gguf_file: str | None = None, **options: Any) -> Any:
        load = self.plain[AutoModelForCausalLM]
        if gguf_file is None:
            return load(path, **options)
        self.read.append((str(path), gguf_file, torch.empty(0).device.type))
        assert options == {"dtype": torch.float32, "output_loading_info": True}
        if self.fault is not None:
            raise self.fault
        model, report = load(resolve(TOY), **options)
        model.hf_quantizer, model.is_quantized, model.quantization_method = object(), True, "gguf"
        model.config.quantization_config = {"quant_method": "gguf"}
        return model, report | {"missing_keys": self.missing}

    def tokenizer(self, path: Any, *, gguf_file: str | None = None, **options: Any) -> Any:
        load = self.plain[AutoTokenizer]
        if gguf_file is None:
            return load(path, **options)
        assert (str(path), gguf_file) == self.read[-1][:2]
        return load(resolve(TOY))


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reading:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    return Reading(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF and more")
    return file


def test_a_gguf_is_converted_once_into_plain_weights(
    reading: Reading, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ReceiverConfig(name="mine", model=str(file))
    with torch.device("meta"):  # where planners look at shapes
        folder = Path(resolve(config))
    assert reading.read == [(str(tmp_path), file.name, "cpu")]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert folder == tmp_path / "cache" / "gguf" / digest
    said = capsys.readouterr().out
    assert said == f"receiver mine: converting model-q4.gguf once into {folder}\n"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {path.stat().st_mode for path in folder.glob("*.safetensors")} == {
        (folder / "config.json").stat().st_mode
    }
    expected = LMWrapper(TOY)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in expected.lm.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], tensor)
    converted = LMWrapper(config)
    assert converted.fingerprint() == expected.fingerprint()
    assert converted.tokenizer("Ada").input_ids == expected.tokenizer("Ada").input_ids
    assert len(reading.read) == 1 and capsys.readouterr().out == ""
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [digest]


def test_a_gguf_says_what_reads_it_where_that_is_not_installed(
    reading: Reading, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ReceiverError, match=r"the package gguf, .*; pip install 'latentwire\[gguf\]'"
    ):
        resolve(ReceiverConfig(name="mine", model=str(file)))
    assert not reading.read


def test_a_gguf_that_does_not_fit_its_architecture_is_not_kept(
    reading: Reading, file: Path, tmp_path: Path
) -> None:
    reading.missing = ["model.norm.weight"]
    config = ReceiverConfig(name="mine", model=str(file))
    with pytest.raises(ReceiverError, match=r"receiver mine: .* the weights lack model\.norm"):
        resolve(config)
    reading.fault = RuntimeError("tensor 7 ends early\nand more")
    with pytest.raises(
        ReceiverError,
        match=rf"receiver mine: {file} cannot be read as GGUF \(tensor 7 ends early\); fetch it",
    ):
        resolve(config)
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]
