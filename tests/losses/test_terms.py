"""Pure functions on tensors, against what can be said by hand."""

import pytest
import torch

from latentwire.losses.terms import (
    alignment_loss,
    k_token_ce_from_prefix,
    kd_first_k_prefix_vs_text,
    kd_hidden_states_first_k,
    teacher_rows,
    token_ce,
)

OFFSETS = torch.tensor([0, 1, 2, 0, 1])


def test_token_ce_is_computed_in_fp32() -> None:
    logits_NV = torch.randn(4, 9)
    target_N = torch.tensor([0, 3, 8, 2])
    expected = -logits_NV.to(torch.bfloat16).float().log_softmax(-1)[range(4), target_N]
    torch.testing.assert_close(token_ce(logits_NV.to(torch.bfloat16), target_N), expected)


def test_k_tokens_of_every_answer_and_no_other() -> None:
    logits_NV, target_N = torch.randn(5, 9), torch.randint(9, (5,))
    ce_N = token_ce(logits_NV, target_N)
    assert k_token_ce_from_prefix(logits_NV, target_N, OFFSETS, 2).item() == pytest.approx(
        ce_N[[0, 1, 3, 4]].mean().item()
    )


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_teacher_against_itself_is_zero(top_k: int, temperature: float) -> None:
    logits_NV = 5 * torch.randn(5, 9)
    kl_N = kd_first_k_prefix_vs_text(
        logits_NV, teacher_rows(logits_NV, temperature, top_k), OFFSETS, 3
    )
    assert kl_N.abs().max().item() == pytest.approx(0, abs=1e-5)


def test_kd_is_the_textbook_kl_at_the_first_k_tokens() -> None:
    own_NV, other_NV = torch.randn(5, 9), torch.randn(5, 9)
    log_q_NV, p_NV = (own_NV / 2).log_softmax(-1), (other_NV / 2).softmax(-1)
    expected_N = 4 * torch.nn.functional.kl_div(log_q_NV, p_NV, reduction="none").sum(-1)
    expected_N[2] = 0  # the third token of its answer
    found_N = kd_first_k_prefix_vs_text(own_NV, teacher_rows(other_NV, 2.0), OFFSETS, 2)
    torch.testing.assert_close(found_N, expected_N)


def test_top_k_counts_the_tail_as_one_event() -> None:
    own_NV, other_NV = torch.randn(5, 9), torch.randn(5, 9)
    p_NV, q_NV = other_NV.softmax(-1), own_NV.softmax(-1)
    ids_NK = p_NV.topk(3).indices
    p_NK, q_NK = p_NV.gather(1, ids_NK), q_NV.gather(1, ids_NK)
    p_N4 = torch.cat((p_NK, 1 - p_NK.sum(1, keepdim=True)), 1)
    q_N4 = torch.cat((q_NK, 1 - q_NK.sum(1, keepdim=True)), 1)
    found_N = kd_first_k_prefix_vs_text(own_NV, teacher_rows(other_NV, top_k=3), OFFSETS, 9)
    torch.testing.assert_close(found_N, (p_N4 * (p_N4 / q_N4).log()).sum(1), atol=1e-5, rtol=1e-4)
    full_N = kd_first_k_prefix_vs_text(own_NV, teacher_rows(other_NV), OFFSETS, 9)
    assert bool((found_N <= full_N + 1e-6).all())


def test_hidden_states_are_compared_after_normalisation() -> None:
    state_ND = torch.randn(5, 6)
    zero_N = kd_hidden_states_first_k([state_ND], [3 * state_ND + 1], OFFSETS, 9)
    assert zero_N.abs().max().item() == pytest.approx(0, abs=1e-4)
    other_ND = torch.randn(5, 6)
    found_N = kd_hidden_states_first_k([state_ND, state_ND], [other_ND, state_ND], OFFSETS, 1)
    normal = [torch.nn.functional.layer_norm(t, (6,)) for t in (state_ND, other_ND)]
    expected_N = (normal[0] - normal[1]).square().mean(-1) / 2
    torch.testing.assert_close(found_N[[0, 3]], expected_N[[0, 3]])
    assert found_N[[1, 2, 4]].tolist() == [0, 0, 0]


def test_alignment_is_relative_to_the_target() -> None:
    target_BLD, all_BL = torch.randn(5, 4, 3), torch.ones(5, 4, dtype=torch.bool)
    assert alignment_loss(target_BLD, target_BLD, all_BL).sum() == 0
    assert alignment_loss(
        torch.zeros_like(target_BLD), target_BLD, all_BL
    ).tolist() == pytest.approx([1] * 5)


def test_alignment_does_not_see_padding() -> None:
    p_BLD, target_BLD = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    keep_BL = torch.tensor([[True] * 4, [True, True, False, False]])
    padded = p_BLD.clone()
    padded[1, 2:] = 99
    torch.testing.assert_close(
        alignment_loss(padded, target_BLD, keep_BL), alignment_loss(p_BLD, target_BLD, keep_BL)
    )
