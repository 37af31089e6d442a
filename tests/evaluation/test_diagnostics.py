"""Probes of messages leave out what too few rows or contexts could tell."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from latentwire.evaluation import diagnostics


def measures_of(contexts: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Probe random messages of these contexts, whose answers begin with one of two tokens."""
    torch.manual_seed(0)
    latents_NZ = torch.randn(len(contexts), 4).double()
    monkeypatch.setattr(diagnostics, "_mean_latents", lambda *_: latents_NZ)
    answers = [[row % 2] for row in range(len(contexts))]
    table = pa.table({"context": contexts, "llama_answer_ids": answers})
    wire: Any = SimpleNamespace(receivers={"llama": None})
    return diagnostics.diagnose(wire, table)


def test_questions_to_one_context_have_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [name for name in measures_of(["one"] * 8, monkeypatch) if "probe" in name]


def test_a_probe_is_not_fitted_to_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two contexts the fit has one: that of one row in one of these orders."""
    orders = (["one", *["eight"] * 8], [*["eight"] * 8, "one"])
    probed = ["probe_answer" in measures_of(order, monkeypatch) for order in orders]
    assert sorted(probed) == [False, True]


def test_several_contexts_have_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "probe_answer" in measures_of([f"text {row}" for row in range(16)], monkeypatch)
