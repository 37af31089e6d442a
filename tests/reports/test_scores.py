"""What ``--compare`` sets side by side."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.cli import main
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.evaluation.conditions import conditions
from latentwire.evaluation.evaluator import predict
from latentwire.model import LatentWire
from latentwire.reports.scores import Evaluation, Known, Questions, compared, show, write

ROWS = conditions(RunConfig(), ["text", "latent", "truncated", "shuffled"], latent_len=[8, 4])
AT_8 = ("latent at 8 latents", "truncated at 8 latents")
AT_4 = ("latent at 4 latents", "truncated at 4 latents")


def test_two_modes_are_compared_where_their_budgets_meet() -> None:
    assert compared(["latent", "truncated"], ROWS) == [AT_8, AT_4]
    assert compared(["latent at 8 latents", "latent at 4 latents"], ROWS) == [(AT_8[0], AT_4[0])]


@pytest.mark.parametrize("named", [None, []])
def test_without_names_latents_are_compared_with_every_baseline(named: list[str] | None) -> None:
    sides = compared(named, ROWS)
    assert [pair for pair in sides if "truncated" in pair[1]] == [AT_8, AT_4]
    assert {(a, b) for a, b in sides if b == "text"} == {(AT_8[0], "text"), (AT_4[0], "text")}
    assert len(set(sides)) == len(sides) and all(a.startswith("latent at") for a, _ in sides)
    assert {b.partition(" ")[0] for _, b in sides} == {"text", "truncated", "shuffled"}


@pytest.mark.parametrize(
    "named", [["latent"], ["latent", "truncated", "text"], ["latent", "window"], ["text", "text"]]
)
def test_rows_that_the_table_lacks_are_refused(named: list[str]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"--compare must name two different rows of the table \(text, latent at 8",
    ):
        compared(named, ROWS)


def test_a_table_with_nothing_to_compare_says_so_only_where_asked() -> None:
    alone = conditions(RunConfig(), ["text"])
    assert compared(None, alone) == []
    with pytest.raises(ConfigError, match="got none"):
        compared([], alone)


def test_a_directory_for_answers_is_not_passed_over_with_a_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evaluate", "--checkpoint", "runs/x/best", "--data_dir", "elsewhere"]) == 2
    error = capsys.readouterr().err
    assert (
        "--data_dir belongs to --predictions, " in error
        and "by --set data.data_dir=elsewhere" in error
    )


def test_a_directory_gets_scores_details_and_every_answer(
    wire: LatentWire, table: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = conditions(wire.run, ["text", "latent"])
    predictions = {row.key: list(predict(wire, table.slice(0, 3), row)) for row in rows}
    questions = Questions(rows, compared([], rows), {}, compared=True)
    sizes = {
        "encoder": {"parameters": 1_200, "bytes": 4_800},
        "llama": {"parameters": 34, "bytes": 136},
    }
    read = {"rows": 3, "read_before": 2, "scorings": 1, "wires": 1, "again": False, "trained_on": 0}
    known = Known(sizes, "abc123", read, {"cosine": 0.5})
    evaluation = Evaluation(wire.run, questions, predictions, known)
    show(evaluation, "runs/x/best, validation")
    write(evaluation, tmp_path / "scores")
    printed = capsys.readouterr().out
    assert "paired differences" in printed and "latents: cosine 0.500" in printed
    details = json.loads((tmp_path / "scores" / "details.json").read_text())
    assert "no retention: the text was read untuned; evaluation.tuned_text" in printed
    assert "against full text as it is read untuned" in printed
    assert "1,234" in printed and "2 of these 3 rows were read before" in printed
    assert (details["weights"], details["readings"]) == (sizes, read)
    assert (details["protocol"], details["seed"]) == ("abc123", wire.run.training.seed)
    assert details["diagnostics"] == {"cosine": 0.5} and len(details["comparisons"]) == 1
    assert set(json.loads((tmp_path / "scores" / "scores.json").read_text())) == {"text", "latent"}
    assert pq.read_table(tmp_path / "scores" / "predictions.parquet").num_rows == 2 * 2 * 3
