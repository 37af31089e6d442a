"""The text reader of ``experiments/tuned_text.py``: the whole text prompt behind vectors, of which alone it learns."""

import dataclasses

import pyarrow as pa
import pytest
import torch

from experiments.tuned_text import TextReader, alone
from latentwire.config import RunConfig
from latentwire.prompts.sequences import collate

ROWS = 4
VECTORS = 3


@pytest.fixture
def reader(run: RunConfig) -> TextReader:
    return TextReader(alone(run, "llama"), VECTORS, share=1.0)


@pytest.fixture
def rows(table: pa.Table) -> list[dict]:
    return table.slice(0, ROWS).to_pylist()


def test_a_prompt_is_the_text_prompt_behind_slots(reader: TextReader, rows: list[dict]) -> None:
    for row in rows:
        text = reader.builder.text(
            *(row[f"llama_{piece}_ids"] for piece in ("context", "question", "answer"))
        )
        begin = 0 if text.bos is None else 1
        prompt = reader.prompt(row, answered=True)
        assert prompt.ids[:begin] + prompt.ids[begin + VECTORS :] == text.ids
        assert prompt.message == range(begin, begin + VECTORS)
        for part in ("question", "anchor", "answer", "supervised"):
            assert [prompt.ids[p] for p in getattr(prompt, part)] == [
                text.ids[p] for p in getattr(text, part)
            ]


def test_vectors_that_are_tokens_give_that_texts_loss(reader: TextReader, rows: list[dict]) -> None:
    token_ids = [5, 9, 11]
    with torch.no_grad():
        reader.vectors_PD.copy_(reader.lm.token_embeddings(torch.tensor(token_ids)))
        ce_N, row_N = reader.nll(rows)
        for index, row in enumerate(rows):
            prompt = reader.prompt(row, answered=True)
            ids = list(prompt.ids)
            ids[prompt.message.start : prompt.message.stop] = token_ids
            plain = dataclasses.replace(prompt, ids=ids, message=range(0), soft=False)
            logits_NV = reader.lm.supervised_logits(collate([plain]))
            expected_N = torch.nn.functional.cross_entropy(
                logits_NV, collate([plain]).target_N, reduction="none"
            )
            torch.testing.assert_close(ce_N[row_N == index], expected_N, atol=1e-4, rtol=1e-4)


def test_a_share_of_the_text_is_its_beginning(run: RunConfig, rows: list[dict]) -> None:
    reader = TextReader(alone(run, "llama"), VECTORS, share=0.5)
    context_ids = rows[0]["llama_context_ids"]
    expected = reader.builder.text(
        context_ids[: round(len(context_ids) / 2)], rows[0]["llama_question_ids"]
    )
    assert len(reader.prompt(rows[0], answered=False).ids) == VECTORS + len(expected.ids)


def test_vectors_learn_and_the_receiver_does_not(reader: TextReader, rows: list[dict]) -> None:
    frozen, before = reader.lm.fingerprint(), reader.vectors_PD.detach().clone()
    first = float(reader.nll(rows)[0].mean().detach())
    reader.train(rows, steps=12, batch_size=ROWS, rate=3e-2)
    assert float(reader.nll(rows)[0].mean().detach()) < first
    assert not torch.equal(reader.vectors_PD, before)
    assert reader.lm.fingerprint() == frozen
    scores = reader.score(rows)
    assert {name: len(values) for name, values in scores.items()} == {
        "em": ROWS,
        "f1": ROWS,
        "nll": ROWS,
    }


def test_examples_are_left_out_and_a_receiver_must_be_there(run: RunConfig) -> None:
    shown = run.receivers[0].model_copy(update={"instruction": "Passage: …"})
    assert (
        alone(run.model_copy(update={"receivers": (shown, run.receivers[1])}), "llama")
        .receivers[0]
        .instruction
        == ""
    )
    with pytest.raises(SystemExit, match="--receiver must be one of llama, qwen, got gemma"):
        alone(run, "gemma")
