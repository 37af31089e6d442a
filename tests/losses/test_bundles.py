"""Weighted sums of one forward's cross-entropies."""

import pytest
import torch

from latentwire.config import LossConfig
from latentwire.data.layout import Batch
from latentwire.losses.bundles import ce_counts, ce_loss

NOTHING = torch.zeros(0)


def batch_of(offsets: list[int]) -> Batch:
    count = len(offsets)
    return Batch(
        ids_BS=NOTHING, attention_BS=NOTHING, slots_BS=NOTHING, predict_N=NOTHING,
        target_N=torch.arange(count), offset_N=torch.tensor(offsets), row_N=torch.zeros(count),
        reconstruction_N=torch.zeros(count, dtype=torch.bool),
    )  # fmt: skip


def test_each_term_is_the_mean_over_its_own_tokens() -> None:
    batch = batch_of([0, 1, 2, 0, 1])
    logits_NV = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    ce_N = torch.nn.functional.cross_entropy(logits_NV, batch.target_N, reduction="none")
    config = LossConfig(answer_ce_weight=1.0, first_k_ce_weight=0.5, first_token_ce_weight=0.25, k=2)
    total, terms = ce_loss(config, batch, logits_NV, ce_counts(config, batch))
    assert terms["answer_ce"] == pytest.approx(float(ce_N.mean()))
    assert terms["first_k_ce"] == pytest.approx(float(ce_N[[0, 1, 3, 4]].mean()))
    assert terms["first_token_ce"] == pytest.approx(float(ce_N[[0, 3]].mean()))
    assert float(total) == pytest.approx(
        terms["answer_ce"] + 0.5 * terms["first_k_ce"] + 0.25 * terms["first_token_ce"]
    )


def test_terms_without_weight_are_not_computed() -> None:
    batch = batch_of([0, 1])
    assert set(ce_counts(LossConfig(), batch)) == {"answer_ce"}


def test_shares_of_a_batch_add_up_to_the_whole() -> None:
    config, logits_NV = LossConfig(first_token_ce_weight=1.0), torch.randn(5, 7)
    whole = batch_of([0, 1, 2, 0, 1])
    counts = ce_counts(config, whole)
    total, _ = ce_loss(config, whole, logits_NV, counts)
    parts = []
    for index in (slice(0, 3), slice(3, 5)):
        part = batch_of(whole.offset_N[index].tolist())
        part.target_N[:] = whole.target_N[index]
        parts.append(ce_loss(config, part, logits_NV[index], counts)[0])
    assert float(sum(parts)) == pytest.approx(float(total), rel=1e-6)
