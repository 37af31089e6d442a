"""Pure functions on tensors, against what can be said by hand."""

import pytest
import torch

from latentwire.losses.terms import alignment_loss, span_means, token_ce


def test_token_ce_is_computed_in_fp32() -> None:
    logits_NV = torch.randn(4, 9)
    target_N = torch.tensor([0, 3, 8, 2])
    expected = -logits_NV.to(torch.bfloat16).float().log_softmax(-1)[range(4), target_N]
    torch.testing.assert_close(token_ce(logits_NV.to(torch.bfloat16), target_N), expected)


def test_spans_are_even_and_share_what_they_cut() -> None:
    e_BTD = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [0.0]]])
    four, three = torch.tensor([4]), torch.tensor([3])
    assert span_means(e_BTD, four, 2).flatten().tolist() == [1.5, 3.5]
    assert span_means(e_BTD, four, 4).flatten().tolist() == [1, 2, 3, 4]
    # Three vectors in two spans of one and a half each: the middle one is in both.
    assert span_means(e_BTD, three, 2).flatten().tolist() == pytest.approx([(1 + 1) / 1.5, (1 + 3) / 1.5])
    assert span_means(e_BTD, four, 8).flatten().tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_padding_is_in_no_span() -> None:
    e_BTD = torch.randn(2, 6, 3)
    changed = e_BTD.clone()
    changed[0, 4:] = 99
    lengths = torch.tensor([4, 6])
    torch.testing.assert_close(span_means(changed, lengths, 3), span_means(e_BTD, lengths, 3))


def test_alignment_is_relative_to_the_target() -> None:
    target_BLD = torch.randn(5, 4, 3)
    assert alignment_loss(target_BLD, target_BLD).sum() == 0
    assert float(alignment_loss(torch.zeros_like(target_BLD), target_BLD).mean()) == pytest.approx(1)
