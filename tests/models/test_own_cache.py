"""A receiver's own cache, cut: the attention of a recital chooses, and what is cut is really gone."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from latentwire.config import PromptConfig, ReceiverConfig, RunConfig
from latentwire.models import own_cache
from latentwire.models.lm import LMWrapper
from latentwire.pretrained.weights import ReceiverError, load_tokenizer
from latentwire.prompts import sequences
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import PromptBuilder, PromptSequence

ROWS = [
    (
        "Ada lives in Oslo. Ben lives in Rome. Cleo owns a goat.",
        "Where is the home of Ada?",
        "Oslo",
    ),
    ("Cleo owns a goat.", "Which animal belongs to Cleo?", "goat"),
    ("Ben owns a horse. Ada owns a cat.", "Which animal belongs to Ada?", "cat"),
]
WINDOW = 12

Subject = tuple[LMWrapper, PromptBuilder, list[tuple[list[int], list[int], list[int]]]]


def unattached(_: Any) -> nullcontext[None]:
    return nullcontext()


def subject_of(config: ReceiverConfig) -> Subject:
    lm = LMWrapper(config)
    builder = PromptBuilder(lm.tokenizer, config, PromptConfig(), "context")
    columns = builder.tokenize(*(list(column) for column in zip(*ROWS, strict=True)))
    return lm, builder, list(zip(*columns.values(), strict=True))


def untrained(folder: Path, model: Any) -> Subject:
    """A model that was just drawn, with the toy pair's tokenizer."""
    with torch.no_grad():
        for weight in model.parameters():  # attention that prefers some positions
            weight.mul_(12) if weight.dim() > 1 else None
    model.save_pretrained(folder)
    load_tokenizer(RunConfig().receivers[0]).save_pretrained(folder)
    return subject_of(ReceiverConfig(name="drawn", model=str(folder)))


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.manual_seed(3)
    shape = LlamaConfig(
        vocab_size=704,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return untrained(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(shape))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.manual_seed(4)
    shape = Gemma3TextConfig(
        vocab_size=704,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return untrained(tmp_path_factory.mktemp("gemma"), Gemma3ForCausalLM(shape))


def named(request: pytest.FixtureRequest) -> Subject:
    if request.param.startswith("toy-"):
        name = request.param.removeprefix("toy-")
        return subject_of(ReceiverConfig(name=name, model=request.param))
    return request.getfixturevalue(request.param)


WHOLE = ["toy-llama", "toy-qwen", "toy-phi", "two_layers"]


@pytest.fixture(scope="module", params=[*WHOLE, "windowed"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return named(request)


@pytest.fixture(scope="module", params=WHOLE)
def windowless(request: pytest.FixtureRequest) -> Subject:
    """Receivers whose references may leave entries out: a window would reach further then."""
    return named(request)


def scores_of(subject: Subject) -> list[torch.Tensor]:
    lm, builder, rows = subject
    return own_cache.scores(lm, builder, [context for context, _, _ in rows], unattached)


def nll(lm: LMWrapper, prompts: list[PromptSequence]) -> torch.Tensor:
    batch = collate(prompts)
    logits_NV = lm.supervised_logits(batch)
    return torch.nn.functional.cross_entropy(logits_NV, batch.target_N, reduction="none")


def answers(
    lm: LMWrapper, builder: PromptBuilder, prompts: list[PromptSequence]
) -> list[list[int]]:
    return lm.generate(collate(prompts, side="left"), builder.stop_ids, 6).rows


def rest_logits(
    lm: LMWrapper, prompt: PromptSequence, kept_LHm: torch.Tensor | None
) -> torch.Tensor:
    """Logits of all that stands after the text, over a cache from which all other entries were taken out.

    ``kept_LHm``: the text's places that each head keeps, as many in every head.
    """
    cache = DynamicCache()  # without a configuration it keeps what is outside of windows too
    end, start = prompt.message.stop, prompt.message.start
    lm.lm(input_ids=torch.tensor([prompt.ids[:end]]), past_key_values=cache)
    removed = 0
    for layer, stored in enumerate(cache.layers if kept_LHm is not None else []):
        index_1HmE = start + kept_LHm[layer][None, :, :, None]
        parts = []
        for held in (stored.keys, stored.values):
            index = index_1HmE.expand(-1, -1, -1, held.shape[-1])
            parts.append(torch.cat([held[:, :, :start], held.gather(2, index)], 2))
        stored.keys, stored.values = parts
        removed = len(prompt.message) - kept_LHm.shape[-1]
    rest = torch.tensor([prompt.ids[end:]])
    return lm.lm(
        input_ids=rest,
        past_key_values=cache,
        position_ids=torch.arange(end, len(prompt.ids))[None],
        attention_mask=torch.ones(1, len(prompt.ids) - removed),
    ).logits[0]


def target_ce(prompt: PromptSequence, rest_SV: torch.Tensor) -> torch.Tensor:
    predicting = [place - prompt.message.stop - 1 for place in prompt.supervised]
    targets = torch.tensor([prompt.ids[place] for place in prompt.supervised])
    return torch.nn.functional.cross_entropy(rest_SV[predicting], targets, reduction="none")


def mask_of(places_LHm: torch.Tensor, tokens: int) -> torch.Tensor:
    kept = torch.zeros(*places_LHm.shape[:2], tokens, dtype=torch.bool)
    return kept.scatter(2, places_LHm, True)


@torch.no_grad()
def test_a_score_is_the_most_attention_that_a_recital_pays(two_layers: Subject) -> None:
    lm, builder, rows = two_layers
    lm.lm.set_attn_implementation("eager")
    for (context, _, _), score_LHT in zip(rows, scores_of(two_layers), strict=True):
        prompt = builder.recital(context, range(len(context)))
        maps = lm.lm(input_ids=torch.tensor([prompt.ids]), output_attentions=True).attentions
        assert score_LHT.shape == (2, 2, len(context))
        for layer in range(2):
            for head in range(2):
                for place in range(len(context)):
                    column = len(builder.head_ids) + place
                    paid = maps[layer][0, 2 * head : 2 * head + 2, prompt.message.stop :, column]
                    assert float(score_LHT[layer, head, place]) == pytest.approx(
                        float(paid.max()), abs=1e-6
                    )
        assert float(score_LHT.std()) > 0.01  # nothing that any mean would give too
    lm.lm.set_attn_implementation("sdpa")


@torch.no_grad()
def test_long_texts_are_recited_in_parts(
    two_layers: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_cache, "PART", 7)
    lm, builder, rows = two_layers
    context = rows[0][0]
    stretches = own_cache.parts(len(context))
    assert [place for part in stretches for place in part] == list(range(len(context)))
    assert all(len(part) <= 7 for part in stretches) and len(stretches) > 2
    lm.lm.set_attn_implementation("eager")
    (score_LHT,) = own_cache.scores(lm, builder, [context], unattached)
    for part in stretches:
        prompt = builder.recital(context, part)
        maps = lm.lm(input_ids=torch.tensor([prompt.ids]), output_attentions=True).attentions
        for layer in range(2):
            paid_HqS = maps[layer][0, :, prompt.message.stop :].amax(1)
            by_hand = paid_HqS.view(2, 2, -1).amax(1)[:, prompt.message.start :]
            expected = by_hand[:, part.start : part.stop]
            assert torch.allclose(score_LHT[layer][:, part.start : part.stop], expected, atol=1e-6)
    lm.lm.set_attn_implementation("sdpa")


def test_a_recital_asks_for_the_text_and_shows_where_a_part_begins(two_layers: Subject) -> None:
    lm, builder, rows = two_layers
    context = rows[0][0]
    whole = builder.recital(context, range(len(context)))
    text = lm.tokenizer.decode(whole.ids)
    assert text.count("Oslo") == 2 and sequences.RECITE.strip() in text
    assert [whole.ids[place] for place in whole.supervised] == context
    assert [whole.ids[place] for place in whole.message] == context
    later = builder.recital(context, range(9, 12))
    before = later.ids[: later.supervised.start]
    assert [later.ids[place] for place in later.supervised] == context[9:12]
    assert before[-8 - len(builder.tail_ids) : -len(builder.tail_ids)] == context[1:9]


@torch.no_grad()
def test_texts_are_scored_together_as_each_alone(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, builder, rows = subject
    together = scores_of(subject)
    for (context, _, _), score_LHT in zip(rows, together, strict=True):
        (alone,) = own_cache.scores(lm, builder, [context], unattached)
        assert torch.allclose(alone, score_LHT, atol=1e-5)
    monkeypatch.setattr(own_cache, "MOST_WEIGHTS", 1)  # one at a time
    for alone, score_LHT in zip(scores_of(subject), together, strict=True):
        assert torch.allclose(alone, score_LHT, atol=1e-5)


def test_as_many_of_the_best_entries_are_kept_as_the_positions_have() -> None:
    torch.manual_seed(0)
    score_LHT = torch.rand(3, 2, 11)
    for positions in (0, 1, 4, 10, 11, 30):
        kept_LHT = own_cache.choose(score_LHT, positions)
        assert int(kept_LHT.sum()) == 3 * 2 * min(positions, 11)
        if 0 < positions < 11:
            assert score_LHT[kept_LHT].min() > score_LHT[~kept_LHT].max()
    per_head = own_cache.choose(score_LHT, 4).sum(-1)
    assert per_head.max() > per_head.min()  # over all heads and layers together, not within each
    flat = torch.full((2, 2, 6), 0.5)  # equal scores are counted too
    assert int(own_cache.choose(flat, 3).sum()) == 12
    score_LHT[0, :, :5] = -1.0  # what no question sees is neither kept nor counted
    kept_LHT = own_cache.choose(score_LHT, 4)
    assert int(kept_LHT.sum()) == 4 * 56 // 11 and not kept_LHT[0, :, :5].any()


@torch.no_grad()
def test_a_whole_cache_reads_as_the_text_does(subject: Subject) -> None:
    lm, builder, rows = subject
    answered = [builder.text(*row) for row in rows]
    open_ = [builder.text(context, question) for context, question, _ in rows]
    whole = [own_cache.choose(score, score.shape[-1]) for score in scores_of(subject)]
    as_text, said = nll(lm, answered), answers(lm, builder, open_)
    with own_cache.cut(lm, answered, whole, "right"):
        assert torch.allclose(nll(lm, answered), as_text, atol=1e-5)
    with own_cache.cut(lm, open_, whole, "left"):
        assert answers(lm, builder, open_) == said
    assert torch.equal(nll(lm, answered), as_text)  # and nothing stays attached
    assert lm.lm.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_an_empty_cache_reads_as_no_text_at_the_same_positions(windowless: Subject) -> None:
    lm, builder, rows = windowless
    answered = [builder.text(*row) for row in rows]
    nothing = [own_cache.choose(score, 0) for score in scores_of(windowless)]
    with own_cache.cut(lm, answered, nothing, "right"):
        cut = nll(lm, answered)
    expected = []
    for prompt in answered:
        start, end, size = prompt.message.start, prompt.message.stop, len(prompt.ids)
        ids = [*prompt.ids[:start], *prompt.ids[end:]]
        places = torch.tensor([[*range(start), *range(end, size)]])
        logits = lm.lm(
            input_ids=torch.tensor([ids]),
            position_ids=places,
            attention_mask=torch.ones(1, len(ids)),
        ).logits[0]
        expected.append(target_ce(prompt, logits[start:]))
    assert torch.allclose(cut, torch.cat(expected), atol=1e-5)
    assert not torch.allclose(cut, nll(lm, answered), atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "by head"])
def test_hidden_entries_weigh_what_entries_weigh_that_are_gone(
    windowless: Subject, alike: bool
) -> None:
    """Each head of the reference holds other entries, in tensors that have no others."""
    lm, builder, rows = windowless
    answered = [builder.text(*row) for row in rows]
    shapes = [score.shape for score in scores_of(windowless)]
    torch.manual_seed(1)
    places = []
    for layers, heads, tokens in shapes:
        drawn = torch.rand(layers, heads, tokens).topk(tokens // 3).indices.sort().values
        places.append(drawn[:1, :1].expand(layers, heads, -1) if alike else drawn)
    kept = [mask_of(rows_, shape[-1]) for rows_, shape in zip(places, shapes, strict=True)]
    with own_cache.cut(lm, answered, kept, "right"):
        cut = nll(lm, answered)
    removed = [
        target_ce(prompt, rest_logits(lm, prompt, rows_))
        for prompt, rows_ in zip(answered, places, strict=True)
    ]
    assert torch.allclose(cut, torch.cat(removed), atol=1e-4)
    assert not torch.allclose(cut, nll(lm, answered), atol=0.01)


@torch.no_grad()
def test_answers_over_a_cut_cache_are_the_likeliest_tokens_one_by_one(subject: Subject) -> None:
    lm, builder, rows = subject
    open_ = [builder.text(context, question) for context, question, _ in rows]
    kept = [own_cache.choose(score, score.shape[-1] // 3) for score in scores_of(subject)]
    with own_cache.cut(lm, open_, kept, "left"):
        together = answers(lm, builder, open_)
    for (context, question, _), kept_LHT, said in zip(rows, kept, together, strict=True):
        by_hand: list[int] = []
        while len(by_hand) < 6:
            prompt = builder.text(context, question, by_hand)  # its stop token is what comes next
            with own_cache.cut(lm, [prompt], [kept_LHT], "right"):
                state_BSD = lm.lm.base_model(input_ids=torch.tensor([prompt.ids])).last_hidden_state
            token = int(lm.logits(state_BSD[0, -2:-1]).argmax())
            if token in builder.stop_ids:
                break
            by_hand.append(token)
        assert by_hand == said


@torch.no_grad()
def test_entries_outside_a_window_are_not_counted(windowed: Subject) -> None:
    rows = windowed[2]
    for (context, _, _), score_LHT in zip(rows, scores_of(windowed), strict=True):
        # The next position sees itself and the WINDOW - 1 before it.
        out = max(0, len(context) - (WINDOW - 1))
        assert (score_LHT[[0, 2], :, :out] == -1).all() and (score_LHT[[0, 2], :, out:] >= 0).all()
        assert (score_LHT[1] >= 0).all()
        held = 2 * (len(context) + 2 * (len(context) - out))
        half = len(context) // 2
        assert int(own_cache.choose(score_LHT, half).sum()) == half * held // len(context)
    assert len(rows[0][0]) > WINDOW


def test_a_receiver_whose_cache_cannot_be_cut_is_refused_by_its_shape() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    hybrid = Qwen3NextConfig(
        **small, layer_types=["linear_attention", "full_attention"], num_experts=2
    )
    shared = Gemma3TextConfig(**small, num_kv_shared_layers=1)
    with torch.device("meta"):
        refused = {
            "layers of linear_attention": Qwen3NextForCausalLM(hybrid),
            "layers that share one cache": Gemma3ForCausalLM(shared),
            "no self_attn": GPT2LMHeadModel(GPT2Config(**small)),
        }
        uneven = LlamaForCausalLM(LlamaConfig(**small))
        own_cache.check("fine", uneven)
        uneven.model.layers[1].self_attn.num_key_value_groups = 2
        refused["no self_attn with the same"] = uneven
        own_cache.check("fine", Gemma3ForCausalLM(Gemma3TextConfig(**small)))
    for reason, model in refused.items():
        with pytest.raises(
            ReceiverError, match=f"receiver odd .* has {reason}.*; leave own_cache out"
        ):
            own_cache.check("odd", model)
