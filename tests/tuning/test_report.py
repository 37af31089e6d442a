"""Tables say what they show."""

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.tuning.report import scores_table

ROW = {"em": 0.5, "f1": 0.5, "nll": 1.0, "positions": 9.0, "rows": 4}


def test_results_with_changed_receivers_are_labelled() -> None:
    scores = {"text": {"llama": ROW, "mean": ROW}, "latent": {"llama": ROW, "mean": ROW}}
    _, _, body = scores_table(scores, "", RunConfig())
    assert [row[0] for row in body] == ["full text", "latents"]
    _, _, body = scores_table(scores, "", with_values(RunConfig(), {"features.lora": {}}))
    assert [row[0] for row in body] == ["full text", "latents, not frozen"]
