"""Weighted sums of loss terms, and how weights move."""

import dataclasses
import math

import pytest
import torch

from latentwire.config import LOSS_BUNDLES, LossConfig
from latentwire.config.losses import Schedule
from latentwire.config.resolve import ConfigError, with_values
from latentwire.losses.bundles import (
    Reader,
    Teacher,
    loss_terms,
    term_counts,
    term_masks,
    terms_on,
    weights_at,
)
from latentwire.losses.chunks import sum_by_chunks
from latentwire.losses.terms import TERMS, cross_entropy, teacher_rows
from latentwire.prompts.batch import Batch
from latentwire.prompts.sequences import ANSWER

NOTHING = torch.zeros(0)
LOGITS_NV = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def batch_of(offsets: list[int], control: list[int] | None = None) -> Batch:
    """Five tokens or fewer, each a row of its own."""
    count = len(offsets)
    fields = {field.name: NOTHING for field in dataclasses.fields(Batch)}
    return Batch(
        **fields | {
            "taught_R": None, "target_N": torch.arange(count), "offset_N": torch.tensor(offsets), "row_N": torch.arange(count),
            "control_R": torch.tensor(control or [-1] * count),
        }
    )  # fmt: skip


def test_each_term_is_the_mean_over_its_own_tokens() -> None:
    batch = batch_of([0, 1, 2, 0, 1], control=[-1, -1, -1, -1, 0])
    ce_N = torch.nn.functional.cross_entropy(LOGITS_NV, batch.target_N, reduction="none")
    weights = weights_at(
        LossConfig(
            answer_ce_weight=1.0,
            first_k_ce_weight=0.5,
            first_token_ce_weight=0.25,
            reconstruction_ce_weight=2.0,
            k=2,
        ),
        0,
    )
    terms = loss_terms(
        weights, batch, Reader(LOGITS_NV, torch.clone), None, term_counts(weights, batch)
    )
    assert terms["answer_ce"].item() == pytest.approx(float(ce_N[:4].mean()))
    assert terms["first_k_ce"].item() == pytest.approx(0.5 * float(ce_N[[0, 1, 3]].mean()))
    assert terms["first_token_ce"].item() == pytest.approx(0.25 * float(ce_N[[0, 3]].mean()))
    assert terms["reconstruction_ce"].item() == pytest.approx(2 * float(ce_N[4]))


def test_every_weight_has_tokens_and_a_value_of_its_own() -> None:
    """Whatever a configuration can switch on; only plain cross-entropies are the same on the same tokens."""
    names = [name for name in LossConfig.model_fields if name.endswith("_weight")]
    names.remove("slot_kd_weight")  # of keys and values, which no term reads
    batch = batch_of([0, 0, 0, 0, 0], control=[-1, -1, -1, 0, 1])
    weights = weights_at(LossConfig(**dict.fromkeys(names, 1.0)), 0)
    states, others = torch.randn(5, 4), torch.randn(3, 4)
    teacher = Teacher(teacher_rows(torch.randn(3, 7)), [others])
    terms = loss_terms(
        weights,
        batch,
        Reader(LOGITS_NV, torch.clone, [states]),
        teacher,
        term_counts(weights, batch),
    )
    assert list(terms) == [name.removesuffix("_weight") for name in names]
    answers = {
        name for name, mask_N in term_masks(weights, batch).items() if bool(mask_N[:3].any())
    }
    alike = {
        name for name in answers if terms[name].item() == pytest.approx(terms["answer_ce"].item())
    }
    plain = {name for name, term in TERMS.items() if term.value is cross_entropy}
    assert alike == answers & plain and all(value > 0 for value in terms.values())


def test_the_configuration_has_a_weight_for_every_term_in_the_same_order() -> None:
    weights = [name for name in LossConfig.model_fields if name.endswith("_weight")]
    weights.remove("slot_kd_weight")
    assert [term.knob for term in TERMS.values()] == weights
    config = LossConfig(**dict.fromkeys(weights, 1.0))
    assert [term.knob for term in terms_on(config) if term.control == ANSWER] == config.asking


def test_terms_of_a_teacher_that_is_not_there_are_an_error() -> None:
    weights = weights_at(LossConfig(kd_weight=1.0), 0)
    with pytest.raises(ValueError, match="kd need a teacher, got none"):
        loss_terms(
            weights,
            batch_of([0]),
            Reader(LOGITS_NV[:1], torch.clone),
            None,
            {"answer_ce": 1.0, "kd": 1.0},
        )


