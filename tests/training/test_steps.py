"""What one step does, against losses and gradients computed another way: row by row, token by token, in plain loops."""

import math
from collections import Counter

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.batches import cut
from latentwire.message import Message
from latentwire.model import LatentWire
from latentwire.training import loop
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from tests.conftest import shard_table, wire_of
from tests.training.test_loop import EVERYTHING, trainer_of

TERMS = {
    "losses": {
        "answer_ce_weight": 1.5, "first_k_ce_weight": 0.5, "first_token_ce_weight": 0.25, "kd_weight": 0.75,
        "kd_temperature": 2.0, "kd_top_k": 0, "hidden_kd_weight": 0.5, "hidden_kd_depths": (0.5, 1.0),
        "reconstruction_ce_weight": 0.3, "continuation_ce_weight": 0.2, "k": 2,
    },
    "adapter.slot_positions": True,
    "encoder.private_len": 2,
    "training.batch_size": 5,
}  # fmt: skip
"""Every term with a weight of its own, so that no two could be exchanged."""


def shake(wire: LatentWire) -> None:
    """Other weights than fresh ones: nothing that begins as zero is zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in wire.interlingua.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


class Reference:
    """One receiver's losses over some rows, from the transformers model alone, one row after the other."""

    def __init__(self, wire: LatentWire, name: str, rows: list[dict]) -> None:
        self.wire, self.name, self.rows, self.losses = wire, name, rows, wire.run.losses
        self.lm, self.builder = wire.local_receiver(name).lm, wire.builders[name]
        self.adapter = wire.interlingua.adapters[name]

    def states(self, embeds: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Logits and hidden states of one sequence."""
        output = self.lm(inputs_embeds=torch.cat(embeds)[None], output_hidden_states=True)
        return output.logits[0], tuple(state[0] for state in output.hidden_states)

    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.lm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))

    def soft(self, text: str) -> torch.Tensor:
        """The prompt of a text's shared latents and this receiver's own, from the adapter's parts."""
        message: Message = self.wire.interlingua.encode([text])
        own = message.private[self.name]
        shared_LZ = message.z_BLZ[0, : int(message.length_B[0])]
        z_LZ = torch.cat((shared_LZ, message.z_BLZ[0, own.start : own.stop]))
        a = self.adapter
        x_LZ = torch.nn.functional.layer_norm(z_LZ, z_LZ.shape[1:], a.norm.weight, a.norm.bias)
        inner_LM = torch.nn.functional.gelu(x_LZ @ a.up.weight.T + a.up.bias)
        return a.gain * (
            x_LZ @ a.skip.weight.T + inner_LM @ a.down.weight.T + a.down.bias + a.position_LD
        )

    def said(self, before: list[torch.Tensor], ids: list[int]) -> list[torch.Tensor]:
        """Negative log-likelihood of each id after what stands before."""
        start = sum(map(len, before))
        logits_SV, _ = self.states([*before, self.embed(ids)])
        return [
            logits_SV[start + place - 1].exp().sum().log() - logits_SV[start + place - 1, token]
            for place, token in enumerate(ids)
        ]

    def terms(self) -> dict[str, torch.Tensor]:
        """Weighted terms, each the mean over all of its tokens in all rows."""
        found: dict[str, list[torch.Tensor]] = {
            name.removesuffix("_weight"): []
            for name in type(self.losses).model_fields
            if name.endswith("_weight") and name != "slot_kd_weight"
        }
        losses, builder = self.losses, self.builder
        for row in self.rows:
            ids = builder.tokenize([row["context"]], [row["question"]], [row["answers"][0]])
            context, question, answer = (
                ids[key][0] for key in ("context_ids", "question_ids", "answer_ids")
            )
            after = [*builder.mid_ids, *question, *builder.tail_ids, *builder.anchor_ids]
            target = [*answer, builder.stop_id]
            head = self.embed(builder.head_ids)
            prompt = [head, self.soft(row["context"]), self.embed(after)]
            nll = self.said(prompt, target)
            found["answer_ce"] += nll
            found["first_k_ce"] += nll[: losses.k]
            found["first_token_ce"] += nll[:1]
            student_SV, student = self.states([*prompt, self.embed(target)])
            with torch.no_grad():
                text = self.embed([*builder.head_ids, *context, *after])
                teacher_SV, teacher = self.states([text, self.embed(target)])
            for place in range(min(losses.k, len(target))):
                at, there = sum(map(len, prompt)) + place - 1, len(text) + place - 1
                p_V = (teacher_SV[there] / losses.kd_temperature).softmax(0)
                q_V = (student_SV[at] / losses.kd_temperature).softmax(0)
                found["kd"].append(losses.kd_temperature**2 * (p_V * (p_V.log() - q_V.log())).sum())
                distances = []
                for depth in losses.hidden_kd_depths:
                    layer = round(
                        depth * self.lm.config.num_hidden_layers
                    )  # 0 is what the first layer reads
                    mine, other = (
                        (s[layer][i] - s[layer][i].mean())
                        / (s[layer][i].var(unbiased=False) + 1e-5).sqrt()
                        for s, i in ((student, at), (teacher, there))
                    )
                    distances.append(((mine - other) ** 2).mean())
                found["hidden_kd"].append(sum(distances) / len(distances))
            again, further = self.adapter.control_CD[0:1], self.adapter.control_CD[1:2]
            found["reconstruction_ce"] += self.said(
                [head, self.soft(row["context"]), again], context
            )
            pieces = cut(row["context"], row["id"])
            assert pieces is not None
            ids_after = builder.tokenize([pieces[1]], [], [])["context_ids"][0]
            found["continuation_ce"] += self.said([head, self.soft(pieces[0]), further], ids_after)
        return {
            term: getattr(losses, f"{term}_weight") * torch.stack(values).mean()
            for term, values in found.items()
        }


def five_rows(run: RunConfig) -> tuple[pa.Table, list[dict]]:
    """Five rows whose answers and texts are not equally long, as shard columns and as texts."""
    table = shard_table(run, 5, seed=11)
    answers = ["Oslo", "a very old and rather large goat", "rice", "a baker", "Rome"]
    table = table.set_column(
        table.column_names.index("answers"), "answers", pa.array([[text] for text in answers])
    )
    for name, builder in wire_of(run).builders.items():
        ids = builder.tokenize([], [], answers)["answer_ids"]
        column = f"{name}_answer_ids"
        table = table.set_column(table.column_names.index(column), column, pa.array(ids))
    return table, table.select(["id", "context", "question", "answers"]).to_pylist()


@pytest.mark.parametrize(
    "values", [{}, {"training.accumulation": 2, "training.logit_rows": 4}], ids=["whole", "parted"]
)
def test_losses_and_gradients_are_those_of_plain_loops_over_rows_and_tokens(
    run: RunConfig, values: dict
) -> None:
    run = with_values(run, TERMS | values)
    table, rows = five_rows(run)
    trainer = trainer_of(run, 5)
    interlingua = trainer.wire.interlingua
    shake(trainer.wire)
    names = list(trainer.wire.receivers)
    references = {name: Reference(trainer.wire, name, rows).terms() for name in names}
    for name in names:
        lengths = [
            len(trainer.wire.builders[name].tokenize([], [], row["answers"])["answer_ids"][0])
            for row in rows
        ]
        assert max(lengths) > 3 * min(lengths)  # a mean of rows' means would be another number
    total = torch.stack(
        [value for terms in references.values() for value in terms.values()]
    ).sum() / len(names)
    total.backward()
    expected = {
        name: p.grad.clone() for name, p in interlingua.named_parameters() if p.grad is not None
    }
    interlingua.zero_grad(set_to_none=True)
    told = trainer.backward(trainer.collate(table, 0))
    assert told["loss"] == pytest.approx(total.item(), rel=1e-4)
    for name, terms in references.items():
        for term, value in terms.items():
            assert told[f"{term}_{name}"] == pytest.approx(value.item(), rel=2e-4), (term, name)
    found = {name: p.grad for name, p in interlingua.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=5e-3, msg=name)


def test_every_trained_parameter_moves_by_the_rate_of_its_part(
    run: RunConfig, table: pa.Table
) -> None:
    """Adam's first step moves what has a gradient by the rate: a feature's is the adapters', a gain's too."""
    rates = {"encoder": 1e-3, "adapters": 4e-3, "features": 4e-3}
    values = {
        "training.encoder_lr": rates["encoder"], "training.adapter_lr": rates["adapters"], "training.weight_decay": 0.0,
        "training.warmup_steps": 2, "training.epochs": 3,
    }  # fmt: skip
    trainer = trainer_of(with_values(run, EVERYTHING | values), 16)
    shake(trainer.wire)
    before = {name: p.detach().clone() for name, p in trainer.wire.interlingua.named_parameters()}
    trainer.step(table.slice(0, 4))
    assert {name.split(".")[0] for name in before} == rates.keys()
    for name, p in trainer.wire.interlingua.named_parameters():
        rate = rates[name.split(".")[0]] / 2  # the first of two steps of warm-up
        assert float((p - before[name]).abs().max()) == pytest.approx(rate, rel=0.02), name


def test_the_gradient_is_clipped_to_the_norm_that_is_asked_for(
    run: RunConfig, table: pa.Table
) -> None:
    def norms(clip: float) -> tuple[float, float]:
        trainer = trainer_of(with_values(run, {"training.clip_norm": clip}), 16)
        told = trainer.step(table.slice(0, 4))
        squares = [
            float(p.grad.square().sum())
            for p in trainer.wire.interlingua.parameters()
            if p.grad is not None
        ]
        return told["gradient_norm"], math.sqrt(sum(squares))

    free, left = norms(1e6)
    assert free == pytest.approx(left)
    for share in (0.5, 0.01):
        told, clipped = norms(share * free)
        assert told == pytest.approx(free) and clipped == pytest.approx(share * free, rel=1e-3)


def masks_of(trainer: Trainer, table: pa.Table, steps: list[int]) -> list[torch.Tensor]:
    """What the encoder's dropout lets through in these steps."""
    kept: list[torch.Tensor] = []
    hook = trainer.wire.interlingua.encoder.dropout.register_forward_hook(
        lambda *call: kept.append(call[2] != 0)
    )
    for step in steps:
        trainer.progress.step = step
        trainer.step(table.slice(0, 4))
    hook.remove()
    return kept


def test_dropout_is_another_in_every_step_and_worker_and_the_same_when_resumed(
    run: RunConfig, table: pa.Table
) -> None:
    run = with_values(run, {"encoder.latent_dropout": 0.5, "training.epochs": 9})
    masks = masks_of(trainer_of(run, 16), table, [0, 1, 2, 3])
    assert all(0.3 < float(mask.float().mean()) < 0.7 for mask in masks)
    assert all(not torch.equal(one, other) for i, one in enumerate(masks) for other in masks[:i])
    assert torch.equal(masks_of(trainer_of(run, 16), table, [2])[0], masks[2])
    second = trainer_of(run, 16)
    second.workers.rank = 1
    assert not torch.equal(masks_of(second, table, [2])[0], masks[2])
    other_seed = trainer_of(with_values(run, {"training.seed": 5}), 16)
    assert not torch.equal(masks_of(other_seed, table, [2])[0], masks[2])


def test_schedules_begin_where_the_alignment_ends(
    run: RunConfig, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "training.alignment_steps": 2,
        "training.epochs": 2,
        "encoder.latent_dropout": 0.4,
        "losses.first_token_ce_weight": 1.0,
        "losses.schedules": {
            name: {"kind": "linear", "steps": 2}
            for name in ("first_token_ce_weight", "latent_dropout")
        },
    }
    trainer = trainer_of(with_values(run, values), 16)
    weights_at, weights, dropped = loop.weights_at, [], []

    def spied(losses: object, step: int) -> object:
        weights.append(weights_at(losses, step).terms.get("first_token_ce", 0.0))
        return weights_at(losses, step)

    monkeypatch.setattr(loop, "weights_at", spied)
    rows = [batch for epoch in range(2) for batch in table_epochs(trainer.config, table)(epoch)]
    for batch in rows[:6]:
        told = trainer.step(batch)
        dropped.append(trainer.wire.interlingua.encoder.dropout.p)
        assert ("answer_ce_llama" in told) == (trainer.progress.step > 2)
    assert weights == [0, 0.5, 1, 1] and dropped[2:] == pytest.approx([0, 0.2, 0.4, 0.4])


def test_a_message_is_finest_in_the_first_step_after_the_alignment(
    run: RunConfig, table: pa.Table
) -> None:
    values = {
        "training.alignment_steps": 3,
        "training.coarsening_steps": 4,
        "encoder.pooling": "spans",
        "encoder.latent_len": 3,
    }
    trainer = trainer_of(with_values(run, values), 16)

    def latents(step: int) -> list[int]:
        (batch,) = trainer.collate(table.slice(0, 4), step)
        return batch.tokens.latents_B.tolist()

    (batch,) = trainer.collate(table.slice(0, 4), 0)
    states = batch.tokens.length_B.tolist()
    assert latents(0) == latents(2) == latents(3) == states and min(states) > 3
    middle = [3 + round((count - 3) / 2 + 1e-9) for count in states]
    assert all(abs(one - other) <= 1 for one, other in zip(latents(5), middle, strict=True))
    assert latents(7) == latents(99) == [3] * 4


def test_an_epoch_trains_on_every_row_once_in_an_order_of_its_own(
    run: RunConfig, table: pa.Table
) -> None:
    trainer = trainer_of(with_values(run, {"training.epochs": 2}), 16)
    seen: list[list[str]] = []
    step = trainer.step
    trainer.step = lambda rows: seen.append(rows["id"].to_pylist()) or step(rows)  # type: ignore[method-assign, func-returns-value]
    trainer.train(table_epochs(trainer.config, table), lambda: None)
    first, second = ([row for ids in epoch for row in ids] for epoch in (seen[:4], seen[4:]))
    assert Counter(first) == Counter(second) == Counter(table["id"].to_pylist()) and first != second
