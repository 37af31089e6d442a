"""A latent's keys and values are held to those of the text that it stands for."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.model import LatentWire
from latentwire.models.prefix import Prefix
from latentwire.models.slots import projections, put_in_slots, recorded
from latentwire.receivers.local import LocalReceiver
from latentwire.training.loop import Trainer
from latentwire.training.span_teacher import SpanTeacher, slot_distance
from tests.conftest import wire_of
from tests.models.test_memory import HANDED

SLOTS = {"losses.slot_kd_weight": 1.0}
TEXTS = ["Mira has a red ball.", "Tom lives in the old house by the sea."]


def ids_of(lm: LocalReceiver, texts: list[str]) -> list[list[int]]:
    return lm.tokenizer(texts, add_special_tokens=False).input_ids


def keys_and_values(lm: LocalReceiver, ids: list[int]) -> list[torch.Tensor]:
    """Return what the projections give for one row of tokens, by hooks of our own."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for layer in projections(lm.lm, "test")
    ]
    with torch.no_grad():
        lm.lm(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def test_targets_are_means_of_what_the_receiver_holds_of_each_span(wire: LatentWire) -> None:
    """Against its own pass over each text alone, averaged by bytes."""
    teacher = SpanTeacher(wire, None)
    span_BL2 = torch.tensor([[[0.0, 0.5], [0.5, 1.0]], [[0.0, 0.25], [0.25, 1.0]]])
    for name, lm in wire.receivers.items():
        assert isinstance(lm, LocalReceiver)
        ids, head = ids_of(lm, TEXTS), wire.builders[name].head_ids
        targets = teacher.targets(name, ids, span_BL2)
        for row, text_ids in enumerate(ids):
            sizes_T = lm.token_bytes[text_ids].float()
            end_T = sizes_T.cumsum(0) / sizes_T.sum()
            start_T = end_T - sizes_T / sizes_T.sum()
            own = keys_and_values(lm, [*head, *text_ids])
            for target_BLE, entry_SE in zip(targets, own, strict=True):
                for latent, (low, high) in enumerate(span_BL2[row].tolist()):
                    overlap_T = (end_T.clamp(max=high) - start_T.clamp(min=low)).clamp(min=0)
                    mean_E = (overlap_T[:, None] * entry_SE[len(head) :]).sum(0) / overlap_T.sum()
                    torch.testing.assert_close(
                        target_BLE[row, latent], mean_E, atol=1e-4, rtol=1e-4
                    )


def test_a_tuned_teacher_reads_behind_its_prefix(wire: LatentWire) -> None:
    """A prefix of a text's own embeddings gives the targets of the text after that text."""
    lm = wire.local_receiver("llama")
    said, text = ids_of(lm, ["Anna has a blue hat.", "Tom lives by the sea."])
    prefix = Prefix(wire.run.prefix or _prefix(len(said)), lm.width, lm.embed_rms, None)
    prefix.begin_as(lm.token_embeddings(torch.tensor(said)))
    teacher = SpanTeacher(wire, None)
    plain = teacher.targets("llama", [text], torch.tensor([[[0.0, 1.0]]]))
    teacher.prefixes["llama"] = prefix
    found = teacher.targets("llama", [text], torch.tensor([[[0.0, 1.0]]]))
    own = keys_and_values(lm, [*wire.builders["llama"].head_ids, *said, *text])
    sizes_T1 = lm.token_bytes[text].float()[:, None]
    for target_BLE, entry_SE, without_BLE in zip(found, own, plain, strict=True):
        mean_E = (sizes_T1 * entry_SE[-len(text) :]).sum(0) / sizes_T1.sum()
        torch.testing.assert_close(target_BLE[0, 0], mean_E, atol=1e-4, rtol=1e-4)
        assert target_BLE.shape == without_BLE.shape
    assert any(
        not torch.allclose(one, other, atol=1e-3) for one, other in zip(found, plain, strict=True)
    )


def _prefix(tokens: int) -> Any:
    from latentwire.config import PrefixConfig

    return PrefixConfig(tokens=tokens)


def test_what_is_put_into_the_slots_is_recorded(wire: LatentWire) -> None:
    lm = wire.local_receiver("llama")
    places_RS = torch.zeros(2, 6, dtype=torch.bool)
    places_RS[:, 2:4] = True
    width = sum(layer.out_features for layer in projections(lm.lm, "test"))
    put_NE = torch.randn(4, width)
    with put_in_slots(lm.lm, put_NE, places_RS), recorded(lm.lm, places_RS) as entries:
        lm.lm(torch.arange(12).view(2, 6))
        first = torch.cat(entries, 1)
        lm.lm(torch.arange(1, 13).view(2, 6))
    torch.testing.assert_close(first, put_NE)
    torch.testing.assert_close(torch.cat(entries, 1), put_NE)


def test_the_distance_is_relative_to_the_targets() -> None:
    targets = [torch.randn(5, 3), 100 * torch.randn(5, 4)]
    zeros = [torch.zeros_like(target) for target in targets]
    assert slot_distance(targets, targets).tolist() == [0.0] * 5
    assert slot_distance(zeros, targets).mean().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("handed", [False, True], ids=["soft", "keys-values"])
def test_it_is_learned_and_is_that_of_the_joined_batch(
    run: RunConfig, table: pa.Table, handed: bool
) -> None:
    """Micro-batches add up to the whole, with questions that share a message as without."""
    values: dict[str, Any] = SLOTS | (HANDED if handed else {})
    values |= {"training.batch_size": 16, "training.questions_together": True}
    whole = Trainer(wire_of(with_values(run, values)), 40)
    parted = Trainer(wire_of(with_values(run, values | {"training.accumulation": 3})), 40)
    names = whole.wire.run.receivers
    rows = pa.concat_tables([table, table.slice(0, 4)])
    one, other = (each.backward(each.collate(rows, 0)) for each in (whole, parted))
    for name in (receiver.name for receiver in names):
        assert one[f"slot_kd_{name}"] == pytest.approx(other[f"slot_kd_{name}"], rel=1e-4)
        assert one[f"slot_kd_{name}"] > 0.05
    first = whole.step(rows)
    for _ in range(12):
        last = whole.step(rows)
    for name in (receiver.name for receiver in names):
        assert last[f"slot_kd_{name}"] < first[f"slot_kd_{name}"]


def test_it_weighs_as_much_as_it_is_told(run: RunConfig, table: pa.Table) -> None:
    schedule = {"losses.schedules": {"slot_kd_weight": {"kind": "step", "end": 0.5, "steps": 1}}}
    values: dict[str, dict[str, Any]] = {
        "alone": {},
        "full": SLOTS,
        "half": {"losses.slot_kd_weight": 0.5},
        "scheduled": SLOTS | schedule,
    }
    found = {}
    for name, changed in values.items():
        trainer = Trainer(wire_of(with_values(run, changed)), 4)
        trainer.progress.step = 1
        found[name] = trainer.backward(trainer.collate(table, 1))
    assert "slot_kd_llama" not in found["alone"]
    share = (found["full"]["slot_kd_llama"] + found["full"]["slot_kd_qwen"]) / 2
    assert found["full"]["loss"] - found["alone"]["loss"] == pytest.approx(share, rel=1e-3)
    for name in ("half", "scheduled"):
        expected = found["full"]["slot_kd_llama"] / 2
        assert found[name]["slot_kd_llama"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"losses.answer_ce_weight": 0.0}, "at least one loss weight must be > 0"),
        ({"training.log_gradient_norms": True}, "got both; unset one"),
        ({"prompt.reads": "text", "prefix": {}}, "has no message, got losses.slot_kd_weight"),
    ],
)
def test_what_it_cannot_do_is_refused(run: RunConfig, values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        with_values(run, SLOTS | values)


def test_a_readers_file_is_read(run: RunConfig, tmp_path: Path, monkeypatch: Any) -> None:
    from latentwire import exports
    from latentwire.training import span_teacher

    tuned = {"losses.kd_teacher": "tuned", "evaluation.tuned_text": {"tokens": 3}}
    wire = wire_of(with_values(run, SLOTS | tuned))
    reader = wire_of(
        with_values(run, {"prompt.reads": "text", "prefix": {"tokens": 3}, "features": {}})
    )
    for prefix in reader.interlingua.prefixes.values():
        torch.nn.init.normal_(prefix.unit_PD)
    exports.save(tmp_path / "reader", reader, {}, {"receivers": wire.fingerprints()})
    monkeypatch.setattr(span_teacher, "teaching_reader", lambda *_: tmp_path / "reader")
    teacher = Trainer(wire, 4, train=tmp_path).losses.span_teacher
    assert teacher is not None
    for name, prefix in teacher.prefixes.items():
        torch.testing.assert_close(prefix.unit_PD, reader.interlingua.prefixes[name].unit_PD)