def test_terms_without_weight_are_not_computed() -> None:
    assert set(term_counts(weights_at(LossConfig(), 0), batch_of([0, 1]))) == {"answer_ce"}


def test_shares_of_a_batch_add_up_to_the_whole() -> None:
    config = LossConfig(first_token_ce_weight=1.0, kd_weight=0.5, hidden_kd_weight=0.5, k=2)
    weights, whole = weights_at(config, 0), batch_of([0, 1, 2, 0, 1])
    states, others = torch.randn(5, 4), torch.randn(5, 4)
    teacher = Teacher(teacher_rows(torch.randn(5, 7)), [others])
    counts = term_counts(weights, whole)
    total = sum(
        loss_terms(
            weights, whole, Reader(LOGITS_NV, torch.clone, [states]), teacher, counts
        ).values()
    )
    parts = []
    for index in (slice(0, 3), slice(3, 5)):
        part = batch_of(whole.offset_N[index].tolist())
        part.target_N[:] = whole.target_N[index]
        mask_N = torch.zeros(5, dtype=torch.bool)
        mask_N[index] = True
        assert teacher.rows is not None
        share = Teacher(teacher.rows.at(mask_N), [others[index]])
        parts += loss_terms(
            weights, part, Reader(LOGITS_NV[index], torch.clone, [states[index]]), share, counts
        ).values()
    assert float(sum(parts)) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_chunks_give_the_same_terms_and_gradient(rows_at_once: int) -> None:
    """Every kind of term, with another task's tokens between the answers' for the teacher's rows to step over."""
    config = LossConfig(
        answer_ce_weight=1.0, first_token_ce_weight=0.5, kd_weight=0.5, hidden_kd_weight=0.5, k=2,
        reconstruction_ce_weight=2.0,
    )  # fmt: skip
    weights, batch = weights_at(config, 0), batch_of([0, 1, 2, 0, 1], control=[-1, -1, 0, -1, -1])
    head, hidden_ND = (
        torch.nn.Linear(6, 7).requires_grad_(False),
        torch.randn(5, 6, requires_grad=True),
    )
    teacher = Teacher(teacher_rows(torch.randn(4, 7), top_k=3), [torch.randn(4, 6)])
    counts = term_counts(weights, batch)

    def terms(rows: int | None) -> tuple[dict[str, float], torch.Tensor]:
        found = loss_terms(
            weights, batch, Reader(hidden_ND, head, [hidden_ND]), teacher, counts, rows
        )
        (gradient_ND,) = torch.autograd.grad(3 * torch.stack(list(found.values())).sum(), hidden_ND)
        return {name: float(value.detach()) for name, value in found.items()}, gradient_ND

    (whole, gradient_ND), (chunked, chunked_ND) = terms(None), terms(rows_at_once)
    assert chunked == pytest.approx(whole) and all(value > 0 for value in whole.values())
    torch.testing.assert_close(chunked_ND, gradient_ND)
    with torch.no_grad():
        quiet = loss_terms(
            weights, batch, Reader(hidden_ND, head, [hidden_ND]), teacher, counts, rows_at_once
        )
    assert {name: float(value) for name, value in quiet.items()} == pytest.approx(whole)


def test_chunks_refuse_gradients_that_differ_between_terms() -> None:
    hidden_ND = torch.randn(4, 3, requires_grad=True)
    sums_T = sum_by_chunks(lambda rows, part_ND: part_ND.square().sum(0), hidden_ND, 2)
    with pytest.raises(RuntimeError, match="must be summed"):
        sums_T[0].backward()


def test_schedules_move_weights_and_k() -> None:
    config = LossConfig(
        first_k_ce_weight=2.0,
        k=8,
        schedules={
            "first_k_ce_weight": {"kind": "linear", "steps": 10},
            "k": {"kind": "linear", "start": 0.125, "steps": 10},
            "answer_ce_weight": {"kind": "cosine", "start": 1.0, "end": 0.0, "steps": 10},
        },
    )
    assert weights_at(config, 0).terms == {"answer_ce": 1.0}  # a weight of 0 switches the term off
    middle = weights_at(config, 5)
    assert middle.terms == {"answer_ce": pytest.approx(0.5), "first_k_ce": pytest.approx(1.0)}
    assert [weights_at(config, step).k for step in (0, 5, 10, 99)] == [1, 4, 8, 8]
    assert weights_at(config, 99).terms == {"first_k_ce": 2.0}


