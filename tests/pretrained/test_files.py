"""What is wrong with a receiver's files is one line, before anything is loaded or any shard is made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Gemma3nForCausalLM, Gemma3nTextConfig

from latentwire.cli import main
from latentwire.config import EncoderConfig, ReceiverConfig, RunConfig, SweepConfig
from latentwire.config.resolve import with_values
from latentwire.models.lm import LMWrapper
from latentwire.planning.planner import plan
from latentwire.pretrained import files, weights
from latentwire.pretrained.weights import ReceiverError, load_tokenizer, resolve, skeleton

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with an embedded model."""
    folder = tmp_path / "model"
    shutil.copytree(resolve(RunConfig().receivers[0]), folder)
    return folder


def planned(model: Path) -> None:
    """Plan a run that reads with ``model``."""
    values = {"receivers.0.model": str(model), "receivers.0.bos": "auto"}
    plan(SweepConfig(run=with_values(RunConfig(), values)), {"CPU": 2}, 64e9)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def in_parts(folder: Path, missing: bool = False) -> None:
    """Its weights in two files, with an index."""
    tensors = load_file(folder / "model.safetensors")
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, names in parts.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    if missing:
        (folder / "b.safetensors").unlink()


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def cut_pickle(folder: Path) -> None:
    """Its weights as torch writes them, and half of that."""
    (folder / "model.safetensors").rename(folder / "old")
    torch.save(load_file(folder / "old"), folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:1_000])


def foreign(folder: Path) -> None:
    shutil.copy(Path(resolve(RunConfig().receivers[1])) / "model.safetensors", folder)


def sentence_encoder(folder: Path) -> None:
    """Another kind of model, which transformers reads as a causal LM without its head."""
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=704, intermediate_size=16, **sizes)).save_pretrained(folder)


def silent_tokenizer(folder: Path) -> None:
    """None: transformers makes an empty one for this architecture."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    edit_config(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    tensors = load_file(folder / "model.safetensors")
    biases = ("q_proj.bias", "k_proj.bias", "v_proj.bias")  # those that this architecture has
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".bias") or name.endswith(biases)
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER),
                r"model\.safetensors must be the file itself, got a git-lfs pointer to it; run `git lfs pull` there"),
    "pointer-tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), r"tokenizer\.json must be .* git-lfs pointer"),
    "pointer-template": (lambda f: (f / "chat_template.jinja").write_text(POINTER), r"chat_template\.jinja must be .* git-lfs pointer"),
    "cut": (lambda f: cut(f, 1_000_000), r"model\.safetensors must have [\d,]+ bytes by its header, got 1,000,000; fetch it again"),
    "cut-early": (lambda f: cut(f, 1_000), r"model\.safetensors ends within its header, at 1,000 bytes; fetch it again"),
    "page": (lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html> 404 Not Found"),
             r"model\.safetensors has no safetensors header; fetch it again"),
    "none": (lambda f: (f / "model.safetensors").unlink(), r"must hold weights \(model\.safetensors, or .*\), got config\.json, "),
    "cut-pickle": (cut_pickle, r"pytorch_model\.bin must be a whole file of torch, it is cut at 1,000 bytes; fetch it again"),
    "part-missing": (lambda f: in_parts(f, missing=True), r"all 2 files that its index names, 1 are missing, b\.safetensors first"),
    "index": (lambda f: (in_parts(f), (f / "model.safetensors.index.json").write_text("{}")), "must map names of weights to files"),
    "foreign": (foreign, r"config\.json and weights of .* must be of one model, but model\.embed_tokens\.weight is "
                         r"640 × 112 in the weights and 704 × 128 by config\.json"),
    "wider": (lambda f: edit_config(f, intermediate_size=768),
              r"mlp\.down_proj\.weight is 128 × 384 in the weights and 128 × 768 by config\.json \(12 such\)"),
    "deeper": (lambda f: edit_config(f, num_hidden_layers=5), r"the weights lack model\.layers\.4\..* \(\d+ such\)"),
    "shallower": (lambda f: edit_config(f, num_hidden_layers=3), r"config\.json has no place for model\.layers\.3\..* \(\d+ such\)"),
    "encoder": (sentence_encoder, r"the weights lack cls\..*; config\.json names BertModel, where a causal LM is needed; name one"),
    "unknown-quantisation": (lambda f: edit_config(f, quantization_config={"quant_method": "tern"}),
                             r"quantised in a way that cannot be read here \(.*tern.*\); name its plain weights"),
    "no-tokenizer": (silent_tokenizer, r"must come with its tokenizer, the one that it gives reads 'Where is Ada\?' as \[\]; put its"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_says_in_one_line_what_is_wrong_with_a_directory(folder: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    planned(folder)
    spoil(folder)
    with pytest.raises(ReceiverError, match=rf"receiver llama: .*{message}") as caught:
        planned(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ReceiverError, match=message):
        LMWrapper(ReceiverConfig(name="llama", model=str(folder)))


def test_weights_in_parts_are_read(folder: Path) -> None:
    in_parts(folder)
    planned(folder)
    assert LMWrapper(ReceiverConfig(name="llama", model=str(folder))).width == 128


def test_an_encoders_backbone_is_looked_at_too(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=5)
    encoder = EncoderConfig(kind="lm", model=str(folder), pooling="spans")
    run = RunConfig().model_copy(update={"encoder": encoder})
    with pytest.raises(ReceiverError, match=r"receiver encoder: .* the weights lack layers\.4\."):
        plan(SweepConfig(run=run), {"CPU": 2}, 64e9)


def test_quantised_weights_are_not_quantised_again(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    with pytest.raises(
        ReceiverError,
        match=r"int8 needs plain weights, .* quantised already \(fp8\); set quantization: none",
    ):
        skeleton(ReceiverConfig(name="a", model=str(folder), quantization="int8"))


def test_the_command_says_it_before_it_makes_shards(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut(folder, 1_000_000)
    named = [
        "--llama_id",
        str(folder),
        "--output_dir",
        str(tmp_path / "out"),
        "--set",
        f"data.shard_dir={tmp_path / 'shards'}",
    ]
    assert main(["train", *named]) != 0
    said = capsys.readouterr()
    assert "by its header, got 1,000,000" in said.err.splitlines()[-1]
    assert not (tmp_path / "shards").exists() and not (tmp_path / "out").exists()


def test_a_model_whose_layers_look_token_ids_up_is_refused(folder: Path) -> None:
    shape = Gemma3nTextConfig(
        vocab_size=704, vocab_size_per_layer_input=704, hidden_size=32, intermediate_size=[32, 32], num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0], layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3nForCausalLM(shape).save_pretrained(folder)
    for call in (planned, lambda f: LMWrapper(ReceiverConfig(name="llama", model=str(f)))):
        with pytest.raises(
            ReceiverError, match=r"gives every layer embeddings of its token ids .* such as Gemma 3"
        ):
            call(folder)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF files that are not converted, only chosen."""
    monkeypatch.setattr(weights, "convert_gguf", lambda file, config: file)


