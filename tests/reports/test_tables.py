"""Tables say what they show."""

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.reports.tables import failures_table, scores_table, show

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


def test_what_failed_stands_with_its_cause() -> None:
    rows = [
        {"trial": 3, "state": "failed", "error": "Traceback …\nout of memory with batch_size 64"},
        {"trial": 1, "state": "done", "error": ""},
    ]
    title, _, body = failures_table(rows)
    assert (title, body) == ("1 trials failed", [["3", "out of memory with batch_size 64"]])


def test_a_table_without_rows_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show([("texts have no scores", ["EM"], []), ("answers", ["EM"], [["50.0"]])])
    printed = capsys.readouterr().out
    assert "answers" in printed and "50.0" in printed and "texts have no scores" not in printed
