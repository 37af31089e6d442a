"""The report is one page that asks the network for nothing and runs nothing that was text."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError
from latentwire.evaluation.baselines import Mode
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.scoring import summaries, write_predictions
from latentwire.reports import html
from latentwire.tuning.space_file import write_space
from latentwire.tuning.study import CAUSE, EVALUATIONS, JOURNAL, open_study

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def prediction(row: int, receiver: str, mode: Mode, right: bool) -> Prediction:
    return Prediction(
        id=str(row), receiver=receiver, condition=mode, mode=mode, text=f"{EVIL} {row}", golds=["red"], question=f"Why {EVIL}?",
        context=f"{EVIL} a context", context_id=str(row), document=str(row), em=float(right), f1=float(right), match=float(right), nll=1.0,
        first_1=1.0, first_5=1.0, positions=9, message_positions=4, bytes=64, context_bytes=50, context_tokens=12,
        forward_ms=1.0, encode_ms=1.0, prefill_ms=1.0, decode_ms=1.0,
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    output = tmp_path / "a<b>sweep"
    space = SweepConfig.model_validate(
        {
            "search": {
                "encoder.d_z": {"type": "int", "low": 8, "high": 64},
                "prompt.anchor": {"type": "categorical", "choices": ["A: ", "</script><b>A: "]},
            }
        }
    )
    write_space(space, output)
    study = open_study(output / JOURNAL, output.name, {"dev_f1": "max"})
    distributions = {
        "encoder.d_z": optuna.distributions.IntDistribution(8, 64),
        "prompt.anchor": optuna.distributions.CategoricalDistribution(["A: ", "</script><b>A: "]),
    }
    for number in range(5):
        reports = {
            str(step): {"step": step, "dev_f1": 0.1 * number + step / 100, "wire_bytes": 64.0 * number,
                        "prompt_positions": 20.0 + number, "first_train_loss": 2.0, "train_loss": 1.0,
                        "examples_per_s": 9.0, "train_seconds": 1.0}
            for step in (1, 2)
        }  # fmt: skip
        params = {
            "encoder.d_z": 8 + number,
            "prompt.anchor": ["A: ", "</script><b>A: "][number % 2],
        }
        value = reports["2"]["dev_f1"]
        study.add_trial(
            create_trial(
                values=[value],
                params=params,
                distributions=distributions,
                user_attrs={EVALUATIONS: reports},
            )
        )
    study.add_trial(
        create_trial(
            state=TrialState.FAIL,
            params=params,
            distributions=distributions,
            user_attrs={CAUSE: f"died of {EVIL}"},
        )
    )
    modes: tuple[Mode, ...] = ("text", "latent")
    predictions = {
        mode: [
            prediction(row, receiver, mode, mode == "text" or row % 2 == 0)
            for row in range(6)
            for receiver in ("llama", "qwen")
        ]
        for mode in modes
    }
    scores = summaries(predictions)
    write_predictions(predictions, output / "predictions.parquet")
    best = {"trial": 4, "step": 2, "score": 0.42, "values": {"encoder.d_z": 12}}
    (output / "results.json").write_text(
        json.dumps({"command": f"python {EVIL}", "best": best, "validation": scores,
                    "finalists": [{"trial": 4, "score": 0.42, "fresh": [0.4, 0.3]}],
                    "selection": {"validation": 0.5, "gap": -0.08, "development": 0.42}})
    )  # fmt: skip
    (output / "manifest.json").write_text(
        json.dumps({"git": EVIL, "hardware": {"nodes": [{"CPU": 2}]}})
    )
    return output


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_holds_everything_and_runs_nothing_that_was_text(sweep: Path) -> None:
    page = html.write(sweep).read_text()
    tags = Tags()
    tags.feed(page)
    assert (
        not [tag for tag, attrs in tags.found if tag in ("img", "b") and attrs]
        and page.count("plotly.js v") == 1
    )
    assert not [attrs for _, attrs in tags.found for name in ("src", "onerror") if name in attrs]
    assert not [
        attrs["href"] for _, attrs in tags.found if not attrs.get("href", "#").startswith("#")
    ]
    assert "<script>alert" not in page and "<b>A: " not in page
    assert EVIL in "".join(tags.text)  # it is shown as text
    for heading in (
        "The winner beside its baselines", "Optimisation history", "Learning curves", "Parallel coordinates",
        "Parameter importances", "Contour of the two most important", "F1 against wire bytes", "F1 against positions read",
        "6 trials", "Examples", "Failures", "Costs", "Manifest", "Against the full text", "resilience of untuned text",
        "No retention: the text was read untuned; evaluation.tuned_text trains a reader for it; shares",
        "re-runs: dev_f1 with fresh seeds", "<td>0.4, 0.3</td>",
    ):  # fmt: skip
        assert heading in page, heading
    assert "died of" in page and "keeps<b>" not in page and "retention EM" not in page
    assert re.search(r"llama from latents", page) and "llama from full text" in page
    assert not list(sweep.glob(".*.part-*"))


def test_retention_is_against_full_text_that_was_tuned(sweep: Path) -> None:
    document = json.loads((sweep / "results.json").read_text())
    right = {"text": 2, "text tuned": 6, "latent": 3}
    document["validation"] = summaries(
        {
            key: [prediction(row, "llama", "text", row < count) for row in range(6)]
            for key, count in right.items()
        }
    )
    (sweep / "results.json").write_text(json.dumps(document))
    page = html.write(sweep).read_text()
    assert "llama keeps<b>50.0 %</b>" in page and "from latents" in page
    assert "retention EM" in page and "No retention" not in page and "full text, tuned" in page
    assert "whose divisor is 0 are left out" in page  # full text is never wrong: no boost


def test_the_report_says_how_much_wider_intervals_by_document_are(sweep: Path) -> None:
    assert "times as wide" not in html.write(sweep).read_text()
    document = json.loads((sweep / "results.json").read_text())
    row = {"documents": 24, "em_wider": 2.0, "f1_wider": 2.25, "match_wider": 1.5}
    document["by_document"] = {"latent": {"llama": row}}
    (sweep / "results.json").write_text(json.dumps(document))
    page = html.write(sweep).read_text()
    assert "The rows are of 24 documents; intervals" in page
    assert "2.0 times as wide as over contexts (median; at most 2.2)" in page


def test_a_space_of_one_dimension_has_a_slice_and_one_of_several_objectives_a_page(
    tmp_path: Path,
) -> None:
    sizes = {"encoder.d_z": {"type": "int", "low": 8, "high": 64}}
    space = SweepConfig.model_validate(
        {"search": sizes, "tune": {"objectives": {"wire_bytes": "min"}}}
    )
    write_space(space, tmp_path)
    study = open_study(tmp_path / JOURNAL, tmp_path.name, {"dev_f1": "max", "wire_bytes": "min"})
    for number in range(4):
        report = {"step": 1, "dev_f1": 0.1 * number, "wire_bytes": 64.0, "first_train_loss": 2.0, "train_loss": 1.0,
                  "examples_per_s": 9.0, "train_seconds": 1.0}  # fmt: skip
        distributions = {"encoder.d_z": optuna.distributions.IntDistribution(8, 64)}
        study.add_trial(create_trial(values=[0.1 * number, 64.0], params={"encoder.d_z": 8 + number},
                                     distributions=distributions, user_attrs={EVALUATIONS: {"1": report}}))  # fmt: skip
    page = html.write(tmp_path).read_text()
    for heading in (
        "Slice",
        "Scores by encoder.d_z.",
        "Optimisation history",
        "F1 against wire bytes",
    ):
        assert heading in page, heading


def test_a_sweep_that_has_just_begun_has_a_report_too(sweep: Path) -> None:
    for name in ("results.json", "predictions.parquet", "manifest.json", JOURNAL):
        (sweep / name).unlink()
    page = html.write(sweep).read_text()
    assert "This sweep has no winner yet." in page and "No trial has reported yet." in page


def test_a_directory_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a sweep's directory"):
        html.write(tmp_path)


def test_predictions_of_an_earlier_format_leave_the_examples_out(sweep: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    old = [
        {
            k: v
            for k, v in dataclasses.asdict(prediction(0, "llama", "text", True)).items()
            if k not in ("context", "condition")
        }
    ]
    pq.write_table(pa.Table.from_pylist(old), sweep / "predictions.parquet")
    assert 'id="examples"' not in html.write(sweep).read_text()


def test_each_earlier_stage_of_the_winner_has_a_curve(sweep: Path) -> None:
    assert "stage recite" not in html.write(sweep).read_text()
    stage = {"name": "recite", "keep": "best", "step": 4, "before": {}, "directory": "/there"}
    stage["evaluations"] = [{"step": step, "dev_loss": 1 / step} for step in (2, 4)]
    (sweep / "results.json").write_text(json.dumps({"stages": [stage]}))
    page = html.write(sweep).read_text()
    assert "Learning curves: stage recite" in page and "its best checkpoint, of step 4" in page
    figure = page.partition("Learning curves: stage recite")[2]
    assert '"y":[0.5,0.25]' in figure and '"name":"dev_loss"' in figure
