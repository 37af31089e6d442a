"""The frozen model: its weights' hash, its embeddings' scale, and models that cannot be one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
)

from latentwire.config import ReceiverConfig, RunConfig
from latentwire.models.frozen_lm import FrozenLM
from latentwire.pretrained.weights import ReceiverError, load_tokenizer, skeleton


def test_fingerprint_sees_one_changed_weight() -> None:
    lm = FrozenLM(RunConfig().receivers[1])
    before = lm.fingerprint()
    next(lm.lm.parameters()).data.view(-1)[0] += 1e-3
    assert lm.fingerprint() != before


def test_the_embeddings_scale_is_that_which_layers_read(tmp_path: Path) -> None:
    """Gemma multiplies its table by the root of its width on the way to the first layer."""
    toy = load_tokenizer(RunConfig().receivers[0])
    shape = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=len(toy), hidden_size=64, intermediate_size=32, **shape)
    )
    model.save_pretrained(tmp_path)
    toy.save_pretrained(tmp_path)
    lm = FrozenLM(ReceiverConfig(name="gemma", model=str(tmp_path)))
    seen: list[torch.Tensor] = []
    with lm.lm.base_model.layers[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    ):
        lm.lm(input_ids=torch.arange(len(toy))[None])
    assert lm.embed_rms == pytest.approx(float(seen[0].square().mean().sqrt()), rel=1e-4)
    assert lm.embed_rms == pytest.approx(
        8 * float(lm.embed_tokens.weight.square().mean().sqrt()), rel=1e-2
    )


def test_an_architecture_that_reads_ids_beside_embeddings_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = LlamaModel.forward

    def by_ids(
        self: LlamaModel, input_ids: Any = None, inputs_embeds: Any = None, **options: Any
    ) -> Any:
        if inputs_embeds is None:  # what is looked up by the ids alone
            inputs_embeds = self.embed_tokens(input_ids) + torch.sin(input_ids.float())[..., None]
        return forward(self, inputs_embeds=inputs_embeds, **options)

    monkeypatch.setattr(LlamaModel, "forward", by_ids)
    with pytest.raises(
        ReceiverError,
        match="must read embeddings as it reads their token ids, and does not; name a model",
    ):
        FrozenLM(RunConfig().receivers[0])


def test_an_architecture_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    toy = load_tokenizer(RunConfig().receivers[0])
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    CohereForCausalLM(CohereConfig(vocab_size=len(toy), logit_scale=0.1, **shape)).save_pretrained(
        tmp_path
    )
    toy.save_pretrained(tmp_path)
    with pytest.raises(
        ReceiverError,
        match=r"scales its logits in a way LMWrapper does not know.*needs a case in logits",
    ):
        FrozenLM(ReceiverConfig(name="scaled", model=str(tmp_path)))


def test_models_that_are_no_decoders_with_a_vocabulary_for_their_tokens_are_refused(
    tmp_path: Path,
) -> None:
    toy = load_tokenizer(RunConfig().receivers[0])
    small = {"num_hidden_layers": 1, "hidden_size": 16}
    models: dict[str, tuple[Any, str]] = {
        "bert": (BertLMHeadModel(BertConfig(vocab_size=len(toy), num_attention_heads=2, intermediate_size=32, **small)),
                 "keeps no keys and values to go on from; name a causal LM"),
        "mamba": (MambaForCausalLM(MambaConfig(vocab_size=len(toy), **small)), "keeps no keys and values to go on from"),
        "narrow": (LlamaForCausalLM(LlamaConfig(vocab_size=99, num_attention_heads=2, intermediate_size=32, **small)),
                   "must have an embedding for each token, its tokenizer has 704 and it 99"),
    }  # fmt: skip
    for name, (model, message) in models.items():
        model.save_pretrained(tmp_path / name)
        toy.save_pretrained(tmp_path / name)
        with pytest.raises(ReceiverError, match=message):
            FrozenLM(
                ReceiverConfig(name=name, model=str(tmp_path / name), attn_implementation="eager")
            )
    shape = T5Config(vocab_size=len(toy), d_model=16, num_layers=1)
    shape.save_pretrained(tmp_path / "t5")
    with pytest.raises(
        ReceiverError,
        match=r"t5 cannot be loaded \(.*; its architecture must be one that AutoModelForCausalLM",
    ):
        skeleton(ReceiverConfig(name="t5", model=str(tmp_path / "t5")))
    with pytest.raises(ReceiverError, match="set attn_implementation: eager for it, got sdpa"):
        FrozenLM(ReceiverConfig(name="mamba", model=str(tmp_path / "mamba")))
    (tmp_path / "narrow" / "tokenizer.json").unlink()
    with pytest.raises(
        ReceiverError, match=r"its directory must hold config\.json, .* a fast tokenizer"
    ):
        FrozenLM(ReceiverConfig(name="mute", model=str(tmp_path / "narrow")))
    with pytest.raises(
        ReceiverError, match="must be one of toy-llama, toy-qwen, toy-phi, got toy-lama"
    ):
        FrozenLM(ReceiverConfig(name="mine", model="toy-lama"))