def gguf(folder: Path, *names: str) -> str:
    """A directory with GGUF files; its path."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF and more")
    return str(folder)


@pytest.mark.usefixtures("converted")
def test_the_right_one_of_several_files_is_chosen(folder: Path, tmp_path: Path) -> None:
    def chosen(model: str) -> str:
        return Path(resolve(ReceiverConfig(name="a", model=model))).name

    assert chosen(gguf(folder, "x.gguf")) == "model"  # weights as they are, beside a GGUF
    (folder / "model.safetensors").unlink()
    assert chosen(str(folder)) == "x.gguf"  # a config.json beside a GGUF
    assert chosen(gguf(tmp_path / "b", "gemma-q4.gguf", "mmproj-gemma-f16.gguf")) == "gemma-q4.gguf"
    assert chosen(gguf(tmp_path / "c", "whole-00001-of-00001.gguf")) == "whole-00001-of-00001.gguf"
    assert chosen(str(tmp_path / "b" / "gemma-q4.gguf")) == "gemma-q4.gguf"


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a-q4.gguf", "a-q8.gguf"], r"exactly one \.gguf file, got a-q4\.gguf, a-q8\.gguf; name one of these files itself"),
        (["mmproj-a.gguf"], r"must hold a language model, got mmproj-a\.gguf alone, which projects images"),
        (["a-00001-of-00003.gguf", "a-00002-of-00003.gguf", "a-00003-of-00003.gguf"],
         r"one of 3 parts; join them .* llama-gguf-split --merge a-00001-of-00003\.gguf a\.gguf"),
        (["a-00002-of-00003.gguf"], r"got a-00002-of-00003\.gguf, one of 3 parts; .* --merge a-00001-of-00003\.gguf a\.gguf"),
    ],
)  # fmt: skip
def test_gguf_files_that_leave_a_choice_or_are_no_model_are_refused(
    tmp_path: Path, names: list, message: str
) -> None:
    with pytest.raises(ReceiverError, match=rf"receiver a: .*{message}") as caught:
        resolve(ReceiverConfig(name="a", model=gguf(tmp_path / "x", *names)))
    assert "\n" not in str(caught.value)


def test_a_gguf_that_is_a_pointer_or_something_else(tmp_path: Path) -> None:
    folder = Path(gguf(tmp_path / "x", "a.gguf"))
    for content, message in (
        (POINTER, "got a git-lfs pointer to it"),
        ("<html>", r"must begin with GGUF, got b'<htm'; fetch"),
    ):
        (folder / "a.gguf").write_text(content)
        with pytest.raises(ReceiverError, match=message):
            load_tokenizer(ReceiverConfig(name="a", model=str(folder)))


def test_weights_that_hold_no_tensor_are_as_long_as_their_header_says(tmp_path: Path) -> None:
    """One of several files may hold none: it is whole, and what follows its header is told."""
    file = tmp_path / "model.safetensors"
    save_file({}, file, {"format": "pt"})
    size = file.stat().st_size
    files.check_safetensors(file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(
        ReceiverError, match=f"must have {size} bytes by its header, got {size + 4}"
    ):
        files.check_safetensors(file)
