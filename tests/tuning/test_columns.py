"""Every searched path has a column of its own."""

from latentwire.config import SweepConfig
from latentwire.reports.tables import trials_table
from latentwire.tuning.columns import column_names

HEADS = {
    path: {"type": "categorical", "choices": [2, 4]}
    for path in ("encoder.heads", "features.deep_prefix.heads", "training.lr")
}


def test_a_column_is_named_by_the_last_part_where_that_is_unique() -> None:
    assert column_names(["training.lr", "encoder.latent_len"]) == {
        "training.lr": "lr",
        "encoder.latent_len": "latent_len",
    }


def test_knobs_of_one_name_keep_their_sections() -> None:
    assert list(column_names(HEADS).values()) == ["encoder.heads", "deep_prefix.heads", "lr"]


def test_a_path_at_the_end_of_another_stays_whole() -> None:
    assert column_names(["heads", "encoder.heads"]) == {
        "heads": "heads",
        "encoder.heads": "encoder.heads",
    }


def test_the_table_of_trials_tells_two_features_heads_apart() -> None:
    space = SweepConfig.model_validate({"search": HEADS})
    values = {"encoder.heads": 2, "features.deep_prefix.heads": 4}
    _, header, body = trials_table([{"trial": 0, "state": "failed", "values": values}], space)
    assert header[-2:] == ["encoder.heads", "deep_prefix.heads"] and body[0][-2:] == ["2", "4"]
