"""EM and F1 by the official rules."""

import codecs
import json
import random
from pathlib import Path

import pytest
from torchmetrics.functional.text import squad

from latentwire.cli import main
from latentwire.config import DataConfig
from latentwire.config.resolve import ConfigError
from latentwire.data.sources import DataError
from latentwire.evaluation.metrics import em_f1, match, normalise, question_types, score_file


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The Red House.", ["red house"], (1.0, 1.0)),
        ("red", ["red house"], (0.0, pytest.approx(2 / 3))),
        ("blue", ["red house", "Blue!"], (1.0, 1.0)),
        ("", ["red"], (0.0, 0.0)),
        ("a b c", ["b c d"], (0.0, pytest.approx(0.8))),  # the article goes: b c against b c d
    ],
)
def test_squad_rules(prediction: str, golds: list[str], expected: tuple[float, float]) -> None:
    assert em_f1(prediction, golds) == expected


def test_that_a_text_does_not_answer_is_said_or_not() -> None:
    """As by SQuAD 2.0's script: words in common earn nothing."""
    assert em_f1("no idea", ["no answer"]) == (0.0, 0.5)
    assert em_f1("no idea", ["no answer"], no_answer="no answer") == (0.0, 0.0)
    assert em_f1("No answer.", ["no answer"], no_answer="no answer") == (1.0, 1.0)
    assert em_f1("in Oslo", ["Oslo"], no_answer="no answer") == em_f1("in Oslo", ["Oslo"])


def test_hotpotqa_gives_no_credit_for_half_a_yes() -> None:
    assert em_f1("yes it is", ["yes"], "squad")[1] > 0
    assert em_f1("yes it is", ["yes"], "hotpotqa") == (0.0, 0.0)
    assert em_f1("Yes.", ["yes"], "hotpotqa") == (1.0, 1.0)
    assert em_f1("no", ["no smoking"], "hotpotqa") == (0.0, 0.0)
    assert em_f1("red", ["red house"], "hotpotqa")[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("It was the Red  House, in 1912.", ["red house"], 1.0),
        ("the party", ["art"], 0.0),  # words, not letters
        ("red brick house", ["red house"], 0.0),  # together, in their order
        ("house red", ["red house"], 0.0),
        ("blue", ["red", "Blue!"], 1.0),
        ("", ["red"], 0.0),
        ("red", ["The"], 0.0),  # nothing is left of this gold answer
        ("a", ["The"], 1.0),
    ],
)
def test_a_gold_answer_occurs_as_whole_words(
    prediction: str, golds: list[str], expected: float
) -> None:
    assert match(prediction, golds) == expected


def test_what_matches_exactly_also_occurs() -> None:
    draw, words = random.Random(1), "the a red house, Red blue 1912 yes no".split()
    exact = 0
    for _ in range(400):
        answer, gold = (" ".join(draw.choices(words, k=draw.randint(0, 3))) for _ in range(2))
        em, _ = em_f1(answer, [gold])
        exact += em
        assert match(answer, [gold]) >= em
        assert match(f"{answer} x", [gold]) == (match(answer, [gold]) if normalise(gold) else 0.0)
    assert exact > 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's hat, an apple.", "cats hat apple"),
        ("A-Team", "ateam"),  # punctuation goes before articles do: no article is left to take
        ("theatre another", "theatre another"),
        ("“Quoted” — dash", "“quoted” — dash"),  # only ASCII punctuation goes
        ("ÉCOLE\u00a0x\ty", "école x y"),  # white space is Unicode's
        ("a an the", ""),
    ],
)
def test_normalisation_is_the_official_one(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_torchmetrics_agrees_but_where_nothing_is_left() -> None:
    draw, words = random.Random(0), "the a red house, Red blue 1912 “so” it's".split()
    for _ in range(200):
        answer, gold = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(2))
        theirs = squad(
            [{"prediction_text": answer, "id": "0"}],
            [{"answers": {"answer_start": [0], "text": [gold]}, "id": "0"}],
        )
        em, f1 = em_f1(answer, [gold])
        assert em == float(theirs["exact_match"]) / 100
        if normalise(answer) or normalise(gold):
            assert f1 == pytest.approx(float(theirs["f1"]) / 100, rel=1e-6)
    assert em_f1("The", ["a"]) == (1.0, 0.0)


