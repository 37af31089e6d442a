"""Faults planted on purpose, each with the fast tests that catch it.

``python -m tests.faults`` prints which of them did. Most are one line of the package as it would be
with the fault in it. What the tests share is imported once; each fault then gets a process that is
forked from there, so that none sees another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from latentwire.models.lm import LMWrapper
from latentwire.prompts import batch
from latentwire.prompts.batch import Batch
from latentwire.prompts.sequences import PromptBuilder
from latentwire.receivers.local import LocalReceiver


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is planted, and the names of the tests that must fail then."""

    plant: Callable[[], None]
    caught_by: tuple[str, ...]


def swap(original: Any, broken: Any) -> None:
    """Put one function in another's place, wherever it was imported to."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("latentwire", "tests.")):
            for key in [key for key, value in vars(module).items() if value is original]:
                setattr(module, key, broken)


def change(place: str, line: str, fault: str) -> None:
    """Plant a line: ``place`` is ``module:function`` or ``module:Class.method``, whose source has ``line`` once."""
    module_name, _, path = place.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    found = vars(owner)[name]
    original = found.fget if isinstance(found, property) else found
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    if source.count(line) != 1:
        raise ValueError(
            f"a fault's line must stand once in {place}, {line!r} stands {source.count(line)} times; mend it"
        )
    made: dict[str, Any] = {}
    exec(compile(source.replace(line, fault), f"<{place}>", "exec"), vars(module), made)
    if owners:
        setattr(owner, name, made[name])
    else:
        swap(found, made[name])


def line(place: str, good: str, bad: str, *caught_by: str) -> Fault:
    """A fault of one line."""
    return Fault(functools.partial(change, f"latentwire.{place}", good, bad), caught_by)


# ------------------------------------------------------------------------------- faults of what came before LatentWire


def bos_twice() -> None:
    """Put a second BOS after the first."""
    build = PromptBuilder.__init__

    def broken(self: PromptBuilder, *arguments: Any) -> None:
        build(self, *arguments)
        if self.bos == 0:
            self.head_ids = [self.head_ids[0], *self.head_ids]

    PromptBuilder.__init__ = broken  # type: ignore[method-assign]


def anchor_merged() -> None:
    """Leave the anchor's white space to the anchor, and the boundary unchecked."""
    build = PromptBuilder.__init__

    def broken(self: PromptBuilder, *arguments: Any) -> None:
        build(self, *arguments)
        self.anchor_ids = self._template_ids(self.anchor_text + self.answer_lead)
        self.answer_lead = ""

    PromptBuilder.__init__ = broken  # type: ignore[method-assign]
    PromptBuilder.check_boundaries = lambda self, answers, ids: [True] * len(answers)  # type: ignore[method-assign]


def answer_shifted() -> None:
    """Predict targets from their own positions: the label shift done twice."""
    collate = batch.collate

    def broken(*arguments: Any, **named: Any) -> Batch:
        collated = collate(*arguments, **named)
        return dataclasses.replace(collated, predict_N=collated.predict_N + 1)

    swap(collate, broken)


def padding_attended() -> None:
    """Attend to everything, padding too."""
    embed = LMWrapper.embed

    def broken(self: LMWrapper, batch: Batch, soft_ND: torch.Tensor | None) -> torch.Tensor:
        batch.attention_BS.fill_(1)
        return embed(self, batch, soft_ND)

    LMWrapper.embed = broken  # type: ignore[method-assign]


def wrong_teacher_row() -> None:
    """Let each position learn from its neighbour's teacher."""
    read_teacher = LocalReceiver.read_teacher

    def broken(self: LocalReceiver, *arguments: Any) -> Any:
        teacher = read_teacher(self, *arguments)
        assert teacher.rows is not None
        rows = dataclasses.replace(teacher.rows, log_p_NK=teacher.rows.log_p_NK.roll(1, 0))
        return dataclasses.replace(teacher, rows=rows)

    LocalReceiver.read_teacher = broken  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------------- all of them

