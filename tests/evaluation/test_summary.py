"""Tables from predictions that were written by hand: no wire, no receiver."""

import numpy as np
import pytest
import torch

from latentwire.evaluation.diagnostics import _cosine, probe
from latentwire.evaluation.evaluator import Prediction
from latentwire.evaluation.summary import breakdown, compare, details, summarise, together
from tests.evaluation.test_statistics import prediction


def answer(
    row: int,
    receiver: str,
    text: str,
    em: float,
    f1: float,
    joint_logp: float | None = None,
    **values: object,
) -> Prediction:
    return prediction(row, em, f1, receiver=receiver, text=text, joint_logp=joint_logp, **values)


def test_receivers_together_are_as_good_as_their_best_and_as_the_likeliest_answer() -> None:
    rows = [
        answer(0, "llama", "red", 1.0, 1.0, -1.0),
        answer(1, "llama", "blue", 0.0, 0.5, -3.0),
        answer(2, "llama", "tin", 0.0, 0.0, -1.0),
        answer(0, "qwen", "a red", 0.0, 0.6, -2.0),
        answer(1, "qwen", "green", 0.0, 0.2, -2.0),
        answer(2, "qwen", "tin", 0.0, 0.0, -1.0),
    ]
    scores = together(rows)
    assert scores["agreement"] == pytest.approx(
        1 / 3
    )  # both are wrong on the second row, and do not say the same
    assert scores["oracle_em"] == pytest.approx(1 / 3) and scores["oracle_f1"] == pytest.approx(
        1.5 / 3
    )
    assert scores["joint_em"] == pytest.approx(1 / 3) and scores["joint_f1"] == pytest.approx(
        1.2 / 3
    )
    unasked = [answer(0, "llama", "red", 1.0, 1.0), answer(0, "qwen", "blue", 0.0, 0.0)]
    assert "joint_em" not in together(unasked) and together(unasked[:1]) == {}
    mean = summarise(rows)["mean"]
    assert (
        mean["em"] == pytest.approx((1 / 3 + 0) / 2) and "em_low" not in mean and mean["rows"] == 3
    )


def test_a_difference_of_the_mean_is_the_mean_over_receivers() -> None:
    one = [
        answer(row, name, "x", em, em)
        for name, em in (("llama", 1.0), ("qwen", 0.0))
        for row in range(6)
    ]
    other = [answer(row, name, "x", 0.0, 0.0) for name in ("llama", "qwen") for row in range(6)]
    differences = compare(one, other)
    assert (differences["llama"]["em"]["difference"], differences["qwen"]["em"]["difference"]) == (
        1.0,
        0.0,
    )
    assert differences["mean"]["em"] == {
        "difference": 0.5,
        "low": 0.5,
        "high": 0.5,
        "p": pytest.approx(2 / 2**6),
    }


def test_parts_by_length_question_and_type_have_their_own_rows() -> None:
    sizes, words = (10, 20, 30, 40, 50, 60), ("Who?", "who is", "Where?", "Where to", "", "Who")
    rows = [
        answer(row, name, f"{row}", float(row < 2), 0.1 * row, context_bytes=size, question=word)
        for name in ("llama", "qwen")
        for row, (size, word) in enumerate(zip(sizes, words, strict=True))
    ]
    groups = breakdown(rows, {"0": "bridge", "5": "bridge"})
    assert [(part["rows"], part["em"], part["f1"]) for part in groups["length"].values()] == [
        (2, 1.0, pytest.approx(0.05)), (2, 0.0, pytest.approx(0.25)), (2, 0.0, pytest.approx(0.45)),
    ]  # fmt: skip
    edge = breakdown(
        [
            answer(row, "llama", "", 0.0, 0.0, context_bytes=size)
            for row, size in enumerate((10, 20, 30, 40))
        ]
    )
    assert [part["rows"] for part in edge["length"].values()] == [
        2,
        1,
        1,
    ]  # 20 is the first third's end
    assert {kind: part["rows"] for kind, part in groups["question"].items()} == {
        "who": 3,
        "where": 2,
        "": 1,
    }
    assert {kind: part["f1"] for kind, part in groups["type"].items()} == {
        "other": pytest.approx(0.25), "bridge": pytest.approx(0.25),
    }  # fmt: skip
    assert {kind: part["rows"] for kind, part in groups["type"].items()} == {
        "other": 4,
        "bridge": 2,
    }
    same = [answer(row, "llama", "x" if row else "y", 0.0, 0.0) for row in range(4)]
    assert details({"latent": same})["distinct"]["latent"] == {"llama": 0.5}


def test_a_probe_is_judged_on_contexts_that_it_has_not_seen() -> None:
    torch.manual_seed(0)
    # Random features, more of them than rows: whatever is fitted is remembered, and tells nothing of other rows.
    label_N = torch.arange(80) % 2
    right, _ = probe(torch.randn(80, 200).double(), label_N, [str(row) for row in range(80)])
    assert right < 0.75
    # The commonest class of what was fitted, whatever the rest has.
    rare_N = (torch.arange(200) % 10 == 0).long()
    _, majority = probe(torch.randn(200, 4).double(), rare_N, [str(row) for row in range(200)])
    assert majority == pytest.approx(0.9, abs=0.06)


def test_cosines_are_of_different_contexts() -> None:
    x_NZ = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    assert _cosine(x_NZ, ["a", "a", "b"]) == 0.0 and _cosine(
        x_NZ, ["a", "b", "c"]
    ) == pytest.approx(1 / 3)
    assert np.isnan(_cosine(x_NZ, ["a", "a", "a"]))