SQUAD = {
    "version": "1.1",
    "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [
        {"id": "1", "question": "q", "answers": [{"text": "red house", "answer_start": 0}, {"text": "House", "answer_start": 0}]},
        {"id": "2", "question": "q", "answers": [{"text": "in the year 1912", "answer_start": 0}]},
        {"id": "3", "question": "q", "answers": [{"text": "blue", "answer_start": 0}]},
    ]}]}],
}  # fmt: skip


def test_a_squad_file_scores_as_by_the_official_script(tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(SQUAD))
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"1": "the house", "2": "year 1912 AD", "unasked": "x"}))
    scores, missing = score_file(answers, DataConfig(dataset="squad", data_dir=str(tmp_path)))
    # 1: exact by its second answer. 2: {year, 1912} of {year, 1912, ad} and {in, year, 1912}. 3: not answered.
    assert scores == {
        "exact_match": 100.0 * 1 / 3,
        "f1": 100.0 * (1.0 + 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)) / 3,
    }
    assert missing == 1
    answers.write_text("{")
    with pytest.raises(ConfigError, match="--predictions must be a file of JSON"):
        score_file(answers, DataConfig(dataset="squad", data_dir=str(tmp_path)))
    answers.write_text(json.dumps(["red"]))
    with pytest.raises(
        ConfigError, match=r"predictions for squad must be \{id: answer\}, .* is not"
    ):
        score_file(answers, DataConfig(dataset="squad", data_dir=str(tmp_path)))


def v2(identity: str, *answers: str) -> dict:
    listed = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": identity, "question": "q", "answers": listed, "is_impossible": not answers}


def write_squad(folder: Path, questions: list[dict]) -> DataConfig:
    document = {
        "version": "v2.0",
        "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": questions}]}],
    }
    (folder / "dev-v2.0.json").write_text(json.dumps(document))
    return DataConfig(dataset="squad", data_dir=str(folder))


def test_a_squad_2_file_scores_as_by_its_own_script(tmp_path: Path) -> None:
    """An empty answer is right where there is none; its F1 is then 1, not 0 as by the rules of v1.1."""
    data, answers = write_squad(tmp_path, [v2("a", "Oslo"), v2("b")]), tmp_path / "answers.json"
    answers.write_text(json.dumps({"a": "Oslo", "b": ""}))
    assert score_file(answers, data) == ({
        "exact": 100.0, "f1": 100.0, "total": 2, "HasAns_exact": 100.0, "HasAns_f1": 100.0, "HasAns_total": 1,
        "NoAns_exact": 100.0, "NoAns_f1": 100.0, "NoAns_total": 1,
    }, 0)  # fmt: skip
    questions = [
        v2("a", "red house", "House"),
        v2("b"),
        v2("c"),
        v2("d", "the", "in the year 1912"),
        v2("e", "blue"),
    ]
    data = write_squad(tmp_path, questions)
    answers.write_text(
        json.dumps({"a": "a big house", "b": "The", "c": "red", "d": "year 1912 AD"})
    )
    scores, missing = score_file(answers, data)
    # a: {big, house} against {house}. b: nothing is left of it. c: wrong. d: as in v1.1, "the" is no answer. e: left out.
    a, d = 2 * 0.5 * 1.0 / 1.5, 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)
    assert missing == 1
    assert scores == {
        "exact": 100.0 * 1 / 5, "f1": pytest.approx(100.0 * (a + 1 + d) / 5), "total": 5,
        "HasAns_exact": 0.0, "HasAns_f1": pytest.approx(100.0 * (a + d) / 3), "HasAns_total": 3,
        "NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2,
    }  # fmt: skip


