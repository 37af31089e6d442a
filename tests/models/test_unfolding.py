"""The adapter of retrieval heads: what is exactly zero is no token, and what is not learned yet adds nothing."""

import pytest
import torch

from latentwire.config import AdapterConfig
from latentwire.models.unfolding import Unfolding
from latentwire.pretrained.weights import ReceiverError

HEADS = ((0, 1), (2, 0), (2, 1))


def unfolding(blocks: int = 1, share: float | None = 0.375, mixed: bool = True) -> Unfolding:
    """Three of eight heads, four tokens of five numbers in a latent."""
    torch.manual_seed(0)
    config = AdapterConfig(kind="heads", cache_share=share, unfold_blocks=blocks, unfold_width=16)
    made = Unfolding(
        config,
        d_z=20,
        tokens=4,
        mixed=mixed,
        attention_heads=2,
        shape=(4, 2, 6),
        width=8,
        embed_rms=1.0,
    )
    return made


def message(tokens: int, latents: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """One message whose first tokens alone are there."""
    z_BTK = torch.randn(1, 4 * latents, 5, generator=torch.Generator().manual_seed(1))
    z_BTK[:, tokens:] = 0
    keep_BL = torch.arange(latents)[None] < -(-tokens // 4)
    return z_BTK.view(1, latents, 20), keep_BL


def test_a_code_of_zeros_is_no_token() -> None:
    adapter = unfolding()
    z_BLZ, keep_BL = message(6)
    entry_BTE, keep_BT = adapter(z_BLZ, keep_BL)
    assert entry_BTE.shape == (1, 12, 3 * 2 * 6)
    assert keep_BT[0].tolist() == [True] * 6 + [False] * 6
    z_BLZ[0, 0, :5] = 0.0  # rounded to zero in a packet of few bits: a token all the same
    assert adapter.tokens_of(z_BLZ, keep_BL).sum() == 6
    rows_NE = adapter.rows(z_BLZ, keep_BL, torch.tensor([0, 0]))
    assert len(rows_NE) == 12 and torch.equal(rows_NE[:6], rows_NE[6:])


def test_at_first_the_blocks_add_nothing_and_then_they_do() -> None:
    adapter, (z_BLZ, keep_BL) = unfolding(), message(12)
    code_BTK = z_BLZ.view(1, 12, 5)
    torch.testing.assert_close(adapter(z_BLZ, keep_BL)[0], adapter.linear(code_BTK))
    torch.nn.init.normal_(adapter.out.weight)
    assert not torch.allclose(adapter(z_BLZ, keep_BL)[0], adapter.linear(code_BTK), atol=0.1)


def test_what_is_no_token_changes_nothing() -> None:
    adapter = unfolding()
    torch.nn.init.normal_(adapter.out.weight)
    assert adapter.unmix is not None
    torch.nn.init.normal_(adapter.unmix.weight)
    short, keep_BL = message(6, 2)
    longer = torch.cat((short, torch.zeros(1, 1, 20)), 1)
    mask = torch.tensor([[True, True, False]])
    expected = adapter(short, keep_BL)[0][:, :6]
    torch.testing.assert_close(adapter(longer, mask)[0][:, :6], expected, atol=1e-5, rtol=1e-5)


def test_without_mixing_codes_are_read_as_they_are() -> None:
    adapter, (z_BLZ, keep_BL) = unfolding(mixed=False), message(12)
    assert not any("unmix" in name for name in adapter.state_dict())
    expected_BTE = adapter.linear(z_BLZ.view(1, 12, 5))
    torch.testing.assert_close(adapter(z_BLZ, keep_BL)[0], expected_BTE)


def test_its_heads_are_as_many_as_the_share_and_must_be_chosen() -> None:
    adapter = unfolding()
    assert len(adapter.head_J2) == 3
    with pytest.raises(ReceiverError, match="got none chosen"):
        _ = adapter.heads
    adapter.choose(HEADS, torch.rand(4, 2))
    assert adapter.heads == HEADS
    again = unfolding()
    again.load_state_dict(adapter.state_dict())
    assert again.heads == HEADS and torch.equal(again.score_LH, adapter.score_LH)
    assert len(unfolding(share=None).head_J2) == 2  # a quarter of eight, as four tokens a latent
    assert len(unfolding(share=0.24).head_J2) == 1  # 1.92 of eight: never more than was asked for
    with pytest.raises(ReceiverError, match=r"one of a receiver's 8 .* got 0\.1; set it to 0\.125"):
        unfolding(share=0.1)


@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (8, 3), (9, 4), (16, 6), (0, 1)])
def test_a_budget_is_the_share_of_the_tokens_and_no_less(tokens: int, positions: int) -> None:
    assert unfolding().budget(tokens) == positions


@pytest.mark.parametrize(("share", "positions"), [(0.25, 25), (0.4, 50), (0.3, 34), (0.7, 100)])
def test_cut_text_gets_no_less_than_the_message(share: float, positions: int) -> None:
    adapter = unfolding(share=share)
    assert adapter.text_budget(100) == positions >= adapter.budget(100)
