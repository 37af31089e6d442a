"""Text readers: they read what they say, for as long as they say, and train nothing else."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentwire import exports
from latentwire.config import RunConfig, TunedTextConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import readers, streams
from latentwire.data.readers import TrainingBudget
from latentwire.evaluation.conditions import Condition, own_condition, with_tuned
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.scoring import final_conditions, predict_conditions
from latentwire.evaluation.summary import summarise
from latentwire.model import LatentWire
from latentwire.pretrained.weights import fingerprint
from latentwire.prompts.batch import collate
from latentwire.training import checkpoints, text_readers
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from tests.conftest import shard_table, wire_of
from tests.models.test_memory import HANDED

TUNED = Condition("text", tuned=True)


def reader_of(run: RunConfig, reads: str, **values: Any) -> LatentWire:
    """An untrained text reader of both toy receivers."""
    changed = {"prompt.reads": reads, "prefix": {"tokens": 5}, "features": {}, "losses": {}}
    return wire_of(with_values(run, changed | values))


def rows_of(table: pa.Table) -> dict[str, list]:
    return table.to_pydict()


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_prefix_of_a_texts_own_embeddings_reads_as_that_text(
    run: RunConfig, table: pa.Table, template: str
) -> None:
    """Loss and answers are those of the text with as many tokens more, on whichever side padding stands."""
    receivers = [receiver.model_dump() | {"template": "auto"} for receiver in run.receivers]
    reader = reader_of(with_values(run, {"receivers": receivers}, "receivers"), "text")
    rows = rows_of(table.slice(0, 4))
    for name, lm in reader.receivers.items():
        builder = reader.builders[name]
        said = lm.tokenizer("Mira has a red ball.", add_special_tokens=False).input_ids[:5]
        reader.interlingua.prefixes[name].begin_as(lm.token_embeddings(torch.tensor(said)))
        columns = [rows[f"{name}_{piece}_ids"] for piece in ("context", "question", "answer")]
        soft = [builder.text(*pieces, prefix=5) for pieces in zip(*columns, strict=True)]
        hard = [
            builder.text(said + context, question, answer)
            for context, question, answer in zip(*columns, strict=True)
        ]
        batch, plain = collate(soft), collate(hard)
        with reader.reading(name, batch, None) as soft_ND:
            by_prefix = lm.score_answers(batch, soft_ND).ce_N
        torch.testing.assert_close(by_prefix, lm.score_answers(plain).ce_N, atol=1e-5, rtol=1e-5)
        asked = [
            dataclasses.replace(p, ids=p.ids[: p.answer.start], supervised=range(0)) for p in soft
        ]
        plainly = [
            dataclasses.replace(p, ids=p.ids[: p.answer.start], supervised=range(0)) for p in hard
        ]
        assert reader.decode(name, asked)[0] == reader.decode(name, plainly)[0]


@pytest.mark.parametrize("reads", ["text", "truncated"])
def test_a_reader_beside_a_message_of_keys_and_values_is_a_whole_configuration(reads: str) -> None:
    """It is written out and read back as any other, and shows text of the message's length."""
    tuned = {"evaluation.tuned_text": {"steps": 2, "batch_size": 4}}
    run = with_values(RunConfig(), HANDED | tuned | {"encoder.tokens_per_latent": 3})
    condition = Condition(reads, tuned=True)
    reader = text_readers.reader_run(run, run.receivers, condition, TrainingBudget(2, 4), 8, 0.1)
    assert RunConfig.model_validate(reader.model_dump(mode="json")) == reader
    assert reader.encoder.tokens_per_latent == (3 if reads == "truncated" else None)


