"""Prompts of SentencePiece tokenizers such as Llama 2's, joined from pieces, are what the tokenizer makes of the whole text."""

import json
from pathlib import Path

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from latentwire.config import PromptConfig, ReceiverConfig
from latentwire.pretrained.weights import load_tokenizer
from latentwire.prompts.pieces import Pieces
from latentwire.prompts.sequences import PromptBuilder, PromptError

CORPUS = [
    "Passage: Ada lives in Oslo. Question: Where is the home of Ada? Answer: Oslo",
    "[INST] the red house [/INST] USER: so ASSISTANT: Paris Lagos lives houses 1912",
] * 4
CONTEXTS = ["Ada lives in Oslo.", "  the red house\n\nAda", "\nÄrzte", "1912 </s> [INST]"]
QUESTION, ANSWER = "Where is the home of Ada?", "Oslo"
CHATS = {
    "plain": None,
    "llama-2": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "ends-with-a-special-token": "{% for m in messages %}<turn>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}",
}


def sentencepiece(scheme: str) -> Tokenizer:
    """A tiny tokenizer set up as those of Llama 2, whose ``▁`` comes from ``scheme``, without any piece for a line's end."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"])
    )
    learned = json.loads(trained.to_str())["model"]
    vocab = {
        piece: rank
        for rank, piece in enumerate(
            [*learned["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
        )
    }
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "normalizer":  # as tokenizer.json of Llama 2, TinyLlama and Mistral v0.1 have it
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:  # as transformers builds a LlamaTokenizer: legacy, and not
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", "<s> $A <s> $B", [("<s>", 1)]
    )
    return tokenizer


def builder_of(folder: Path, scheme: str, chat: str, anchor: str = "Answer: ") -> PromptBuilder:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece(scheme), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    fast.chat_template = CHATS[chat]
    fast.save_pretrained(folder)
    receiver = ReceiverConfig(name="tiny", model=str(folder))
    return PromptBuilder(
        load_tokenizer(_weighed(receiver)), receiver, PromptConfig(anchor=anchor), "context"
    )


def _weighed(receiver: ReceiverConfig) -> ReceiverConfig:
    (Path(receiver.model) / "config.json").write_text(
        json.dumps({"model_type": "opt"})
    )  # none with a tokenizer class of its own
    return receiver


@pytest.mark.parametrize("anchor", ["Answer: ", "A:", ""])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("scheme", ["normalizer", "always", "first"])
def test_joined_pieces_are_the_whole_text_tokenised(
    tmp_path: Path, scheme: str, chat: str, anchor: str
) -> None:
    builder = builder_of(tmp_path, scheme, chat, anchor)
    whole = builder.tokenizer
    for context in CONTEXTS[
        :3
    ]:  # the last one holds a special token, which is text in a user's mouth
        ids = [c[0] for c in builder.tokenize([context], [QUESTION], [ANSWER]).values()]
        text, latent = builder.text(*ids), builder.latent(3, *ids[1:])
        content = f"Passage:\n{context}\nQuestion: {QUESTION}"
        prompt = content + "\n"
        if builder.chat:
            turn = [{"role": "user", "content": content}]
            prompt = whole.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        special = builder.chat and prompt.startswith("<s>")
        expected = whole(
            prompt + anchor + ANSWER, add_special_tokens=not special and not builder.chat
        ).input_ids
        assert text.ids == [*expected, builder.stop_id]
        assert text.ids[: text.message.start] == latent.ids[: latent.message.start]
        assert text.ids[text.message.stop :] == latent.ids[latent.message.stop :]
        assert builder.check_boundaries([ANSWER], [ids[2]]) == [True]


@pytest.mark.parametrize("scheme", ["normalizer", "always", "first"])
def test_a_users_special_tokens_stay_text_and_a_lines_end_is_one_token(
    tmp_path: Path, scheme: str
) -> None:
    builder = builder_of(tmp_path, scheme, "plain")
    hostile = builder.tokenize([CONTEXTS[3]], [], [])["context_ids"][0]
    assert (
        builder.tokenizer.eos_token_id not in hostile
        and builder.tokenizer.decode(hostile) == CONTEXTS[3]
    )
    assert builder.stop_ids == (
        builder.tokenizer.convert_tokens_to_ids("<0x0A>"),
        builder.tokenizer.eos_token_id,
    )
    assert builder.bos == 0 and builder.head_ids[0] == builder.tokenizer.bos_token_id


def test_a_chat_turn_of_such_a_tokenizer_ends_with_its_own_token(tmp_path: Path) -> None:
    for chat in ("llama-2", "zephyr"):
        builder = builder_of(tmp_path / chat, "normalizer", chat)
        assert builder.stop_ids == (builder.tokenizer.eos_token_id,)


def test_pieces_that_share_a_token_are_refused(tmp_path: Path) -> None:
    pieces = Pieces(builder_of(tmp_path, "normalizer", "plain").tokenizer, "tiny")
    assert pieces.after("house", " Oslo") == pieces.following(" Oslo")
    with pytest.raises(
        PromptError,
        match="'house ' and 'Oslo' must not share a token, and do; end the first without a space",
    ):
        pieces.after("house ", "Oslo")