RATES = "tests/training/test_optimizer.py::test_rates_rise_to_the_peak_and_fall_to_the_minimum"
STEPS = "tests/training/test_steps.py::"
PARTS = f"{STEPS}test_every_trained_parameter_moves_by_the_rate_of_its_part"
REFERENCES = "tests/evaluation/test_references.py::"
NLL = f"{REFERENCES}test_nll_is_that_of_the_first_answer_and_its_stop_token_per_token"
READERS = "tests/training/test_text_readers.py::"
SHARED = "tests/training/test_shared_messages.py::"
STATISTICS = "tests/evaluation/test_statistics.py::"
SUMMARY = "tests/evaluation/test_summary.py::"
LAYOUT = "tests/prompts/test_sequences.py::"

FAULTS = {
    "bos_twice": Fault(bos_twice, (f"{LAYOUT}test_bos_stands_once_at_position_zero",)),
    "anchor_merged": Fault(
        anchor_merged,
        (
            f"{LAYOUT}test_anchor_that_merges_with_the_answer_is_an_error",
            f"{LAYOUT}test_anchor_white_space_goes_with_the_answer",
        ),
    ),
    "answer_shifted": Fault(
        answer_shifted,
        (
            f"{LAYOUT}test_collate_supervises_answers_and_stops_and_nothing_else",
            "tests/models/test_lm.py::test_ce_equals_the_models_own_loss",
        ),
    ),
    "padding_attended": Fault(
        padding_attended, ("tests/models/test_lm.py::test_the_side_of_the_padding_and_its_token_do_not_matter",)
    ),
    "wrong_teacher_row": Fault(
        wrong_teacher_row,
        (
            "tests/training/test_teacher.py::test_each_row_is_what_the_receiver_says_one_token_at_a_time",
            "tests/training/test_teacher.py::test_kd_is_zero_for_the_oracle_soft_prompt",
        ),
    ),
    # Training
    "the_cosine_never_ends": line(
        "training.optimizer:rate_share", "max(1, total - 1 - peak)", "max(1, 10 * total - 1 - peak)", RATES
    ),
    "the_minimum_rate_is_ignored": line(
        "training.optimizer:rate_share", "config.min_lr_ratio + (1 - config.min_lr_ratio)", "1.0", RATES
    ),
    "gradients_are_clipped_100_times_too_late": line(
        "training.loop:Trainer._update", "self.config.clip_norm", "100 * self.config.clip_norm",
        f"{STEPS}test_the_gradient_is_clipped_to_the_norm_that_is_asked_for",
    ),
    "dropout_repeats_in_every_step": line(
        "training.loop:Trainer.step", "{self.progress.step} {self.workers.rank}", "{self.workers.rank}",
        f"{STEPS}test_dropout_is_another_in_every_step_and_worker_and_the_same_when_resumed",
    ),
    "schedules_count_the_alignments_steps": line(
        "training.loop:Trainer.backward", "self.progress.step - self.config.alignment_steps", "self.progress.step",
        f"{STEPS}test_schedules_begin_where_the_alignment_ends",
    ),
    "features_learn_at_the_encoders_rate": line(
        "training.optimizer:_groups", '"features": config.adapter_lr', '"features": config.encoder_lr', PARTS
    ),
    "the_gain_never_learns": line(
        "models.adapter:Adapter.forward", "self.gain * p_BLD", "self.gain.detach() * p_BLD", PARTS
    ),
    "validation_rows_choose_the_checkpoint": line(
        "training.local:train_here", 'shards.read_table(paths["dev"])', 'shards.read_table(paths["validation"])',
        "tests/training/test_local.py::test_training_rows_train_and_development_rows_choose",
    ),
    "hidden_states_are_a_layer_early": line(
        "models.lm:LMWrapper.supervised_states",
        "round(depth * (len(output.hidden_states) - 1))", "max(0, round(depth * (len(output.hidden_states) - 1)) - 1)",
        "tests/models/test_lm.py::test_states_are_those_that_layers_put_out",
        "tests/data/test_teacher_files.py::test_columns_hold_what_the_model_itself_says",
    ),
    "embed_rms_is_that_of_the_table": line(
        "models.frozen_lm:FrozenLM.embed_rms", "self.embed_tokens(ids).float()", "self.embed_tokens.weight[ids].float()",
        "tests/models/test_frozen_lm.py::test_the_embeddings_scale_is_that_which_layers_read",
    ),
    # Evaluation
    "scoring_leaves_dropout_on": line(
        "evaluation.evaluator:predict", "wire.interlingua.eval()", "wire.interlingua.train()",
        f"{REFERENCES}test_scoring_switches_dropout_off",
    ),
    "nll_leaves_out_the_stop": line(
        "evaluation.evaluator:_predict_batch", "index_add(0, row_N, scores.ce_N)",
        "index_add(0, row_N, scores.ce_N * (gold.target_N.cpu() != wire.builders[name].stop_id))", NLL,
    ),
    "nll_divides_by_one_more": line(
        "evaluation.evaluator:_predict_batch",
        "torch.bincount(row_N, minlength=count)", "(torch.bincount(row_N, minlength=count) + 1)", NLL,
    ),
    "differences_are_not_paired": line(
        "evaluation.statistics:difference", "np.asarray(second, np.float64)", "np.asarray(second, np.float64)[::-1]",
        f"{STATISTICS}test_a_difference_is_paired",
    ),
    "intervals_are_of_90_percent": line(
        "evaluation.statistics:_interval", "(1 - CONFIDENCE) / 2", "(1 - 0.9) / 2",
        f"{STATISTICS}test_an_interval_is_as_wide_as_theory_says",
    ),
    "shares_are_not_paired": line(
        "evaluation.statistics:ratio", "_interval(part_G, whole_G)", "_interval(part_G, whole_G[::-1])",
        f"{STATISTICS}test_a_ratio_is_paired_and_as_wide_as_theory_says",
    ),
    "retention_is_against_untuned_text_too": line(
        "evaluation.summary:_against", "if yardstick == card.TUNED_TEXT:", "if True:",
        f"{SUMMARY}test_untuned_full_text_gives_no_retention",
    ),
    "latents_stand_beside_tuned_text_of_any_length": line(
        "evaluation.summary:pairs", "a.budget == b.budget or", "True or",
        f"{SUMMARY}test_tuned_cut_text_of_the_same_budget_is_the_first_baseline",
    ),
    "windows_begin_at_the_start": line(
        "prompts.shown:shown", "random.Random(row).randint(0, len(context_ids) - budget)", "0",
        f"{REFERENCES}test_windows_begin_anywhere",
    ),
    "self_information_is_of_the_token_before": line(
        "evaluation.baselines:self_information", ".score_answers(batch).ce_N", ".score_answers(batch).ce_N.roll(1)",
        f"{REFERENCES}test_self_information_is_of_each_token_given_those_before_it",
    ),
    "answers_keep_all_their_lines": line(
        "prompts.sequences:PromptBuilder.answer_of", 'text.strip().split("\\n")[0].strip()', "text.strip()",
        "tests/evaluation/test_evaluator.py::test_a_chats_answer_is_its_whole_turn_and_a_plain_ones_its_line",
    ),
    # Text readers
    "a_reader_has_fewer_steps_than_it_is_given": line(
        "training.text_readers:reader_run", "max_steps=budget.steps,", "max_steps=budget.steps // 2,",
        f"{READERS}test_a_reader_was_given_what_it_reports",
    ),
    "a_reader_trains_on_other_rows": line(
        "training.text_readers:_train", "best = train_here(reader, paths, output)",
        'best = train_here(reader, {**paths, "train": paths["dev"]}, output)',
        f"{READERS}test_a_reader_was_given_what_it_reports",
    ),
    "a_reader_has_a_larger_prompt_than_it_reports": line(
        "training.text_readers:reader_run", "PrefixConfig(tokens=tuned.tokens,", "PrefixConfig(tokens=2 * tuned.tokens,",
        f"{READERS}test_a_reader_was_given_what_it_reports",
    ),
    "a_reader_keeps_its_worst_rate": line(
        "training.text_readers:_train", 'direction="minimize"', 'direction="maximize"',
        f"{READERS}test_a_reader_was_given_what_it_reports",
    ),
    "a_prefix_stands_behind_the_text": line(
        "prompts.sequences:PromptBuilder._join", "*[SLOT_ID] * prefix, *message,", "*message, *[SLOT_ID] * prefix,",
        f"{READERS}test_a_prefix_of_a_texts_own_embeddings_reads_as_that_text",
    ),
    "a_reader_is_trained_on_the_whole_text": line(
        "data.batches:reader_prompts", "shown(reads, row, context, budget)", "context",
        f"{READERS}test_training_shows_a_reader_what_its_scores_show_it",
    ),
    "a_tuned_teacher_reads_without_its_prefix": line(
        "distributed.teachers:read_columns", "prefix = 0 if reader is None else reader.builders[lm.name].prefix", "prefix = 0",
        "tests/distributed/test_teachers.py::test_the_tuned_reader_teaches",
    ),
    # A message that is read once
    "padding_after_a_message_counts_as_positions": line(
        "models.lm:LMWrapper.supervised_states", "batch.end_R.to(self.device)[:, None]",
        "(past.attention_MS.shape[1] + 0 * batch.end_R.to(self.device)[:, None])",
        f"{SHARED}test_rows_go_on_from_their_own_text",
    ),
    "questions_go_on_from_each_others_messages": line(
        "models.past:Past.of_rows", "layer.batch_select_indices(past_R.to(layer.device))",
        "layer.batch_select_indices(past_R.flip(0).to(layer.device))",
        f"{SHARED}test_rows_go_on_from_their_own_text",
    ),
    # Data, and what travels
    "development_rows_are_drawn_by_row": line(
        "data.cleaning:belongs", "row['document']", "row['id']",
        "tests/data/test_passes.py::test_documents_are_dealt_out_whole_and_by_seed",
    ),
    "every_epoch_has_one_order": line(
        "data.streams:epoch_seed", "+ epoch", "+ 0", "tests/data/test_orders.py::test_no_two_epochs_or_seeds_share_an_order"
    ),
    "joined_rows_read_each_others_messages": line(
        "prompts.batch:join", "first_message += int(batch.message_R.max()) + 1", "first_message += len(batch.ids_BS)",
        "tests/data/test_layout_maps.py::test_joined_batches_are_the_batch_of_all_their_rows",
    ),
    "a_stopped_trial_counts_as_complete": line(
        "tuning.searcher:StudySearch._tell", 'reports[-1]["step"] < reports[-1]["total_steps"]', "False",
        "tests/tuning/test_searcher.py::test_a_stopped_trial_is_pruned",
    ),
    "entries_are_seen_before_their_end": line(
        "models.head_slots:_attention", "position_RN >= end_R1", "position_RN >= 0",
        "tests/models/test_head_slots.py::test_its_own_keys_and_values_in_every_head_are_the_text",
    ),
    "keys_stand_one_position_too_far": line(
        "models.head_slots:entries_of", "start_M[:, None] + place_T", "start_M[:, None] + place_T + 1",
        "tests/models/test_head_slots.py::test_its_own_keys_and_values_in_every_head_are_the_text",
    ),
    "another_head_sees_the_message": line(
        "models.head_slots:_attention", "order = list(entries.heads)", "order = [(h + 1) % heads for h in entries.heads]",
        "tests/models/test_head_slots.py::test_heads_that_are_not_chosen_see_nothing",
    ),
    "targets_keep_their_standard_units": line(
        "closed_form.regression:solve", "(decoder_KE * one.std_E).float()", "decoder_KE.float()",
        "tests/closed_form/test_regression.py::test_a_rank_as_large_as_the_targets_is_full_regression",
    ),
    "missing_tokens_are_coded": line(
        "models.token_codes:TokenCodes.forward", "z_BLZ.view_as(code_BLRK).masked_fill(gone_BLR1, 0).flatten(2)",
        "z_BLZ + 1e-6",
        "tests/models/test_token_codes.py::test_parts_are_exactly_zero_where_there_is_no_token_and_nowhere_else",
    ),
    "own_keys_stay_turned": line(
        "models.head_slots:cached_entries", "position_RT, back=True)", "position_RT)",
        "tests/closed_form/test_begin.py::test_a_receivers_own_keys_and_values_are_the_most_a_message_can_be",
    ),
    "senders_give_their_heads_backwards": line(
        "models.sender:Sender.forward", "chosen(self.head_J2))", "chosen(self.head_J2.flip(0)))",
        "tests/closed_form/test_begin.py::test_a_senders_keys_and_values_are_those_of_the_receiver",
    ),
    "keys_and_values_keep_their_mean": line(
        "models.token_codes:TokenCodes._standardised", "(x_BTM[..., self.seen :] - self.mean_E)", "x_BTM[..., self.seen :]",
        "tests/closed_form/test_begin.py::test_codes_of_keys_and_values_begin_as_the_closed_form",
    ),
    "budget_of_positions_exceeded": line(
        "data.packing:_fitting", "return max(1, int(beyond[0]))", "return int(beyond[0]) + 1",
        "tests/data/test_packing.py::test_an_epoch_has_every_unit_once_and_no_batch_above_the_budget",
    ),
    "a_resumed_run_repeats_a_batch": line(
        "training.loop:Trainer.train", "if used <= progress.batch:", "if used < progress.batch:",
        "tests/training/test_packed_batches.py::test_a_resumed_run_takes_the_batches_that_are_left",
    ),
    "workers_plan_batches_of_their_own": line(
        "data.streams:packed_batches", "seed, budget = epoch_seed(training, epoch),",
        "seed, budget = epoch_seed(training, epoch) + rank,",
        "tests/data/test_packing.py::test_workers_share_each_batch_of_one_plan",
    ),
    "private_latents_stay_where_padding_was": line(
        "message:Message.row", "columns.start - padding", "columns.start",
        "tests/test_message.py::test_a_row_alone_reads_what_it_read_among_others",
    ),
}  # fmt: skip


class _Failed:
    """Keeps the names of tests that fail, without their parameters."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest."""
        if report.failed:
            self.names.add(report.nodeid.partition("[")[0])


def run(tests: Iterable[str], fault: str | None = None) -> tuple[int, list[str]]:
    """Run tests in this process under a fault; returns pytest's status and which of them fail."""
    if fault is not None:
        FAULTS[fault].plant()
    failed = _Failed()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[failed])
    return int(status), sorted(failed.names)


def main(names: list[str]) -> None:
    """Print the status and the tests that failed for every fault, or those that are named.

    Under "" it is that of all their tests without a fault.
    """
    chosen = {name: fault for name, fault in FAULTS.items() if not names or name in names}
    every = sorted({test for fault in chosen.values() for test in fault.caught_by})
    run(["--collect-only", *every])
    jobs: list[tuple[Iterable[str], str | None]] = [(every, None)]
    jobs += [(fault.caught_by, name) for name, fault in chosen.items()]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(run, jobs, chunksize=1)
    print(json.dumps(dict(zip(["", *chosen], found, strict=True))))


if __name__ == "__main__":
    # As tests import it: swap must find one module, not two.
    from tests import faults

    faults.main(sys.argv[1:])