def test_a_wires_own_prefix_stands_before_its_latents(run: RunConfig, table: pa.Table) -> None:
    """The same message behind a prefix of the text's embeddings equals the message after that text."""
    wire = wire_of(with_values(run, {"prefix": {"tokens": 3}}))
    wire.interlingua.eval()
    message = wire.interlingua.encode(table["context"].to_pylist()[:2])
    rows = rows_of(table.slice(0, 2))
    lm, builder = wire.receivers["llama"], wire.builders["llama"]
    said = lm.tokenizer("Mira has a red ball.", add_special_tokens=False).input_ids[:3]
    said_PD = lm.token_embeddings(torch.tensor(said))
    wire.interlingua.prefixes["llama"].begin_as(said_PD)
    pieces = (rows[f"llama_{piece}_ids"] for piece in ("question", "answer"))
    prompts = [
        builder.latent(n, *pair) for n, *pair in zip(message.slots("llama"), *pieces, strict=True)
    ]
    batch = collate(prompts)
    with wire.reading("llama", batch, message) as soft_ND:
        assert soft_ND is not None
        ce_N = lm.score_answers(batch, soft_ND).ce_N
    p_BLD, _ = wire.interlingua.prompt("llama", message)
    by_hand = torch.cat([torch.cat((said_PD, p_LD)) for p_LD in p_BLD])
    torch.testing.assert_close(soft_ND, by_hand)
    assert [len(prompt.prefix) for prompt in prompts] == [3, 3]
    assert batch.head == len(builder.head_ids)
    assert torch.isfinite(ce_N).all()


def test_a_tuned_reader_trains_its_prefix_alone(run: RunConfig, table: pa.Table) -> None:
    reader = reader_of(run, "text", **{"training.prefix_lr": 0.1})
    frozen = {name: lm.fingerprint() for name, lm in reader.receivers.items()}
    names = [name for name, _ in reader.interlingua.named_parameters()]
    assert names == [f"prefixes.{name}.unit_PD" for name in reader.receivers]
    before = fingerprint(reader.interlingua)
    trainer = Trainer(reader, 2)
    trainer.train(table_epochs(trainer.config, table), lambda: None)
    assert fingerprint(reader.interlingua) != before
    assert {name: lm.fingerprint() for name, lm in reader.receivers.items()} == frozen


def test_keys_and_values_of_a_prefix_learn_and_begin_at_nothing(
    run: RunConfig, table: pa.Table
) -> None:
    plain, deep = (
        reader_of(run, "text", prefix={"tokens": 5, "layers": layers}) for layers in (False, True)
    )
    same = [list(predict(reader, table.slice(0, 4), TUNED)) for reader in (plain, deep)]
    assert [p.nll for p in same[0]] == [p.nll for p in same[1]]
    trainer = Trainer(deep, 2)
    trainer.step(table.slice(0, 8))
    for prefix in deep.interlingua.prefixes.values():
        moved_E = prefix.added_PE.detach().abs().amax(0)
        # The last layer's output at the prefix is read by nobody, its keys and values are.
        assert (moved_E > 0).float().mean() > 0.9


@pytest.mark.parametrize("reads", ["text", "truncated", "window", "closed_book"])
def test_training_shows_a_reader_what_its_scores_show_it(
    run: RunConfig, table: pa.Table, reads: str
) -> None:
    """The prompts of training are token by token those of the evaluation's row, answers included."""
    reader = reader_of(run, reads)
    trainer, eight = Trainer(reader, 1), table.slice(0, 8)
    (batch,) = trainer.collate(eight, 0)
    scored: dict[str, list[list[int]]] = {name: [] for name in reader.receivers}
    for name, lm in reader.receivers.items():
        score = lm.score_answers

        def spy(batch: Any, soft_ND: Any = None, name: str = name, score: Any = score) -> Any:
            for ids, mask in zip(batch.ids_BS, batch.attention_BS, strict=True):
                scored[name].append(ids[mask.bool()].tolist())
            return score(batch, soft_ND)

        lm.score_answers = spy  # type: ignore[method-assign]
    reader.parted = lambda *_, **__: None  # type: ignore[method-assign]  # else what rows share is read apart
    list(predict(reader, eight, own_condition(reader.run)))
    for name, sequences in batch.sequences.items():
        trained = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(sequences.ids_BS, sequences.attention_BS, strict=True)
        ]
        assert trained == scored[name]
        del reader.receivers[name].score_answers  # type: ignore[attr-defined]


