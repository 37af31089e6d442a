"""Tables say what they show."""

from pathlib import Path

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.reports.tables import (
    against_text_table,
    failures_table,
    readers_tables,
    scores_table,
    show,
    write_report,
)

ROW = {
    "em": 0.5, "em_low": 0.25, "em_high": 0.75, "f1": 0.5, "f1_low": 0.25, "f1_high": 0.75,
    "nll": 1.0, "positions": 9.0, "bytes": 128.0, "forward_ms": 1.5, "rows": 4,
}  # fmt: skip


def test_results_with_changed_receivers_are_labelled() -> None:
    scores = {"text": {"llama": ROW, "mean": ROW}, "latent": {"llama": ROW, "mean": ROW}}
    title, _, body = scores_table(scores, "toy", RunConfig())
    assert (
        title == "toy; 95 % intervals by resampling rows"
    )  # of an earlier version, which counted no contexts
    assert [row[0] for row in body] == ["full text", "latents"]
    assert body[0][2:] == [
        "50.0 [25.0, 75.0]",
        "50.0 [25.0, 75.0]",
        "–",  # nor did it look for the gold answers in what was said
        "1",
        "9",
        "128",
        "1.5",
        "4",
        "–",
    ]
    matched = ROW | {"match": 0.625, "match_low": 0.5, "match_high": 0.75}
    _, header, body = scores_table({"text": {"llama": matched}}, "toy", RunConfig())
    assert body[0][header.index("match")] == "62.5 [50.0, 75.0]"
    _, _, body = scores_table(scores, "", with_values(RunConfig(), {"features.lora": {}}))
    assert [row[0] for row in body] == ["full text", "latents, not frozen"]


TEXT = {"llama": ROW | {"contexts": 3}}


def test_shares_of_tuned_full_text_stand_in_percent_without_it() -> None:
    kept = ROW | {"contexts": 3}
    for place, name in enumerate(("retention_em", "retention_f1", "resilience_tuned_text")):
        kept |= {name: 0.5 + place / 10, f"{name}_low": 0.25, f"{name}_high": 0.75}
    scores = {"text": TEXT, "text tuned": TEXT, "latent": {"llama": kept, "mean": kept}}
    title, header, body = against_text_table(scores)
    assert title == "against full text, tuned; 95 % intervals by resampling 3 contexts"
    assert header[2:] == ["retention EM", "retention F1", "resilience of tuned text"]
    assert [row[0] for row in body] == ["full text", "latents"]
    assert body[0][2:] == ["–", "–", "–"]
    assert body[1][2:] == ["50.0 [25.0, 75.0]", "60.0 [25.0, 75.0]", "70.0 [25.0, 75.0]"]


def test_untuned_text_and_older_results_have_no_retention() -> None:
    share = {"resilience_untuned_text": 0.5, "resilience_untuned_text_low": 0.25}
    share |= {"resilience_untuned_text_high": 0.75}
    scores = {"text": TEXT, "latent": {"llama": TEXT["llama"] | share}}
    title, header, body = against_text_table(scores)
    assert title.startswith("against full text as it is read untuned; ")
    assert header[2:] == ["resilience of untuned text"] and len(body) == 1
    older = {"text": TEXT, "latent": TEXT}
    assert against_text_table(older)[2] == []


def test_readers_stand_beside_the_questions_that_the_wire_was_asked() -> None:
    report = {
        "rows": 480, "steps": 10, "batch_size": 8, "tokens": 16, "parameters": 2048, "rate": 0.1,
        "trials": [[0.1, 1.5]], "dev_loss": 1.5,
    }  # fmt: skip
    readers = {"text tuned": {"llama": report}}
    wire = {"training.epochs": 1, "training.batch_size": 24}
    ((title, _, body),) = readers_tables(readers, with_values(RunConfig(), wire))
    assert title.endswith("the same 480 rows as the wire, which was asked 480 questions")
    assert body == [["full text", "llama", "16", "2,048", "80", "0.1, best of 1", "1.5"]]
    halves = with_values(RunConfig(), wire | {"training.receivers_per_step": "one"})
    ((title, _, _),) = readers_tables(readers, halves)
    assert title.endswith("480 questions, each through one of its 2 receivers")


def test_what_failed_stands_with_its_cause() -> None:
    rows = [
        {"trial": 3, "state": "failed", "error": "Traceback …\nout of memory with batch_size 64"},
        {"trial": 1, "state": "done", "error": ""},
    ]
    title, _, body = failures_table(rows)
    assert (title, body) == ("1 trials failed", [["3", "out of memory with batch_size 64"]])
    silent = [{"trial": 4, "state": "failed", "error": "\n"}]
    assert failures_table(silent)[2] == [["4", "no cause was recorded"]]


def test_what_stands_in_a_cell_ends_none(tmp_path: Path) -> None:
    grid = ("1 trials failed", ["trial", "a|b"], [["3", "got bool | int\nfor it"]])
    text = write_report(tmp_path, "No winner", [grid], "latentwire tune").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [r"| trial | a\|b |", "|---|---|", r"| 3 | got bool \| int for it |"]


def test_a_table_without_rows_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show([("texts have no scores", ["EM"], []), ("answers", ["EM"], [["50.0"]])])
    printed = capsys.readouterr().out
    assert "answers" in printed and "50.0" in printed and "texts have no scores" not in printed
