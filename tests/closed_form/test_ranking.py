"""Heads that fetch from a text are found by its recital, and receivers without any are refused."""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from latentwire.closed_form import ranking
from latentwire.closed_form.ranking import (
    HeadScores,
    RankingError,
    choose,
    rank,
    shape_of,
)
from latentwire.config import PromptConfig, ReceiverConfig, RunConfig
from latentwire.models import own_cache
from latentwire.models.lm import LMWrapper
from latentwire.pretrained.weights import ReceiverError, load_tokenizer
from latentwire.prompts.sequences import PromptBuilder

TEXTS = [
    "Ada lives in Oslo. Ben lives in Rome. Cleo owns a goat.",
    "Cleo owns a goat.",
    "Ben owns a horse. Ada owns a cat.",
]
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

Subject = tuple[LMWrapper, PromptBuilder, list[list[int]]]


def unattached(_: Any) -> nullcontext[None]:
    return nullcontext()


def subject_of(config: ReceiverConfig) -> Subject:
    lm = LMWrapper(config)
    builder = PromptBuilder(lm.tokenizer, config, PromptConfig(), "context")
    return lm, builder, builder.tokenize(TEXTS, [], [])["context_ids"]


@pytest.fixture(scope="module", params=["llama", "qwen", "phi"])
def toy(request: pytest.FixtureRequest) -> Subject:
    return subject_of(ReceiverConfig(name=request.param, model=f"toy-{request.param}"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A receiver whose first layer sees 12 positions."""
    torch.manual_seed(5)
    shape = Gemma3TextConfig(
        **SMALL | {"vocab_size": 704, "num_attention_heads": 4},
        intermediate_size=32,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )
    folder = tmp_path_factory.mktemp("gemma")
    Gemma3ForCausalLM(shape).save_pretrained(folder)
    load_tokenizer(RunConfig().receivers[0]).save_pretrained(folder)
    return subject_of(ReceiverConfig(name="drawn", model=str(folder)))


def of(values: list[list[float]]) -> HeadScores:
    return HeadScores("llama", torch.tensor(values), 3)


@torch.no_grad()
def by_hand(subject: Subject, texts: list[list[int]]) -> torch.Tensor:
    """Each head's mean over entries, then texts, from the maps that transformers gives."""
    lm, builder, _ = subject
    lm.lm.set_attn_implementation("eager")
    means = []
    for ids in texts:
        prompt = builder.recital(ids, range(len(ids)))
        maps = lm.lm(input_ids=torch.tensor([prompt.ids]), output_attentions=True).attentions
        text, after = slice(prompt.message.start, prompt.message.stop), prompt.message.stop
        groups = lm.lm.config.num_attention_heads // lm.lm.config.num_key_value_heads
        rows = []
        for map_1ASS in maps:
            paid_AT = map_1ASS[0, :, after:, text].amax(1)
            rows.append([float(paid_AT[a : a + groups].amax(0).mean())
                         for a in range(0, len(paid_AT), groups)])  # fmt: skip
        means.append(torch.tensor(rows))
    lm.lm.set_attn_implementation("sdpa")
    return torch.stack(means).mean(0)


def test_a_score_is_the_mean_attention_of_recitals(toy: Subject) -> None:
    lm, builder, texts = toy
    scores = rank(lm, builder, texts, unattached)
    assert (scores.receiver, scores.texts, scores.way) == (lm.name, 3, "recital")
    assert scores.score_LH.shape == shape_of(lm.lm)[:2] and scores.score_LH.dtype == torch.float32
    assert torch.allclose(scores.score_LH, by_hand(toy, texts), atol=1e-5)
    assert float(scores.score_LH.std()) > 1e-3  # not one number for all


def test_texts_count_alike_in_any_order_and_number_together(
    toy: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, builder, texts = toy
    together = rank(lm, builder, texts, unattached).score_LH
    monkeypatch.setattr(ranking, "TOGETHER", 1)
    lines: list[str] = []
    alone = rank(lm, builder, texts[::-1], unattached, say=lines.append).score_LH
    assert torch.allclose(alone, together, atol=1e-5)
    assert lines == [f"ranking heads of {lm.name}: {done} of 3 texts recited" for done in (1, 2, 3)]


def test_texts_without_tokens_are_left_out(toy: Subject) -> None:
    lm, builder, texts = toy
    scores = rank(lm, builder, [[], texts[1], []], unattached)
    assert scores.texts == 1
    assert torch.equal(scores.score_LH, rank(lm, builder, [texts[1]], unattached).score_LH)
    for nothing in ([], [[], []]):
        with pytest.raises(RankingError, match=f"recites, got {len(nothing)} texts and none"):
            rank(lm, builder, nothing, unattached)


def test_what_stands_outside_a_window_counts_as_nothing(windowed: Subject) -> None:
    lm, builder, texts = windowed
    (score_LHT,) = own_cache.scores(lm, builder, texts[:1], unattached)
    unseen = score_LHT[0, 0] < 0
    assert unseen.any() and not (score_LHT[1] < 0).any()
    scores = rank(lm, builder, texts[:1], unattached)
    expected_H = torch.where(unseen, 0.0, score_LHT[0]).mean(-1)
    assert torch.allclose(scores.score_LH[0], expected_H, atol=1e-6)
    assert torch.allclose(scores.score_LH[1], score_LHT[1].mean(-1), atol=1e-6)
    assert (scores.score_LH >= 0).all()


def test_the_best_heads_stand_in_order_and_the_first_of_equals_wins() -> None:
    scores = of([[0.1, 0.9], [0.5, 0.5], [0.7, 0.5]])
    assert choose(scores, 1) == ((0, 1),)
    assert choose(scores, 3) == ((0, 1), (1, 0), (2, 0))
    assert choose(scores, 4) == ((0, 1), (1, 0), (1, 1), (2, 0))
    assert choose(scores, 6) == tuple((layer, head) for layer in range(3) for head in range(2))
    assert choose(of([[0.5] * 64] * 64), 70) == tuple(divmod(place, 64) for place in range(70))
    for count in (0, -1, 7):
        with pytest.raises(
            RankingError, match=f"1 to 6, all that receiver llama .* got {count}; choose"
        ):
            choose(scores, count)


def test_scores_come_back_from_json_bit_by_bit() -> None:
    torch.manual_seed(0)
    tiny = torch.tensor([[1e-42, 0.0, 1 / 3]])
    scores = HeadScores("qwen", torch.cat([torch.rand(4, 3), tiny]), 128)
    again = HeadScores.from_json(scores.to_json())
    assert (again.receiver, again.texts, again.way) == ("qwen", 128, "recital")
    assert again.score_LH.dtype == torch.float32 and torch.equal(again.score_LH, scores.score_LH)
    assert json.loads(scores.to_json())["scores"][0][0] == float(scores.score_LH[0, 0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"way": "gates"}, "way 'gates', not 'recital'"),
        ({"scores": [0.1, 0.2]}, r"no finite layers × heads, but \[2\]"),
        ({"scores": [[0.1], [0.2, 0.3]]}, "ValueError"),
        ({"scores": [[0.1, float("nan")]]}, "no finite"),
        ({"texts": None}, "TypeError"),
    ],
)
def test_other_json_is_refused(change: dict, reason: str) -> None:
    document = json.loads(of([[0.1, 0.2]]).to_json()) | change
    with pytest.raises(RankingError, match=f"{reason}.*; rank the receiver's heads again"):
        HeadScores.from_json(json.dumps(document))
    for text in ("", "[1]", "{}"):
        with pytest.raises(RankingError, match="must be the JSON that HeadScores"):
            HeadScores.from_json(text)


def test_a_shape_is_read_without_weights() -> None:
    narrow = SMALL | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        assert shape_of(LlamaForCausalLM(LlamaConfig(**narrow))) == (2, 2, 8)
        assert shape_of(Gemma3ForCausalLM(Gemma3TextConfig(**narrow, head_dim=24))) == (2, 2, 24)
        one_projection = Phi3ForCausalLM(Phi3Config(**narrow, pad_token_id=0))
        assert shape_of(one_projection) == (2, 2, 8)


def test_a_receiver_whose_heads_are_not_alike_is_refused() -> None:
    hybrid = Qwen3NextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"], num_experts=2
    )
    latent = DeepseekV3Config(
        **SMALL, num_key_value_heads=2, n_routed_experts=2, n_group=1, topk_group=1
    )
    with torch.device("meta"):
        uneven = LlamaForCausalLM(LlamaConfig(**SMALL))
        uneven.model.layers[1].self_attn.head_dim = 4
        unlike = LlamaForCausalLM(LlamaConfig(**SMALL))
        unlike.model.layers[0].self_attn.v_proj = torch.nn.Linear(16, 8)
        refused = {
            "layers of linear_attention": Qwen3NextForCausalLM(hybrid),
            "layers that share one cache": Gemma3ForCausalLM(
                Gemma3TextConfig(**SMALL, num_kv_shared_layers=1)
            ),
            r"attention logits that are capped \(attn_logit_softcapping\)": Gemma2ForCausalLM(
                Gemma2Config(**SMALL)
            ),
            r"layers of 2 × 8 and 4 × 4 \(heads × width\)": uneven,
            "no self_attn with projections": GPT2LMHeadModel(GPT2Config(**SMALL)),
            "no self_attn with projections to keys and values of one width": unlike,
            "no self_attn .* one width in every layer": DeepseekV3ForCausalLM(latent),
        }
    for reason, model in refused.items():
        with pytest.raises(
            ReceiverError,
            match=f"alike in every layer, {type(model).__name__} has {reason}.*; name another",
        ):
            shape_of(model)


def test_a_receiver_is_refused_before_it_reads(
    windowed: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, builder, texts = windowed
    monkeypatch.setattr(lm.lm.config, "attn_logit_softcapping", 50.0)
    monkeypatch.setattr(own_cache, "scores", None)
    with pytest.raises(ReceiverError, match="capped"):
        rank(lm, builder, texts, unattached)
