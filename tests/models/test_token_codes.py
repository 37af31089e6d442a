"""Codes of single tokens, side by side in a latent: what is there, and what is exactly zero."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from latentwire.config import EncoderConfig
from latentwire.models.encoders import InterlinguaEncoder, MessageLengths, encoder_tokenizers
from latentwire.models.pooling import Coarsening
from latentwire.models.token_codes import TokenCodes
from latentwire.pretrained.weights import ReceiverError
from tests.models.test_encoders import RECEIVERS, TEXTS, own_ids, read

CODES: dict[str, Any] = {
    "kind": "senders", "pooling": "tokens", "tokens_per_latent": 3, "d_z": 12, "code_width": 32,
}  # fmt: skip


def codes_of(**changed: Any) -> TokenCodes:
    torch.manual_seed(0)
    return TokenCodes(8, EncoderConfig(**CODES | changed))


def learned(codes: TokenCodes) -> TokenCodes:
    """Return codes whose blocks and mixing do something."""
    if codes.mix is not None:
        torch.nn.init.normal_(codes.mix.weight, std=0.3)
    if codes.blocks:
        torch.nn.init.normal_(codes.out.weight, std=0.3)
    return codes


def test_at_first_a_latent_is_the_linear_codes_of_its_tokens() -> None:
    codes, x_BTM = codes_of(), torch.randn(2, 7, 8)
    z_BLZ = codes(x_BTM, torch.tensor([7, 4]))
    code_BTK = codes.linear(x_BTM)
    assert z_BLZ.shape == (2, 3, 12)
    part_BTK = z_BLZ.unflatten(2, (3, 4)).flatten(1, 2)
    for row, length in enumerate((7, 4)):
        torch.testing.assert_close(part_BTK[row, :length], code_BTK[row, :length])


@pytest.mark.parametrize(("blocks", "mixing"), [(0, True), (2, True), (2, False)])
def test_parts_are_exactly_zero_where_there_is_no_token_and_nowhere_else(
    blocks: int, mixing: bool
) -> None:
    codes = learned(codes_of(code_blocks=blocks, code_mixing=mixing))
    lengths = [7, 0, 4, 3]
    x_BTM = torch.randn(4, 7, 8)
    part_BTK = codes(x_BTM, torch.tensor(lengths)).unflatten(2, (3, 4)).flatten(1, 2)
    assert part_BTK.shape == (4, 9, 4) and part_BTK.isfinite().all()
    for row, length in enumerate(lengths):
        assert (part_BTK[row, :length] != 0).all() and not part_BTK[row, length:].any()
    # What stands after a row's end reaches nothing.
    noisy_BTM = x_BTM.clone()
    noisy_BTM[2, 4:] = 99
    again_BLZ = codes(noisy_BTM, torch.tensor(lengths))
    torch.testing.assert_close(again_BLZ.unflatten(2, (3, 4)).flatten(1, 2), part_BTK)
    part_BTK.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codes.parameters())


def test_mixing_stays_in_its_latent_and_blocks_see_all_tokens() -> None:
    x_BTM, length_B = torch.randn(1, 6, 8), torch.tensor([6])
    other_BTM = x_BTM.clone()
    other_BTM[0, 5] += 1
    for blocks, alike in ((0, True), (2, False)):
        codes = learned(codes_of(code_blocks=blocks))
        one, other = (codes(x, length_B)[0] for x in (x_BTM, other_BTM))
        assert torch.allclose(one[0], other[0], atol=1e-6) == alike
        assert not torch.isclose(one[1, :4], other[1, :4]).all()  # a neighbour's part


def test_the_place_in_a_latent_tells_equal_tokens_apart() -> None:
    codes = learned(codes_of())
    assert codes.mix is not None
    torch.nn.init.zeros_(codes.mix.weight)
    x_BTM, length_B = torch.randn(1, 1, 8).expand(1, 6, 8), torch.tensor([6])
    part_LRK = codes(x_BTM, length_B)[0].unflatten(1, (3, 4))
    assert not torch.allclose(part_LRK[0, 0], part_LRK[0, 1], atol=1e-4)
    torch.nn.init.zeros_(codes.where_RC)
    alike_LRK = codes(x_BTM, length_B)[0].unflatten(1, (3, 4))
    torch.testing.assert_close(alike_LRK, alike_LRK[:1, :1].expand_as(alike_LRK))


def test_without_blocks_there_is_no_residual_path() -> None:
    plain = {name for name, _ in codes_of(code_blocks=0).named_parameters()}
    assert plain == {"linear.weight", "linear.bias", "mix.weight"}
    unmixed = {name for name, _ in codes_of(code_blocks=0, code_mixing=False).named_parameters()}
    assert unmixed == {"linear.weight", "linear.bias"}
    names = {name.split(".")[0] for name, _ in codes_of().named_parameters()}
    assert names == {"linear", "mix", "blocks", "into", "where_RC", "norm", "out"}


@pytest.mark.parametrize("senders", [("toy-qwen",), ("receiver:llama", "toy-qwen")])
def test_an_encoder_sends_a_code_for_each_of_the_rulers_tokens(senders: tuple[str, ...]) -> None:
    config = EncoderConfig(**CODES, senders=senders)
    encoder = InterlinguaEncoder(config, RECEIVERS).eval()
    assert encoder.codes is not None
    learned(encoder.codes)
    tokens = encoder.tokenize(TEXTS)
    message = encoder(tokens)
    lengths = [len(ids) for ids in own_ids(encoder.states, TEXTS)]
    assert tokens.length_B.tolist() == lengths and lengths[1] == 0
    assert message.length_B.tolist() == [max(1, -(-length // 3)) for length in lengths]
    # Each token has a position at a receiver.
    assert encoder.slots(tokens, "qwen") == lengths
    counted = MessageLengths(
        config, RECEIVERS, encoder_tokenizers(config, list(RECEIVERS.values()))
    )
    assert counted.slots(counted.tokens_of(encoder.token_ids(TEXTS)), "qwen") == lengths
    for row, text in enumerate(TEXTS):
        own_LZ = read(message, row, "llama")
        alone_LZ = read(encoder(encoder.tokenize([text])), 0, "llama")
        torch.testing.assert_close(own_LZ, alone_LZ, atol=1e-5, rtol=1e-4)
        part_TK = own_LZ.unflatten(1, (3, 4)).flatten(0, 1)
        assert (part_TK[: lengths[row]] != 0).all() and not part_TK[lengths[row] :].any()
    span_BL2 = encoder.spans(tokens, "llama")
    assert span_BL2.shape[:2] == message.z_BLZ.shape[:2]
    message.z_BLZ.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == name.startswith("codes.")


def test_patches_of_bytes_can_be_coded_too() -> None:
    config = EncoderConfig(**CODES | {"kind": "byte", "d_model": 32, "layers": 1})
    encoder = InterlinguaEncoder(config, RECEIVERS)
    tokens = encoder.tokenize(TEXTS[:1])
    assert encoder.slots(tokens, "llama") == [4] and encoder(tokens).z_BLZ.shape == (1, 2, 12)


def test_a_message_has_no_other_length_than_its_codes() -> None:
    encoder = InterlinguaEncoder(EncoderConfig(**CODES, senders=("toy-qwen",)), RECEIVERS)
    rows = encoder.token_ids(TEXTS)
    assert encoder.tokens_of(rows, None, 3).latents_B.tolist()[1] == 1
    with pytest.raises(ReceiverError, match=r"makes a latent of 3 tokens.*2 tokens per latent"):
        encoder.tokens_of(rows, tokens_per_latent=2)
    with pytest.raises(ReceiverError, match="coarsening"):
        encoder.tokens_of(rows, Coarsening(2.0, 0.5))


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"tokens_per_latent": None}, "None, 12, none, 0, true and 0"),
        ({"tokens_per_latent": 5}, "5, 12, none, 0, true and 0"),
        ({"split": "lines"}, "3, 12, lines, 0, true and 0"),
        ({"private_len": 1}, "3, 12, none, 1, true and 0"),
        ({"projection": False}, "3, 12, none, 0, false and 0"),
        ({"latent_dropout": 0.5}, "3, 12, none, 0, true and 0.5"),
    ],
)
def test_what_codes_of_tokens_cannot_do_is_refused(values: dict[str, Any], got: str) -> None:
    with pytest.raises(ValidationError, match=f"pooling tokens needs .*, got {got}; set them"):
        EncoderConfig(**CODES | values)


def test_the_width_of_blocks_must_fit_their_heads() -> None:
    with pytest.raises(ValidationError, match="code_width must be a multiple of 2 × heads, got"):
        EncoderConfig(**CODES | {"code_width": 36})
    assert EncoderConfig(**CODES | {"code_width": 36, "code_blocks": 0}).code_blocks == 0