def test_a_reader_of_cut_text_sees_as_many_tokens_as_a_message_has_positions(
    run: RunConfig, table: pa.Table
) -> None:
    """Counted by the encoder of the wire, whose weights the reader does without."""
    for values in ({}, {"encoder.pooling": "spans", "encoder.tokens_per_latent": 3}):
        changed = with_values(run, values)
        wire, reader = wire_of(changed), reader_of(changed, "truncated")
        eight = table.slice(0, 8)
        for latent, cut in zip(
            predict(wire, eight, "latent"),
            predict(reader, eight, Condition("truncated", tuned=True)),
            strict=True,
        ):
            assert cut.message_positions == min(latent.message_positions, cut.context_tokens)
            assert (
                cut.positions
                == latent.positions - latent.message_positions + cut.message_positions + 5
            )


def test_untuned_rows_are_what_they_were_beside_readers(run: RunConfig, table: pa.Table) -> None:
    """A reader's text without its prefix is the wire's own text row, bit by bit."""
    wire, reader = wire_of(run), reader_of(run, "text")
    untuned = [list(predict(one, table.slice(0, 4), "text")) for one in (wire, reader)]
    for mine, theirs in zip(*untuned, strict=True):
        assert (mine.text, mine.nll, mine.positions) == (
            theirs.text,
            theirs.nll,
            theirs.positions,
        )


# --------------------------------------------------------------------- trained for an evaluation


