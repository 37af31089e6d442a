"""Questions that are put to paragraphs of other documents, and rows that come without an answer."""

from typing import Any

import pyarrow as pa
import pytest

from latentwire.config import DataConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import cleaning, shards
from latentwire.data.sources import DataError
from latentwire.data.unanswerable import Unanswerable
from latentwire.dataset import RowError

DOCUMENTS = {"birds": ["Owls hunt.", "Gulls shout."], "birds2": ["Emus run."], "cities": ["Oslo."]}


def rows(each: int = 40) -> pa.Table:
    """Questions to every paragraph, each with an answer of its own."""
    pairs = [(d, c) for d, contexts in DOCUMENTS.items() for c in contexts for _ in range(each)]
    return pa.table(
        {
            "id": [str(number) for number in range(len(pairs))],
            "document": [document for document, _ in pairs],
            "context": [context for _, context in pairs],
            "answers": [[f"answer {number}"] for number in range(len(pairs))],
        }
    )


def moving(share: float, **values: Any) -> Unanswerable:
    moved = Unanswerable(DataConfig(dataset="squad", unanswerable=share, **values))
    moved.add(rows())
    moved.check()
    return moved


def test_a_question_moves_to_another_document_or_stays_as_it_is() -> None:
    before, after = rows().to_pylist(), moving(0.25, no_answer="none").replaced(rows()).to_pylist()
    moved = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert 0.15 < len(moved) / len(before) < 0.35
    for own, other in moved:
        assert other["answers"] == ["none"]
        assert other["context"] not in DOCUMENTS[own["document"]]
        assert (other["id"], other["document"]) == (own["id"], own["document"])


def test_every_paragraph_of_the_others_is_drawn() -> None:
    after = moving(1.0).replaced(rows()).to_pylist()
    for document, contexts in DOCUMENTS.items():
        drawn = {row["context"] for row in after if row["document"] == document}
        others = {c for name, every in DOCUMENTS.items() if name != document for c in every}
        assert drawn == others and not drawn & set(contexts)


def test_a_paragraph_of_two_documents_is_not_drawn_for_its_own_questions() -> None:
    table = pa.table(
        {
            "id": [str(number) for number in range(60)],
            "document": ["a", "b", "c"] * 20,
            "context": ["Owls hunt.", "Owls hunt.", "Oslo."] * 20,
            "answers": [["owls"]] * 60,
        }
    )
    moved = Unanswerable(DataConfig(dataset="squad", unanswerable=1.0, no_answer="none"))
    moved.add(table)
    moved.check()
    after = moved.replaced(table).to_pylist()
    assert sum(row["answers"] == ["none"] for row in after) > 55
    for own, other in zip(table.to_pylist(), after, strict=True):
        assert (other["context"] == own["context"]) == (other["answers"] == ["owls"])


def test_a_question_stays_where_no_other_paragraph_is_drawn() -> None:
    table = pa.table({"id": ["1"], "document": ["a"], "context": ["Oslo."], "answers": [["x"]]})
    moved = Unanswerable(DataConfig(dataset="squad", unanswerable=1.0))
    moved.add(table)
    moved.add(table.set_column(1, "document", pa.array(["b"])))
    moved.check()
    assert moved.replaced(table).to_pylist() == table.to_pylist()


def test_draws_depend_on_the_seed_and_the_row_alone() -> None:
    first = moving(0.5).replaced(rows()).to_pylist()
    assert moving(0.5).replaced(rows().slice(10)).to_pylist() == first[10:]
    assert moving(0.5, seed=1).replaced(rows()).to_pylist() != first


def test_one_document_is_refused() -> None:
    alone = Unanswerable(DataConfig(dataset="squad", unanswerable=0.5))
    alone.add(pa.table({"document": ["a", "a"], "context": ["A.", "B."]}))
    with pytest.raises(DataError, match="two documents or more, got 1; name each row's"):
        alone.check()


@pytest.mark.parametrize(
    "values",
    [{"distractors": [1, 2]}, {"send": "prompt"}, {"dataset": "text"}],
    ids=["distractors", "the question is sent", "no questions"],
)
def test_what_cannot_be_is_refused(run: RunConfig, values: dict[str, Any]) -> None:
    data = {"dataset": "squad", "unanswerable": 0.5} | values
    if data["dataset"] == "text":
        data["overflow"] = "chunk"
    with pytest.raises(ConfigError, match=r"unanswerable 0\.5 puts questions to paragraphs"):
        with_values(run, {f"data.{name}": value for name, value in data.items()})


def test_rows_without_an_answer_are_taken_where_they_are_wanted(run: RunConfig) -> None:
    row = {"id": "a", "title": "t", "context": "Oslo.", "question": "Who?", "answers": {"text": []}}
    asked = DataConfig(dataset="squad", unanswerable=0.0, no_answer="nothing")
    assert cleaning.common_columns(row, asked)["answers"] == ["nothing"]
    assert cleaning.common_columns(row | {"answers": None}, asked)["answers"] == ["nothing"]
    answered = row | {"answers": {"text": ["Ada"]}}
    assert cleaning.common_columns(answered, asked)["answers"] == ["Ada"]
    with pytest.raises(RowError, match="answers must not be empty"):
        cleaning.common_columns(row, DataConfig(dataset="squad"))
    _, spec = shards.shard_key(run, "validation")
    assert not {"unanswerable", "no_answer"} & spec["data"].keys()  # older shards keep their names
