"""Where weights come from, and what is said where they do not."""

from pathlib import Path

import pytest
import torch

from latentwire.config import ReceiverConfig
from latentwire.models.lm import LMWrapper
from latentwire.pretrained.weights import ReceiverError, pick_device, skeleton


def test_receivers_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ReceiverError, match="must be a Hub id or an existing directory"):
        LMWrapper(ReceiverConfig(name="a", model="./nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReceiverError, match=r"exactly one \.gguf file, got none"):
        LMWrapper(ReceiverConfig(name="a", model=str(tmp_path / "empty")))
    (tmp_path / "empty" / "x.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(ReceiverError, match="cannot be read as GGUF"):
        LMWrapper(ReceiverConfig(name="a", model=str(tmp_path / "empty")))
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ReceiverError, match="name its directory"):
        LMWrapper(ReceiverConfig(name="a", model=str(tmp_path / "notes.txt")))


@pytest.mark.slow
def test_a_gguf_is_converted_whoever_asks_first(
    real_receivers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path))
    model = ReceiverConfig(name="a", model=str(real_receivers / "smollm2"))
    with torch.device(
        "meta"
    ):  # where planners look at shapes, which cannot hold the weights that are converted
        shape = skeleton(model)
    assert sum(p.numel() for p in shape.parameters()) == sum(
        p.numel() for p in LMWrapper(model).lm.parameters()
    )


def test_the_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, move in (
        ("llama", "--llama_id <directory>"),
        ("qwen", "--qwen_id <directory>"),
        ("encoder", "--set encoder.model=<directory>"),
        ("sender_0", "--set encoder.senders=<directories>"),
        ("mine", "run.receivers in the configuration"),
    ):
        with pytest.raises(ReceiverError, match=rf"hf auth login.*{move}"):
            LMWrapper(ReceiverConfig(name=name, model="meta-llama/Meta-Llama-3.1-8B-Instruct"))
    with pytest.raises(ReceiverError, match="`make receivers` lays out those"):
        LMWrapper(ReceiverConfig(name="mine", model="receivers/forgotten"))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ReceiverError, match="device must exist"):
        pick_device("cuda:0")


@pytest.mark.parametrize(
    ("cuda", "mps", "picked"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_a_device_is_picked_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, picked: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == pick_device("auto") == torch.device(picked)