def test_the_hubs_squad_2_is_known_by_its_empty_answers(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "context": "c", "question": "q", "answers": {"text": ["Oslo"]}},
        {"id": "b", "context": "c", "question": "q", "answers": {"text": []}},
    ]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "answers.json").write_text(json.dumps({"a": "", "b": "Oslo"}))
    scores, _ = score_file(
        tmp_path / "answers.json", DataConfig(dataset="squad", data_dir=str(tmp_path))
    )
    assert scores["exact"] == scores["HasAns_f1"] == scores["NoAns_f1"] == 0.0


def test_predictions_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    data, answers = write_squad(tmp_path, [v2("a", "Oslo"), v2("b")]), tmp_path / "answers.json"
    answers.write_bytes(codecs.BOM_UTF8 + b'{"a": "Oslo", "b": ""}')
    assert score_file(answers, data)[0]["exact"] == 100.0


@pytest.mark.parametrize("answer", [None, 3, ["Oslo"]])
def test_an_answer_that_is_no_text_is_told_by_its_question(tmp_path: Path, answer: object) -> None:
    data, answers = write_squad(tmp_path, [v2("a", "Oslo")]), tmp_path / "answers.json"
    answers.write_text(json.dumps({"a": answer}))
    with pytest.raises(ConfigError) as caught:
        score_file(answers, data)
    assert str(caught.value).endswith(f"answer as text, {answers} has {json.dumps(answer)} for a")


@pytest.mark.parametrize(
    "facts",
    [
        None,
        "a",
        3,
        {},
        ["T"],
        [["T"]],
        [["T", "0"]],
        [["T", 0, 1]],
        [[0, "T"]],
        [["T", True]],
        [None],
    ],
)
def test_malformed_supporting_facts_are_told_by_their_question(
    tmp_path: Path, facts: object
) -> None:
    row = {
        "_id": "p0",
        "question": "q",
        "answer": "yes",
        "supporting_facts": [["T", 0]],
        "context": [["T", ["x"]]],
    }
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps([row]))
    data, answers = (
        DataConfig(dataset="hotpotqa", data_dir=str(tmp_path)),
        tmp_path / "answers.json",
    )
    answers.write_text(json.dumps({"answer": {"p0": "yes"}, "sp": {"p0": facts}}))
    with pytest.raises(ConfigError) as caught:
        score_file(answers, data)
    form = '"sp": {id: [[title, number of the sentence], …]}'
    assert str(caught.value).endswith(
        f"supporting facts as {form}, {answers} has {json.dumps(facts)} for p0"
    )
    answers.write_text(json.dumps({"answer": {"p0": "yes"}, "sp": [facts]}))
    with pytest.raises(ConfigError, match="must give supporting facts as"):
        score_file(answers, data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": None}, "answer of question p0 must be text, got null"),
        ({"supporting_facts": [["T"]]}, "supporting_facts must be titles with sentences' numbers"),
        (
            {"supporting_facts": {"title": ["T"]}},
            "supporting_facts must be titles with sentences' numbers",
        ),
    ],
)
def test_a_gold_that_cannot_be_scored_is_told(tmp_path: Path, change: dict, reason: str) -> None:
    row = {
        "_id": "p0",
        "question": "q",
        "answer": "yes",
        "supporting_facts": [["T", 0]],
        "context": [["T", ["x"]]],
    }
    (tmp_path / "dev.json").write_text(json.dumps([row | change]))
    (tmp_path / "answers.json").write_text(json.dumps({"answer": {"p0": "yes"}}))
    with pytest.raises(DataError, match=reason):
        score_file(
            tmp_path / "answers.json", DataConfig(dataset="hotpotqa", data_dir=str(tmp_path))
        )