@pytest.fixture
def paths(run: RunConfig, tmp_path: Path) -> dict[str, Path]:
    """Complete shards of toy rows: sixteen to train on, eight others for development."""
    folders = {}
    for split, rows, seed in (("train", 16, 0), ("dev", 8, 1)):
        table = shard_table(run, rows, seed=seed)
        folder = tmp_path / "shards" / f"toy-{split}-{seed}"
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "00000.parquet")
        manifest = {"key": f"{split}{seed}", "rows": rows, "files": ["00000.parquet"]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        folders[split] = folder
    return folders


@pytest.fixture
def tuned(run: RunConfig) -> RunConfig:
    """A wire whose readers train for four steps of four questions."""
    text = TunedTextConfig(tokens=5, steps=4, batch_size=4, trials=2)
    return run.model_copy(
        update={"evaluation": run.evaluation.model_copy(update={"tuned_text": text})}
    )


def test_readers_are_made_once_and_say_how(
    tuned: RunConfig, paths: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same evaluation, and a wire of other lengths: the whole text's readers are reused by all."""
    wire, rows = wire_of(tuned), with_tuned((Condition("text"), Condition("latent")))
    assert [row.key for row in rows] == ["text", "text tuned", "latent"]
    readers = text_readers.ready(wire, rows, paths)
    assert capsys.readouterr().out.count("made in") == len(wire.receivers)
    other = wire_of(with_values(tuned, {"encoder.latent_len": 2}))
    again = text_readers.ready(other, rows, paths)
    assert capsys.readouterr().out.count("reused from") == len(wire.receivers)
    for key, reader in readers.items():
        assert key == "text tuned"
        assert fingerprint(reader.interlingua) == fingerprint(again[key].interlingua)
        assert list(reader.receivers.values()) == list(
            wire.receivers.values()
        )  # no weight is loaded twice
    cut = Condition("truncated", tuned=True)
    assert text_readers.reader_path(wire.run, wire.run.receivers[0], cut, paths) != (
        text_readers.reader_path(other.run, other.run.receivers[0], cut, paths)
    )


def test_readers_of_a_checkpoint_are_made_by_its_path_alone(
    tuned: RunConfig, paths: dict, tmp_path: Path
) -> None:
    """As on another machine: what comes back are the readers' directories and what they report."""
    wire, said = wire_of(tuned), []
    pins = {"receivers": wire.fingerprints()}
    checkpoint = checkpoints.save(tmp_path / "wire", wire, {}, pins)
    rows = with_tuned((Condition("text"), Condition("latent")))
    places, reports = text_readers.ensure_at(checkpoint, tuned, rows, paths, said.append)
    assert len(said) == 1 and said[0].startswith("text readers 1/1, full text, tuned: ")
    expected = {r.name: text_readers.reader_path(tuned, r, TUNED, paths) for r in tuned.receivers}
    assert places == {TUNED.key: expected}
    told = {name: text_readers.report_of(path) for name, path in expected.items()}
    assert reports == {TUNED.key: told}


def test_a_reader_was_given_what_it_reports(
    tuned: RunConfig, paths: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, questions, rows and positions, each counted where they happen."""
    seen: list[list[str]] = []
    step = Trainer.step

    def spy(self: Trainer, table: pa.Table) -> Any:
        seen.append(table["id"].to_pylist())
        return step(self, table)

    monkeypatch.setattr(Trainer, "step", spy)
    wire = wire_of(tuned)
    reader = text_readers.ready(wire, [TUNED], paths)[TUNED.key]
    training = set(streams.training_table(tuned, paths["train"])["id"].to_pylist())
    assert {row for rows in seen for row in rows} <= training
    steps = sum(report["steps"] * len(report["trials"]) for report in reader.reports.values())
    assert len(seen) == steps == 4 * 2 * len(wire.receivers)
    for name, report in reader.reports.items():
        assert (report["receiver"], report["reads"], report["budget"]) == (name, "text", None)
        assert (report["rows"], report["tokens"], report["steps"]) == (16, 5, 4)
        assert [report["rate"], report["dev_loss"]] == min(report["trials"], key=lambda t: t[1])
        assert len(report["trials"]) == 2 and 0 < report["seconds"] < 1_000
        low, high = tuned.evaluation.tuned_text.lr  # of which the first trial takes the middle
        assert report["trials"][0][0] == pytest.approx(math.sqrt(low * high))
        assert [len(rows) for rows in seen] == [report["batch_size"]] * len(seen)
        assert report["dev_loss"] == min(loss for _, loss in report["trials"])
        assert report["parameters"] == report["tokens"] * wire.receivers[name].width
    rows = shard_table(tuned, 4, seed=2)
    for plain, prefixed in zip(
        predict(wire, rows, "text"), predict(reader, rows, TUNED), strict=True
    ):
        assert prefixed.positions - plain.positions == reader.reports[plain.receiver]["tokens"]


def test_the_best_rate_by_development_loss_is_kept(tuned: RunConfig, paths: dict) -> None:
    """Its prefix scores the development rows as its report says."""
    wire = wire_of(tuned)
    reader = text_readers.ready(wire, [TUNED], paths)[TUNED.key]
    dev = pq.read_table(paths["dev"] / "00000.parquet")
    scores = summarise(list(predict(reader, dev, TUNED)))
    for name, report in reader.reports.items():
        assert scores[name]["nll"] == pytest.approx(report["dev_loss"], rel=1e-5)


def test_a_reader_takes_as_many_steps_as_the_wire_unless_it_is_told_otherwise(
    tuned: RunConfig,
) -> None:
    run = with_values(
        tuned, {"training.max_steps": 7, "training.batch_size": 8, "training.epochs": 3}
    )
    text = TunedTextConfig()
    same = run.model_copy(
        update={"evaluation": run.evaluation.model_copy(update={"tuned_text": text})}
    )
    assert (
        readers.reader_budget(same, rows=16) == TrainingBudget(6, 8) == readers.budget_of(run, 16)
    )
    assert readers.reader_budget(run, rows=16) == TrainingBudget(4, 4)


def test_a_reader_of_other_weights_is_refused(tuned: RunConfig, paths: dict) -> None:
    wire = wire_of(tuned)
    places = text_readers.ensure_readers(wire, [TUNED], paths)
    manifest = places[TUNED.key]["llama"] / exports.MANIFEST
    document = json.loads(manifest.read_text())
    document["pins"]["receivers"]["llama"] = "0" * 64
    manifest.write_text(json.dumps(document))
    with pytest.raises(exports.CheckpointError, match="must be of receiver llama as it is"):
        text_readers.load_readers(wire, [TUNED], places)


def test_a_killed_training_goes_on(
    tuned: RunConfig, paths: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a finished training are not taken again."""
    steps: list[int] = []
    step = Trainer.step

    def dying(self: Trainer, table: pa.Table) -> Any:
        if len(steps) == 6:
            raise KeyboardInterrupt
        steps.append(self.progress.step)
        return step(self, table)

    monkeypatch.setattr(Trainer, "step", dying)
    wire = wire_of(tuned)
    with pytest.raises(KeyboardInterrupt):
        text_readers.ready(wire, [TUNED], paths)
    monkeypatch.setattr(Trainer, "step", step)
    counted: list[int] = []

    def counting(self: Trainer, table: pa.Table) -> Any:
        counted.append(self.progress.step)
        return step(self, table)

    monkeypatch.setattr(Trainer, "step", counting)
    text_readers.ready(wire, [TUNED], paths)
    assert len(counted) < 4 * 2 * len(wire.receivers) - 3
    assert not list(paths["train"].parent.glob(".reader-*"))  # nothing is left over


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prefix": None}, "trains a prefix before the text, got prefix null"),
        ({"features": {"deep_prefix": {}}}, "has no message, got features"),
        ({"training.alignment_steps": 3}, "has no message, got training.alignment_steps"),
        ({"losses.reconstruction_ce_weight": 1.0}, "has no message, got losses.reconstruction"),
    ],
)
def test_a_reader_is_refused_what_only_a_wire_has(
    run: RunConfig, values: dict[str, Any], told: str
) -> None:
    changed = {"prompt.reads": "text", "prefix": {}, "features": {}, "losses": {}}
    with pytest.raises(ConfigError, match=told):
        with_values(run, changed | values)


def test_a_wire_may_begin_with_a_readers_prefix(
    run: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    """``init_from`` names the reader; encoder and adapters stay fresh, and the prefix learns on."""
    reader = reader_of(run, "text")
    for prefix in reader.interlingua.prefixes.values():
        torch.nn.init.normal_(prefix.unit_PD)
    saved = checkpoints.save(tmp_path / "reader", reader, {}, {})
    wire = wire_of(with_values(run, {"prefix": {"tokens": 5}}))
    fresh = wire.interlingua.encoder.project.weight.detach().clone()
    checkpoints.initialise(saved, wire)
    for name, prefix in wire.interlingua.prefixes.items():
        torch.testing.assert_close(prefix.unit_PD, reader.interlingua.prefixes[name].unit_PD)
    torch.testing.assert_close(wire.interlingua.encoder.project.weight, fresh)
    before = wire.interlingua.prefixes["llama"].unit_PD.detach().clone()
    Trainer(wire, 2).step(table.slice(0, 8))
    assert not torch.equal(before, wire.interlingua.prefixes["llama"].unit_PD)
    assert "# A text reader" in (saved / "README.md").read_text()


def test_a_reader_is_scored_as_itself(run: RunConfig, paths: dict) -> None:
    """Its table has its own row and the untuned one, and no other reader is trained for it."""
    reader = reader_of(run, "truncated")
    rows = final_conditions(reader.run)
    assert [row.key for row in rows] == ["truncated", "truncated tuned"]
    assert text_readers.ready(reader, rows, paths) == {"truncated tuned": reader}
    scored = predict_conditions(
        reader, paths["dev"], rows, readers=text_readers.ready(reader, rows, paths)
    )
    for untuned, tuned in zip(scored["truncated"], scored["truncated tuned"], strict=True):
        assert tuned.positions - untuned.positions == 5
    assert not list(paths["train"].parent.glob("reader-*"))
