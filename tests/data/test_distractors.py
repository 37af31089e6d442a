"""Contexts that stand among other paragraphs of their documents."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from latentwire.config import DataConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import shards
from latentwire.data.distractors import Distractors
from latentwire.data.sources import DataError

DOCUMENTS = {
    "cities": ["Oslo is cold.", "Lima is warm.", "Rome\nis old.", "Bern is small."],
    "birds": ["Owls hunt.", "Gulls shout."],
    "alone": ["Nothing else."],
}


def filled(**values: Any) -> Distractors:
    around = Distractors(DataConfig(dataset="squad", **values))
    rows = [(d, c) for d, contexts in DOCUMENTS.items() for c in contexts]
    documents, contexts = zip(*rows, strict=True)
    around.add(pa.table({"document": documents, "context": contexts}))
    return around


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_a_context_stands_among_others_of_its_document(most: int) -> None:
    around = filled(distractors=(1, most))
    for document, contexts in DOCUMENTS.items():
        lines_of = {context: " ".join(context.split("\n")) for context in contexts}
        for context in contexts:
            lines = around.around(document, context).split("\n")
            assert lines_of[context] in lines and len(set(lines)) == len(lines)
            assert set(lines) <= set(lines_of.values())
            assert min(2, len(contexts)) <= len(lines) <= 1 + most


def test_numbers_and_places_are_drawn_by_the_seed() -> None:
    paragraphs = [f"House {number}." for number in range(40)]
    rows = pa.table({"document": ["street"] * 40, "context": paragraphs})
    texts = {}
    for seed in (0, 0, 1):
        around = Distractors(DataConfig(dataset="squad", distractors=(0, 3), seed=seed))
        around.add(rows)
        drawn = around.replaced(rows)["context"].to_pylist()
        assert texts.setdefault(seed, drawn) == drawn
    assert texts[0] != texts[1]
    lines = [text.split("\n") for text in texts[0]]
    assert {len(one) for one in lines} == {1, 2, 3, 4}
    places = {one.index(own) for one, own in zip(lines, paragraphs, strict=True) if len(one) == 4}
    assert len(places) > 1


def test_what_does_not_fit_is_left_out() -> None:
    around = filled(distractors=(3, 3), max_context_bytes=30)
    lengths = [len(around.around("cities", context).encode()) for context in DOCUMENTS["cities"]]
    assert max(lengths) <= 30 and min(lengths) > 13  # two of 13 bytes and a line's end fit


def test_documents_of_one_paragraph_are_refused() -> None:
    around = Distractors(DataConfig(dataset="custom", distractors=(1, 2)))
    around.add(pa.table({"document": ["a", "b", "b"], "context": ["A.", "B.", "B."]}))
    with pytest.raises(DataError, match="got 2 of one each; name each row's in a column title"):
        around.check()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data.dataset": "squad", "data.distractors": [3, 1]}, r"fewest ≤ most.*got 3, 1"),
        ({"data.dataset": "squad", "data.distractors": [0, 0]}, r"from 1, got 0, 0"),
        ({"data.distractors": [1, 2]}, "which custom, squad have, got dataset toy"),
        (
            {"data.dataset": "squad", "data.distractors": [1, 2], "data.send": "prompt"},
            "need send context, got prompt",
        ),
    ],
)
def test_what_cannot_be_is_refused(run: RunConfig, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_values(run, values)


def test_shards_without_them_keep_their_names(run: RunConfig, tmp_path: Path) -> None:
    line = {"title": "street", "context": "House 1.", "question": "Where?", "answers": "there"}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line))
    run = with_values(run, {"data.dataset": "custom", "data.data_dir": str(tmp_path)})
    _, spec = shards.shard_key(run, "validation")
    assert "distractors" not in spec["data"]
    _, among = shards.shard_key(with_values(run, {"data.distractors": [1, 2]}), "validation")
    assert among["data"]["distractors"] == (1, 2)
