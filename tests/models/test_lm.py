"""The frozen receiver: our numbers are the model's own, and nothing but the soft prompt gets a gradient."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentwire.config import PromptConfig, ReceiverConfig, RunConfig
from latentwire.dataset.toy import toy_rows
from latentwire.losses.terms import token_ce
from latentwire.model import LatentWire
from latentwire.models.lm import LMWrapper
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import PromptBuilder

PHI = ReceiverConfig(name="phi", model="toy-phi")
ROWS = [
    ("Ada lives in Oslo. Ben lives in Rome.", "Where is the home of Ada?", "Oslo"),
    ("Cleo owns a goat.", "Which animal belongs to Cleo?", "goat"),
]


def load(config: ReceiverConfig) -> tuple[LMWrapper, PromptBuilder, list]:
    lm = LMWrapper(config)
    builder = PromptBuilder(lm.tokenizer, config, PromptConfig(), "context")
    columns = builder.tokenize(*(list(column) for column in zip(*ROWS, strict=True)))
    return lm, builder, list(zip(*columns.values(), strict=True))


@pytest.fixture(
    scope="module",
    params=[*RunConfig().receivers, PHI, "smollm2", "gemma3"],
    ids=["llama", "qwen", "phi", "smollm2", "gemma3"],
)
def receiver(request: pytest.FixtureRequest) -> tuple[LMWrapper, PromptBuilder, list]:
    if isinstance(request.param, str):
        folder: Path = request.getfixturevalue("real_receivers")
        return load(ReceiverConfig(name=request.param, model=str(folder / request.param)))
    return load(request.param)


def own_loss(lm: LMWrapper, sequences: list, shift: int = 0) -> float:
    """The model's own loss on the supervised tokens; ``shift`` plants an off-by-one."""
    batch = collate(sequences)
    labels = torch.full_like(batch.ids_BS, -100)
    for row, sequence in enumerate(sequences):
        for position in range(sequence.answer.start, sequence.stop + 1):
            labels[row, position - shift] = batch.ids_BS[row, position]
    return float(
        lm.lm(input_ids=batch.ids_BS, attention_mask=batch.attention_BS, labels=labels).loss
    )


def test_ce_equals_the_models_own_loss(receiver: tuple) -> None:
    lm, builder, rows = receiver
    sequences = [builder.text(*row) for row in rows]
    batch = collate(sequences)
    ours = float(token_ce(lm.supervised_logits(batch), batch.target_N).mean())
    assert ours == pytest.approx(own_loss(lm, sequences), rel=1e-5, abs=1e-5)
    assert abs(ours - own_loss(lm, sequences, shift=1)) > 0.1


def test_the_head_reads_states_that_lie_side_by_side(receiver: tuple) -> None:
    """Of a strided slice, which transformers hands it in generation, a CPU multiplies row by row: 14 s for 0.04 in bfloat16."""
    lm, builder, rows = receiver
    seen: list[bool] = []
    with lm.head.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous())
    ):
        lm.generate(
            collate([builder.text(*row[:2]) for row in rows], side="left"), builder.stop_ids, 2
        )
    assert seen and all(seen)


def test_a_compiled_receiver_says_the_same() -> None:
    """Traced by the compiler, with and without a head read beforehand, at two lengths; what inductor makes of the graphs
    is its own affair."""
    plain, builder, rows = load(RunConfig().receivers[0])
    traced = LMWrapper(plain.config)
    traced.compile_layers(backend="eager")
    for slots in (3, 5):
        batch = collate([builder.latent(slots, question, answer) for _, question, answer in rows])
        soft_ND = (
            torch.randn(2 * slots, plain.width, generator=torch.Generator().manual_seed(0))
            * plain.embed_rms
        )
        expected_NV = plain.supervised_logits(batch, soft_ND)
        for asked in (batch, traced.read_head(batch)):
            torch.testing.assert_close(
                traced.supervised_logits(asked, soft_ND), expected_NV, atol=1e-4, rtol=1e-4
            )


def test_a_head_read_beforehand_changes_nothing(receiver: tuple) -> None:
    lm, builder, rows = receiver
    batch = collate(
        [
            builder.latent(3 + place, question, answer)
            for place, (_, question, answer) in enumerate(rows)
        ]
    )
    soft_ND = torch.randn(7, lm.width, generator=torch.Generator().manual_seed(0)) * lm.embed_rms
    short = lm.read_head(batch)
    assert short.head_H is not None
    assert short.head_H.tolist() == builder.head_ids and len(builder.head_ids) > 1
    assert short.ids_BS.shape[1] == batch.ids_BS.shape[1] - len(builder.head_ids)
    whole_ND, whole_states = lm.supervised_states(batch, soft_ND, (0.5, 1.0))
    for _ in range(2):  # the second reading finds the head unchanged
        found_ND, states = lm.supervised_states(short, soft_ND, (0.5, 1.0))
        torch.testing.assert_close(lm.logits(found_ND), lm.logits(whole_ND), atol=1e-4, rtol=1e-4)
        for state, expected in zip(states, whole_states, strict=True):
            torch.testing.assert_close(state, expected, atol=1e-3, rtol=1e-3)
    lm._head = None
    with pytest.raises(ValueError, match="has not read this batch's head"):
        lm.supervised_states(short, soft_ND)


