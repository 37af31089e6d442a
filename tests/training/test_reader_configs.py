"""The configuration of a text reader follows the wire's lengths and the steps that it trains for."""

from typing import Any

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.readers import TrainingBudget
from latentwire.evaluation.conditions import Condition, conditions
from latentwire.training.text_readers import EVALUATIONS, _lengths, reader_run
from tests.conftest import HEADS, choose_some_heads, wire_of


def run_of(run: RunConfig, steps: int, questions: int = 4, rows: int = 8) -> RunConfig:
    """Return the configuration of a reader of the whole text that trains for so many steps."""
    budget = TrainingBudget(steps, questions)
    condition = Condition("text", tuned=True)
    asked = with_values(run, {"evaluation.tuned_text.tokens": 5})
    return reader_run(asked, asked.receivers, condition, budget, rows, 0.1)


@pytest.mark.parametrize("steps", [1, 9, 10, 100, 105, 1234])
def test_a_reader_logs_ten_times_warms_up_for_a_tenth_and_is_evaluated_thrice(
    run: RunConfig, steps: int
) -> None:
    """Shorter trainings log every step, and warm up for none."""
    training = run_of(run, steps).training
    assert training.log_every == max(1, steps // 10)
    assert training.warmup_steps == steps // 10
    evaluated = list(range(training.evaluate_every, steps + 1, training.evaluate_every))
    assert len({*evaluated, steps}) <= EVALUATIONS
    assert (training.max_steps, training.prefix_lr, training.best_by) == (steps, 0.1, "dev_loss")


@pytest.mark.parametrize(("questions", "rows"), [(4, 8), (4, 11), (4, 3), (1, 1)])
def test_a_readers_epochs_suffice_for_its_steps(run: RunConfig, questions: int, rows: int) -> None:
    """An epoch leaves out the rows that fill no batch."""
    steps = 6
    config = run_of(run, steps, questions, rows).training
    per_epoch = rows // questions * questions or 1
    assert config.batch_size == questions
    assert (config.epochs - 1) * per_epoch <= steps * questions < config.epochs * per_epoch


def test_a_reader_of_cut_text_takes_the_budget_of_its_row(run: RunConfig) -> None:
    """A budget names the knob that it stands for."""
    (fixed,) = conditions(run, ["truncated"], latent_len=[3])
    growing = with_values(run, {"encoder.tokens_per_latent": 4})
    (strided,) = conditions(growing, ["truncated"], tokens_per_latent=[8])
    assert _lengths(run, fixed).latent_len == 3
    lengths = _lengths(growing, strided)
    assert (lengths.tokens_per_latent, lengths.latent_len) == (8, growing.encoder.latent_len)
    whole = Condition("text", fixed.budget, tuned=True)
    assert _lengths(run, whole) == _lengths(growing, whole)


@pytest.mark.parametrize(
    ("share", "tokens", "stride"), [(0.4, 4, 2), (0.25, 4, 4), (None, 4, 4), (None, 8, 8)]
)
def test_a_reader_beside_heads_gets_one_token_for_each_whole_cache_share(
    run: RunConfig, share: float | None, tokens: int, stride: int
) -> None:
    """Without a share, a latent's tokens fill as many heads as one of them would fill in all."""
    values: dict[str, Any] = HEADS | {"encoder.tokens_per_latent": tokens}
    adapter = HEADS["adapter"] | {"cache_share": share}
    lengths = _lengths(with_values(run, values | {"adapter": adapter}), Condition("truncated"))
    assert (lengths.pooling, lengths.tokens_per_latent) == ("queries", stride)


def test_cut_text_beside_heads_gets_no_fewer_positions_than_the_message(run: RunConfig) -> None:
    """Four tenths of the cache: five tokens are two whole positions, of cut text one of each two tokens."""
    interlingua = choose_some_heads(wire_of(with_values(run, HEADS))).interlingua
    assert interlingua.budgets("llama", [1, 5, 10]) == [1, 2, 4]
    assert interlingua.budgets("llama", [1, 5, 10], of_text=True) == [1, 3, 5]
    assert interlingua.budgets("nobody", [1, 5, 10]) == [1, 5, 10]