def test_a_hotpotqa_file_scores_as_by_the_official_script(tmp_path: Path) -> None:
    rows = [
        {"_id": "a", "question": "q", "answer": "yes", "type": "comparison", "supporting_facts": [["T", 0], ["U", 1]],
         "context": [["T", ["x"]]]},
        {"_id": "b", "question": "q", "answer": "red house", "supporting_facts": [["T", 0]], "context": [["T", ["x"]]]},
        {"_id": "c", "question": "q", "answer": "no", "supporting_facts": [["T", 0]], "context": [["T", ["x"]]]},
    ]  # fmt: skip
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))
    data, answers = (
        DataConfig(dataset="hotpotqa", data_dir=str(tmp_path)),
        tmp_path / "answers.json",
    )
    document = {
        "answer": {"a": "Yes.", "b": "red", "c": "no way"},
        "sp": {"a": [["T", 0]], "b": [["T", 0], ["V", 3]]},
    }
    answers.write_text(json.dumps(document))
    scores, missing = score_file(answers, data)
    f1 = 2 * 1.0 * 0.5 / 1.5
    assert missing == 0
    assert {k: scores[k] for k in ("em", "f1", "prec", "recall")} == {
        "em": 1 / 3, "f1": (1.0 + f1) / 3, "prec": 2.0 / 3, "recall": 1.5 / 3,
    }  # fmt: skip
    assert scores["sp_em"] == 0.0 and scores["sp_f1"] == (2 * 0.5 / 1.5 + 2 * 0.5 / 1.5) / 3
    # a: 1 × 1 and 1 × ½; b: 1 × ½ and ½ × 1; c has no facts.
    assert (
        scores["joint_prec"] == 1.5 / 3
        and scores["joint_recall"] == 1.0 / 3
        and scores["joint_em"] == 0.0
    )
    assert scores["joint_f1"] == (2 * 0.5 / 1.5 + 2 * 0.5 * 0.5 / 1.0) / 3
    assert question_types(data, "validation") == {"a": "comparison"}
    answers.write_text(json.dumps({"answer": {"a": "yes"}}))
    assert score_file(answers, data) == (
        {"em": 1 / 3, "f1": 1 / 3, "prec": 1 / 3, "recall": 1 / 3},
        2,
    )


def test_predictions_name_a_configuration_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "question": "q",
        "answer": "yes",
        "supporting_facts": [["T", 0]],
        "context": [["T", ["x"]]],
    }
    for name in ("distractor", "fullwiki"):
        (tmp_path / f"hotpot_dev_{name}_v1.json").write_text(json.dumps([row | {"_id": name}]))
    (tmp_path / "answers.json").write_text(json.dumps({"answer": {"fullwiki": "yes"}}))
    flags = ["evaluate", "--predictions", str(tmp_path / "answers.json"), "--dataset", "hotpotqa"]
    flags += ["--data_dir", str(tmp_path)]
    assert main(flags) == 2
    assert "choose one by --set data.config=distractor" in capsys.readouterr().err
    assert main([*flags, "--set", "data.config=fullwiki"]) == 0
    assert json.loads(capsys.readouterr().out)["em"] == 1.0
    assert main([*flags, "--set", "evaluation.batch_size=3"]) == 2
    assert (
        "scored by the data alone, got --set evaluation.batch_size; leave it out"
        in capsys.readouterr().err
    )


def test_lines_that_cannot_be_read_have_no_type_and_no_official_score(tmp_path: Path) -> None:
    row = {
        "_id": "a",
        "question": "q",
        "answer": "yes",
        "type": "bridge",
        "context": [["T", ["x"]]],
    }
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n{\n")
    data = DataConfig(dataset="hotpotqa", data_dir=str(tmp_path))
    assert question_types(data, "validation") == {"a": "bridge"}
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"answer": {"a": "yes"}}))
    with pytest.raises(
        DataError, match="official scores need every row of hotpotqa validation: row must be JSON"
    ):
        score_file(answers, data)