def test_token_embeddings_through_the_latent_path_equal_text(receiver: tuple) -> None:
    lm, builder, rows = receiver
    for context, question, answer in rows:
        text = collate([builder.text(context, question, answer)])
        latent = collate([builder.latent(len(context), question, answer)])
        p_BLD = lm.embed_tokens(torch.tensor([context]))
        torch.testing.assert_close(
            lm.supervised_logits(latent, p_BLD), lm.supervised_logits(text), atol=1e-4, rtol=1e-4
        )
        asked = [
            collate([s], side="left")
            for s in (builder.text(context, question), builder.latent(len(context), question))
        ]
        said, expected = (
            lm.generate(asked[1], builder.stop_ids, 6, p_BLD),
            lm.generate(asked[0], builder.stop_ids, 6),
        )
        assert said.rows == expected.rows


def test_a_batch_of_unequal_lengths_gives_what_each_row_gives_alone(receiver: tuple) -> None:
    lm, builder, rows = receiver
    sequences = [builder.text(*row) for row in rows]
    batch = collate(sequences)
    together = lm.supervised_logits(batch)
    for row, sequence in enumerate(sequences):
        alone = lm.supervised_logits(collate([sequence]))
        torch.testing.assert_close(together[batch.row_N == row], alone, atol=2e-3, rtol=1e-3)
    prompts = [builder.text(context, question) for context, question, _ in rows]
    joined = lm.generate(collate(prompts, side="left"), builder.stop_ids, 6).rows
    assert joined == [
        lm.generate(collate([prompt], side="left"), builder.stop_ids, 6).rows[0]
        for prompt in prompts
    ]


