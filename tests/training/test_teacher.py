"""The teacher's rows are those of the answers: against itself, against the oracle prompt, and one token at a time."""

import pyarrow as pa
import pytest
import torch

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.batches import TrainingBatch, TrainingCollator
from latentwire.data.layout import collate
from latentwire.losses.bundles import Reader, loss_terms, term_counts, weights_at
from latentwire.training.loop import Trainer

KD = {"losses.kd_weight": 1.0, "losses.hidden_kd_weight": 1.0, "losses.k": 3}


@pytest.fixture(scope="module", params=["context", "prompt"])
def trainer(request: pytest.FixtureRequest, run: RunConfig) -> Trainer:
    return Trainer(LatentWire(with_values(run, KD | {"data.send": request.param})), 4)


@pytest.fixture
def batch(trainer: Trainer, table: pa.Table) -> TrainingBatch:
    wire = trainer.wire
    (batch,) = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)(table)
    return batch


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
def test_each_row_is_what_the_receiver_says_one_token_at_a_time(
    trainer: Trainer, batch: TrainingBatch, table: pa.Table, receiver: str
) -> None:
    teacher = trainer._teach(receiver, batch, ())
    lm, builder = trainer.wire.receivers[receiver], trainer.wire.builders[receiver]
    rows, place = table.to_pydict(), 0
    for row in range(table.num_rows):
        context, question, answer = (
            rows[f"{receiver}_{piece}_ids"][row] for piece in ("context", "question", "answer")
        )
        prompt = builder.text(context, question).ids
        for offset in range(len(answer) + 1):
            said_V = lm.lm(input_ids=torch.tensor([prompt + answer[:offset]])).logits[0, -1]
            assert teacher.rows is not None
            torch.testing.assert_close(teacher.rows.log_p_NK[place], said_V.log_softmax(-1), atol=1e-4, rtol=1e-3)
            place += 1
    assert teacher.rows is not None and place == len(teacher.rows.log_p_NK)


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
def test_kd_is_zero_for_the_oracle_soft_prompt(
    trainer: Trainer, batch: TrainingBatch, table: pa.Table, receiver: str
) -> None:
    """Token embeddings of the message, through the latent path, say what the teacher says; other rows' do not."""
    lm, builder = trainer.wire.receivers[receiver], trainer.wire.builders[receiver]
    weights, losses = weights_at(trainer.wire.run.losses, 0), trainer.wire.run.losses
    rows = table.to_pydict()
    ids = batch.message_ids[receiver]
    question, answer = rows[f"{receiver}_question_ids"], rows[f"{receiver}_answer_ids"]
    latent = collate(builder.latent(len(ids[i]), question[i], answer[i]) for i in range(len(ids)))
    teacher = trainer._teach(receiver, batch, losses.hidden_kd_depths)

    def terms(message_ids: list[list[int]]) -> dict[str, float]:
        soft_ND = lm.embed_tokens(torch.tensor([token for row in message_ids for token in row]))
        reader = Reader(*lm.supervised_states(latent, soft_ND, losses.hidden_kd_depths))
        found = loss_terms(weights, latent, reader, teacher, term_counts(weights, latent))
        return {name: float(value) for name, value in found.items()}

    own = terms(ids)
    assert own["kd"] == pytest.approx(0, abs=1e-4) and own["hidden_kd"] == pytest.approx(0, abs=1e-4)
    lengths = [len(row) for row in ids]
    flat = [token for row in ids[1:] + ids[:1] for token in row]
    other = terms([flat[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(ids))])
    assert other["kd"] > 0.5 and other["hidden_kd"] > 0.05


def test_teachers_read_without_gradient(trainer: Trainer, batch: TrainingBatch) -> None:
    teacher = trainer._teach("llama", batch, (1.0,))
    assert teacher.rows is not None
    assert not teacher.rows.log_p_NK.requires_grad and not teacher.states[0].requires_grad
