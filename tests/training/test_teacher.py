"""The teacher's rows are those of the answers: against itself, against the oracle prompt, and one token at a time."""

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.batches import TrainingBatch, TrainingCollator
from latentwire.losses.bundles import Reader, loss_terms, term_counts, weights_at
from latentwire.model import LatentWire
from latentwire.prompts.batch import collate
from latentwire.training.loop import Trainer
from tests.conftest import shard_table

KD = {"losses.kd_weight": 1.0, "losses.kd_top_k": 0, "losses.hidden_kd_weight": 1.0, "losses.k": 3}


@pytest.fixture(scope="module", params=["context", "prompt", "smollm2"])
def trainer(request: pytest.FixtureRequest, run: RunConfig) -> Trainer:
    values: dict = KD | {"data.send": request.param}
    if request.param == "smollm2":
        folder = request.getfixturevalue("real_receivers")
        values = KD | {"receivers": [{"name": "smollm2", "model": str(folder / "smollm2")}]}
    return Trainer(LatentWire(with_values(run, values)), 4)


@pytest.fixture(scope="module")
def rows(trainer: Trainer) -> pa.Table:
    return shard_table(trainer.wire.run, 6)


@pytest.fixture
def batch(trainer: Trainer, rows: pa.Table) -> TrainingBatch:
    wire = trainer.wire
    (batch,) = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)(rows, step=0)
    return batch


def test_each_row_is_what_the_receiver_says_one_token_at_a_time(
    trainer: Trainer, batch: TrainingBatch, rows: pa.Table
) -> None:
    columns = rows.to_pydict()
    for name, lm in trainer.wire.receivers.items():
        teacher, place = lm.read_teacher(batch.teacher[name], trainer.wire.run.losses).rows, 0
        assert teacher is not None
        for row in range(rows.num_rows):
            context, question, answer = (
                columns[f"{name}_{piece}_ids"][row] for piece in ("context", "question", "answer")
            )
            prompt = trainer.wire.builders[name].text(context, question).ids
            for offset in range(len(answer) + 1):
                with torch.no_grad():
                    said_V = lm.lm(input_ids=torch.tensor([prompt + answer[:offset]])).logits[0, -1]
                torch.testing.assert_close(
                    teacher.log_p_NK[place], said_V.log_softmax(-1), atol=2e-3, rtol=1e-3
                )
                place += 1
        assert place == len(teacher.log_p_NK)


def test_kd_is_zero_for_the_oracle_soft_prompt(
    trainer: Trainer, batch: TrainingBatch, rows: pa.Table
) -> None:
    """Token embeddings of the message, through the latent path, say what the teacher says; other rows' do not."""
    losses = trainer.wire.run.losses
    weights, columns = weights_at(losses, 0), rows.to_pydict()
    for name, lm in trainer.wire.receivers.items():
        builder, ids = trainer.wire.builders[name], batch.message_ids[name]
        question, answer = columns[f"{name}_question_ids"], columns[f"{name}_answer_ids"]
        latent = collate(
            builder.latent(len(ids[i]), question[i], answer[i]) for i in range(len(ids))
        )
        teacher = lm.read_teacher(batch.teacher[name], losses)

        def terms(
            tokens: list[int], name=name, lm=lm, latent=latent, teacher=teacher
        ) -> dict[str, float]:
            with torch.no_grad():
                soft_ND = lm.embed_tokens(torch.tensor(tokens))
                hidden_ND, states = lm.supervised_states(latent, soft_ND, losses.hidden_kd_depths)
                reader = Reader(hidden_ND, lm.logits, states)
                found = loss_terms(weights, latent, reader, teacher, term_counts(weights, latent))
            return {term: float(value) for term, value in found.items()}

        own = terms([token for row in ids for token in row])
        assert own["kd"] == pytest.approx(0, abs=1e-4) and own["hidden_kd"] == pytest.approx(
            0, abs=1e-4
        )
        other = terms([token for row in ids[1:] + ids[:1] for token in row])
        assert other["kd"] > 0.1 and other["hidden_kd"] > 0.01


def test_teachers_read_without_gradient(trainer: Trainer, batch: TrainingBatch) -> None:
    name, lm = next(iter(trainer.wire.receivers.items()))
    teacher = lm.read_teacher(batch.teacher[name], trainer.wire.run.losses)
    assert teacher.rows is not None
    assert not teacher.rows.log_p_NK.requires_grad and not teacher.states[0].requires_grad