def test_the_side_of_the_padding_and_its_token_do_not_matter(receiver: tuple) -> None:
    """Also where the padding token is the stop token: padding is told by length, never by id."""
    lm, builder, rows = receiver
    sequences = [builder.text(*row) for row in rows]
    right, left = collate(sequences), collate(sequences, side="left")
    torch.testing.assert_close(
        lm.supervised_logits(left), lm.supervised_logits(right), atol=2e-3, rtol=1e-3
    )
    padded = right.ids_BS.masked_fill(right.attention_BS == 0, builder.stop_id)
    other = replace(right, ids_BS=padded)
    torch.testing.assert_close(
        lm.supervised_logits(other), lm.supervised_logits(right), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(other.target_N, right.target_N)


def test_only_the_soft_prompt_gets_a_gradient() -> None:
    lm, builder, rows = load(RunConfig().receivers[0])
    before = lm.fingerprint()
    batch = collate([builder.latent(4, question, answer) for _, question, answer in rows])
    p_BLD = torch.randn(2, 4, lm.width, requires_grad=True)
    token_ce(lm.supervised_logits(batch, p_BLD), batch.target_N).mean().backward()
    assert p_BLD.grad is not None and bool(p_BLD.grad.abs().sum((1, 2)).gt(0).all())
    assert all(p.grad is None and not p.requires_grad for p in lm.parameters())
    assert lm.fingerprint() == before
    assert not lm.train().training


def test_a_soft_prompt_that_does_not_fill_its_slots_is_refused() -> None:
    lm, builder, rows = load(RunConfig().receivers[0])
    batch = collate([builder.latent(4, rows[0][1], rows[0][2])])
    with pytest.raises(ValueError, match="must fill its slots"):
        lm.supervised_logits(batch, torch.randn(1, 3, lm.width))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_receivers_read_answer_and_stay_frozen(kind: str) -> None:
    pytest.importorskip(
        {"int8": "torchao", "nf4": "bitsandbytes"}[kind],
        reason="pip install 'latentwire[quantization]'",
    )
    lm, builder, rows = load(RunConfig().receivers[0].model_copy(update={"quantization": kind}))
    before = lm.fingerprint()
    assert before != LMWrapper(RunConfig().receivers[0]).fingerprint()
    prompts = [builder.text(context, question) for context, question, _ in rows]
    answers = lm.tokenizer.batch_decode(
        lm.generate(collate(prompts, side="left"), builder.stop_ids, 6).rows
    )
    assert [answer.strip() for answer in answers] == [answer for _, _, answer in ROWS]
    asked = list(
        toy_rows(64, seed=5, people=3, kinds=2)
    )  # 0.97 in full precision; four bits cost a few more
    golds = [row["answers"][0] for row in asked]
    ids = builder.tokenize(
        [row["context"] for row in asked], [row["question"] for row in asked], golds
    )
    prompts = [
        builder.text(*read) for read in zip(ids["context_ids"], ids["question_ids"], strict=True)
    ]
    answers = lm.tokenizer.batch_decode(
        lm.generate(collate(prompts, side="left"), builder.stop_ids, 6).rows
    )
    assert sum(
        answer.strip() == gold for answer, gold in zip(answers, golds, strict=True)
    ) > 0.8 * len(golds)
    batch = collate([builder.latent(4, question, answer) for _, question, answer in rows])
    p_BLD = torch.randn(2, 4, lm.width, requires_grad=True)
    token_ce(lm.supervised_logits(batch, p_BLD), batch.target_N).mean().backward()
    assert p_BLD.grad is not None and bool(p_BLD.grad.abs().sum((1, 2)).gt(0).all())
    assert lm.fingerprint() == before


def test_a_device_map_gives_the_same_numbers() -> None:
    lm, builder, rows = load(RunConfig().receivers[0])
    mapped, _, _ = load(RunConfig().receivers[0].model_copy(update={"device_map": "auto"}))
    batch = collate([builder.text(*row) for row in rows])
    torch.testing.assert_close(mapped.supervised_logits(batch), lm.supervised_logits(batch))


def test_a_prompt_that_is_longer_than_a_model_can_read_is_refused() -> None:
    lm, builder, rows = load(RunConfig().receivers[0])
    prompts = collate([builder.text(*row[:2]) for row in rows], side="left")
    lm.most_positions = prompts.ids_BS.shape[1] + 4
    lm.generate(prompts, builder.stop_ids, 4)
    with pytest.raises(
        ReceiverError,
        match=r"reads at most \d+ positions, a prompt and its answer take \d+; lower data",
    ):
        lm.generate(prompts, builder.stop_ids, 5)
    lm.most_positions = 10
    with pytest.raises(ReceiverError, match="reads at most 10 positions"):
        lm.supervised_logits(collate([builder.text(*row) for row in rows]))


def test_states_are_those_that_layers_put_out(receiver: tuple) -> None:
    """A depth of 0 is what the first layer reads, 0.5 what half of the layers have made, 1 what the head reads."""
    lm, builder, rows = receiver
    batch = collate([builder.text(*row) for row in rows])
    layers = lm.lm.base_model.layers
    made: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: tuple, output: Any) -> None:
            made[number] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers, start=1):
            stack.callback(layer.register_forward_hook(keep(number)).remove)
        last_ND, states = lm.supervised_states(batch, None, (0.0, 0.5, 1.0))
    made[0] = lm.embed(batch, None)
    for state, expected in zip(states, (made[0], made[len(layers) // 2], None), strict=True):
        at_targets = last_ND if expected is None else expected.flatten(0, 1)[batch.predict_N]
        torch.testing.assert_close(state, at_targets)
    assert not torch.allclose(
        states[1], made[len(layers) // 2 - 1].flatten(0, 1)[batch.predict_N], atol=1e-3
    )


def test_layers_are_compiled_for_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled are the layers alone: the vocabulary's head reads few positions."""
    lm, asked = LMWrapper(RunConfig().receivers[0]), []
    monkeypatch.setattr(lm.lm.base_model, "compile", lambda **options: asked.append(options))
    lm.compile_layers()
    lm.compile_layers("eager")
    assert asked == [{"dynamic": True, "backend": name} for name in ("inductor", "eager")]


def test_positions_of_a_batch_go_to_the_receivers_device(
    wire: LatentWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch on the CPU is read by a receiver that lies elsewhere."""
    lm = wire.local_receiver("llama")
    told: dict[str, Any] = {}
    sequence = wire.builders["llama"].latent(3, [5, 6], [7])
    batch = collate([sequence]).without_latents()
    assert batch.position_BS is not None

    def model(**inputs: Any) -> Any:
        told.update(inputs)
        return SimpleNamespace(last_hidden_state=torch.zeros(*batch.ids_BS.shape, 4, device="meta"))

    elsewhere = property(lambda _: torch.device("meta"))
    monkeypatch.setattr(LMWrapper, "device", elsewhere)
    monkeypatch.setattr(LMWrapper, "embed", lambda *_: torch.zeros(1, device="meta"))
    monkeypatch.setattr(type(lm.lm), "base_model", property(lambda _: model))
    lm.supervised_states(batch)
    assert told["position_ids"].device.type == told["attention_mask"].device.type == "meta"
