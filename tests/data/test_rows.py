"""What a good row is, in every schema, and what each bad one is told."""

import json
from typing import Any

import pytest

from latentwire.dataset import Row, RowError, clean

GOOD = {
    "id": "1",
    "title": "T",
    "context": " c ",
    "question": "q?",
    "answers": {"text": ["a", "b"], "answer_start": [0, 1]},
}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff\xfe", "row must be UTF-8"),
        (b"{", "row must be JSON"),
        (b"[1]", "row must be a mapping, got list"),
        (GOOD | {"context": b"\xff"}, "context must be UTF-8, invalid start byte at byte 0"),
        (
            json.dumps(GOOD | {"context": None}).encode(),
            "context is missing: the row has id, title, question, answers",
        ),
        (b'{"Context": "c", "question": "q"}', "context is missing: the row has Context, question"),
        (b'{"\\ud83d": "c"}', "context is missing: the row has ?"),
        (b"{}", "context is missing: the row has nothing"),
        (json.dumps(GOOD | {"context": " "}).encode(), "context must not be empty"),
        (json.dumps(GOOD | {"context": 3}).encode(), "context must be text, got int"),
        (json.dumps(GOOD | {"question": ""}).encode(), "question must not be empty"),
        (json.dumps(GOOD | {"answers": {"text": []}}).encode(), "answers must not be empty"),
        (json.dumps(GOOD | {"answers": [" "]}).encode(), "answers must not be empty"),
        (
            json.dumps(GOOD | {"answers": 5}).encode(),
            "answers must be text or a list of text, got int",
        ),
        (
            GOOD | {"answers": [{"spans": "x"}]},
            "answers must be text or a list of text, got a list of NoneType",
        ),
        (GOOD | {"answers": None}, "answers must not be empty"),
        ({"context": "c", "question": "q", "answer": None}, "answers must not be empty"),
        (
            {"context": "c", "question": "q"},
            "answers must be text or a list of text, got NoneType",
        ),
        (b"[" * 100_000, "row must be JSON"),
        (json.dumps({"question": "q", "answers": "a"}).encode(), "context is missing"),
        (b'{"context": "\\ud800", "question": "q", "answers": "a"}', "context must be UTF-8"),
        (
            b'{"context": "c", "question": "q", "answers": ["a", "\\ud83d"]}',
            "answers must be UTF-8",
        ),
        (b'{"context": "c", "question": "q", "answers": "a", "id": "\\ud83d"}', "id must be UTF-8"),
    ],
)
def test_bad_rows_are_told_why(raw: Row, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        clean(raw, "squad")
    assert reason in str(caught.value)


def test_squad_row() -> None:
    assert clean(GOOD | {"context": b"c"}, "squad")["context"] == "c"
    assert clean(json.dumps(GOOD).encode(), "squad") == {
        "id": "1", "document": "T", "context": "c", "question": "q?", "answers": ["a", "b"],
    }  # fmt: skip


@pytest.mark.parametrize("dataset", ["squad", "custom", "text"])
@pytest.mark.parametrize(
    ("named", "document"),
    [
        ({"title": 0}, "0"),
        ({"title": None, "document": 0}, "0"),
        ({"title": "", "document": "D"}, "D"),
        ({"title": "T", "document": "D"}, "T"),
    ],
)
def test_a_document_may_be_named_by_any_number(
    named: dict[str, Any], document: str, dataset: str
) -> None:
    row = {"context": "c", "question": "q?", "answers": "a"}
    assert clean(row | named, dataset)["document"] == document
    unnamed = clean(row | {"title": "", "document": None}, dataset)["document"]
    assert unnamed == clean(row, dataset)["document"] and len(unnamed) == 16


def test_texts_come_from_text_columns_and_from_the_contexts_of_questions() -> None:
    paragraphs = {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}
    found = [
        clean(json.dumps(row).encode(), "text")
        for row in ({"text": " c "}, GOOD, {"context": paragraphs})
    ]
    assert [row["context"] for row in found] == ["c", "c", "A: One. Two.\nB: Three."]
    assert found[0]["id"] == found[1]["id"] and found[1]["document"] == "T"
    assert clean({"text": b" c "}, "text") == found[0]  # a column of bytes, as some writers make
    assert all(row["question"] == "" and row["answers"] == [] for row in found)
    with pytest.raises(RowError, match="context is missing"):
        clean(b'{"question": "q?"}', "text")


def test_hotpotqa_joins_titled_paragraphs_in_both_schemas() -> None:
    hub = {
        "id": "5", "question": "q", "answer": "yes",
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
        "supporting_facts": {"title": ["B", "A"], "sent_id": [0, 0]},
    }  # fmt: skip
    official = {
        "_id": "5", "question": "q", "answer": "yes",
        "context": [["A", ["One.", " Two."]], ["B", ["Three."]]], "supporting_facts": [["B", 0], ["A", 0]],
    }  # fmt: skip
    row = clean(json.dumps(hub).encode(), "hotpotqa")
    assert row["context"] == "A: One. Two.\nB: Three."
    assert (row["answers"], row["document"]) == (["yes"], "A | B")
    assert clean(json.dumps(official).encode(), "hotpotqa") == row


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ("plain", "context must hold titles and sentences, got str"),
        ([["A", "no list"]], "sentences must be lists of text"),
        ([["A", [" "]]], "context must not be empty"),
        ({"title": 5, "sentences": [["One."]]}, "titles must be a list, got int"),
        ({"title": "AB", "sentences": [["One."], ["Two."]]}, "titles must be a list, got str"),
        ({"title": ["A"], "sentences": [["One."], ["Two."]]}, "as many paragraphs, got 1 and 2"),
        ({"title": ["A", "B"], "sentences": [["One."]]}, "as many paragraphs, got 2 and 1"),
        ([["A"], ["B", ["Two."]]], "got a list of 1 for number 0; give it both"),
        ([["B", ["Two."]], ["A", ["One."], 3]], "got a list of 3 for number 1"),
        (["One.", ["B", ["Two."]]], "got str for number 0"),
    ],
)
def test_bad_paragraphs_are_told_why(context: object, reason: str) -> None:
    """None is left out while the others are taken."""
    with pytest.raises(RowError, match=reason):
        clean({"question": "q", "answer": "a", "context": context}, "hotpotqa")
    if not isinstance(context, str):
        with pytest.raises(RowError, match=reason):
            clean({"context": context}, "text")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"supporting_facts": [[]]}, "supporting_facts must be titles"),
        ({"supporting_facts": [["T", 0], 3]}, "supporting_facts must be titles"),
        ({"supporting_facts": 3}, "supporting_facts must be titles"),
        ({"supporting_facts": {"title": "T"}}, "supporting_facts must be titles"),
        ({"supporting_facts": {"title": [None]}}, "supporting_facts must be titles"),
        ({"context": [["T", ["\ud83d"]]]}, "context must be UTF-8"),
    ],
)
def test_bad_hotpotqa_rows_are_told_why(change: dict[str, Any], reason: str) -> None:
    row = {
        "_id": "a",
        "question": "q",
        "answer": "yes",
        "context": [["T", ["x"]]],
        "supporting_facts": [["T", 0]],
    }
    assert clean(row, "hotpotqa")["document"] == "T"
    with pytest.raises(RowError, match=reason):
        clean(row | change, "hotpotqa")


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ("Oslo", ["Oslo"]),
        (["Oslo", " Bergen "], ["Oslo", "Bergen"]),
        ({"text": ["Oslo"], "answer_start": [18]}, ["Oslo"]),
        ({"text": "Oslo"}, ["Oslo"]),
        (
            [{"text": "Oslo", "answer_start": 18}, {"text": "Bergen", "answer_start": 2}],
            ["Oslo", "Bergen"],
        ),
        (["['a', 'b']"], ["['a', 'b']"]),  # where the answer is such a text, the list says so
        ("[1, 2]", ["[1, 2]"]),
        ("{x} and [y]", ["{x} and [y]"]),
    ],
)
def test_answers_are_taken_in_every_form_that_people_write(answers: Any, found: list[str]) -> None:
    assert clean(GOOD | {"answers": answers}, "squad")["answers"] == found
    assert (
        clean({"context": "c", "question": "q", "answers": None, "answer": answers}, "custom")[
            "answers"
        ]
        == found
    )


@pytest.mark.parametrize(
    "text",
    [
        "{'text': ['Oslo'], 'answer_start': [18]}",
        "{'text': array(['Oslo'], dtype=object), 'answer_start': array([18])}",
        '{"text": ["Oslo"], "answer_start": [18]}',
        "['Oslo', 'Bergen']",
        "[{'text': 'Oslo', 'answer_start': 18}]",
    ],
)
def test_a_list_or_mapping_that_was_written_as_text_is_no_answer(text: str) -> None:
    with pytest.raises(RowError) as caught:
        clean(GOOD | {"answers": text}, "squad")
    assert str(caught.value).startswith("answers must not be a list or mapping written as text: ")
    assert text in str(caught.value) and str(caught.value).endswith("where it is the answer itself")