def test_a_cosine_is_slow_at_both_ends() -> None:
    schedule = Schedule(kind="cosine", start=0.2, end=1.0, steps=6)
    shares = [(1 - math.cos(math.pi * step / 6)) / 2 for step in range(7)]
    assert [schedule.factor(step) for step in range(7)] == pytest.approx(
        [0.2 + 0.8 * share for share in shares]
    )
    assert shares[1] < 0.1 and schedule.factor(99) == 1


def test_a_step_changes_at_its_step() -> None:
    schedule = Schedule(kind="step", start=1.0, end=0.0, steps=3)
    assert [schedule.factor(step) for step in range(5)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("rows_at_once", [None, 2])
def test_an_answers_token_meets_its_own_teacher_whatever_stands_between(
    rows_at_once: int | None,
) -> None:
    batch = batch_of([0, 0, 0, 0, 0], control=[0, -1, 1, -1, -1])
    weights = weights_at(LossConfig(kd_weight=1.0, kd_temperature=2.0), 0)
    teacher_NV = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    reader, teacher = Reader(LOGITS_NV, torch.clone), Teacher(teacher_rows(teacher_NV, 2.0))
    terms = loss_terms(weights, batch, reader, teacher, term_counts(weights, batch), rows_at_once)
    expected = 0.0
    for row, place in enumerate((1, 3, 4)):
        p_V, q_V = (teacher_NV[row] / 2).softmax(0), (LOGITS_NV[place] / 2).softmax(0)
        expected += 4 * float((p_V * (p_V / q_V).log()).sum()) / 3
    assert terms["kd"].item() == pytest.approx(expected, rel=1e-4)


def test_k_decides_what_the_first_tokens_are() -> None:
    batch = batch_of([0, 1, 2, 0, 1])
    masks = term_masks(weights_at(LossConfig(first_k_ce_weight=1.0, kd_weight=1.0, k=1), 0), batch)
    assert masks["first_k_ce"].tolist() == masks["kd"].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("name", LOSS_BUNDLES)
def test_bundles_are_configurations(name: str) -> None:
    config = LossConfig(bundle=name)
    assert all(
        getattr(config, key) == value
        for key, value in LOSS_BUNDLES[name].items()
        if key != "schedules"
    )
    assert LossConfig(bundle=name, answer_ce_weight=0.123).answer_ce_weight == 0.123


def test_wrong_names_are_refused(run) -> None:
    with pytest.raises(ConfigError, match=r"bundle must be one of answer, .* got 'best'"):
        with_values(run, {"losses.bundle": "best"})
    with pytest.raises(ConfigError, match=r"bundle must be one of answer, .* got \['answer'\]"):
        with_values(run, {"losses.bundle": ["answer"]})
    for kind, when in (("linear", "first"), ("constant", None)):
        alone = {"losses.schedules": {"answer_ce_weight": {"kind": kind, "steps": 9}}}
        if when is None:
            assert weights_at(with_values(run, alone).losses, 0).terms == {"answer_ce": 1.0}
            continue
        with pytest.raises(
            ConfigError, match=rf"must be > 0 at the {when} step of the schedules, .*with start > 0"
        ):
            with_values(run, alone)
    falling = {"answer_ce_weight": {"kind": "cosine", "start": 1.0, "end": 0.0, "steps": 9}}
    with pytest.raises(ConfigError, match="must be > 0 at the last step of the schedules"):
        with_values(run, {"losses.schedules": falling})
    with pytest.raises(
        ConfigError, match="schedules must name a weight, k or latent_dropout, got kd"
    ):
        with_values(run, {"losses.schedules": {"kd": {}}})
    with pytest.raises(ConfigError, match=r"hidden_kd_depths must lie in \[0, 1\]"):
        with_values(run, {"losses.hidden_kd_depths": [2.0]})


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_teacher_moves_to_a_device_whole(top_k: int) -> None:
    """With the whole vocabulary there are neither ids nor a tail, and nothing else is left behind."""
    rows = teacher_rows(LOGITS_NV, 2.0, top_k)
    teacher = Teacher(rows, [torch.zeros(5, 4), torch.ones(5, 4)]).to("meta")
    assert teacher.rows is not None and teacher.rows.temperature == 2.0
    tensors = [teacher.rows.ids_NK, teacher.rows.log_p_NK, teacher.rows.log_tail_N]
    assert [tensor is None for tensor in tensors] == [top_k == 0, False, top_k == 0]
    moved = [tensor for tensor in (*tensors, *teacher.states) if tensor is not None]
    assert [tensor.device.type for tensor in moved] == ["meta"] * len(moved)
    assert Teacher(None).to("meta").rows is None
