"""Attention by products where the fused kernel's gradients are slow: the same results."""

from typing import Any

import pytest
import torch

from latentwire.config import PromptConfig, ReceiverConfig
from latentwire.losses.terms import token_ce
from latentwire.models import attention
from latentwire.models.attention import KEPT_SCORES, attend, slow_backward
from latentwire.models.receiver_attention import IMPLEMENTATION
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import PromptBuilder
from latentwire.receivers.local import LocalReceiver

ROWS, HEADS, GROUPS, QUERIES, KEYS, WIDTH = 2, 2, 3, 4, 6, 8


def drawn(dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw queries, and keys and values of fewer heads, as leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS * GROUPS, QUERIES), (HEADS, KEYS), (HEADS, KEYS)]
    return [
        torch.randn(ROWS, heads, count, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads, count in shapes
    ]


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    of_head = torch.rand(
        1, HEADS * GROUPS, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)
    )
    padded = causal.expand(ROWS, 1, -1, -1).clone()
    padded[1, :, :, :3] = False
    return {
        "none": None,
        "causal": causal[None, None],
        "padded": padded,
        "of each head": of_head > 0.2,
        "added": of_head,
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("scale", [None, 0.7])
def test_products_give_the_fused_kernels_sums_and_gradients(
    name: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, HEADS * GROUPS, QUERIES, WIDTH, generator=generator)
    mask = masks()[name]

    def through(products: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(attention, "slow_backward", lambda *_: products)
        leaves = drawn(torch.float32)
        read = attend(*leaves, mask, scale)
        return [read.detach(), *torch.autograd.grad((read * weight).sum(), leaves)]

    for one, other in zip(through(True), through(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_no_key_reads_zeros_and_has_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "slow_backward", lambda *_: True)
    leaves = drawn(torch.float32)
    mask = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[..., 1, :] = False
    read = attend(*leaves, mask)
    assert not read[:, :, 1].any() and read[:, :, 0].any()
    gradients = torch.autograd.grad(read.square().sum(), leaves)
    assert not gradients[0][:, :, 1].any()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_products_serve_gradients_in_bfloat16_on_a_cpu_alone() -> None:
    bf16, fp32 = drawn(torch.bfloat16), drawn(torch.float32)
    assert slow_backward(*bf16) and not slow_backward(*fp32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert slow_backward(*fp32)
    with torch.no_grad():
        assert not slow_backward(*bf16)
    assert not slow_backward(*(tensor.detach() for tensor in bf16))
    assert not slow_backward(*(tensor.to("meta") for tensor in bf16))
    side = int(KEPT_SCORES**0.5)
    for count, products in ((side, True), (side + 1, False)):
        longer = torch.zeros(1, 1, count, 2, dtype=torch.bfloat16, requires_grad=True)
        assert slow_backward(longer, longer, longer) == products


@pytest.mark.parametrize("model", ["toy-llama", "toy-qwen", "toy-phi"])
def test_a_receiver_in_bfloat16_learns_and_reads_as_by_transformers_own_attention(
    model: str,
) -> None:
    lm = LocalReceiver(ReceiverConfig(name="one", model=model, dtype="bfloat16"))
    builder = PromptBuilder(lm.tokenizer, lm.config, PromptConfig(), "context")
    questions = ["Where?", "Where does Ada live, and who is she?"]
    ids = builder.tokenize([], questions, ["Oslo", "Lima"])
    pairs = zip(ids["question_ids"], ids["answer_ids"], strict=True)
    batch = collate([builder.latent(3, *pair) for pair in pairs])
    soft_ND = 0.1 * torch.randn(6, lm.width, generator=torch.Generator().manual_seed(4))
    soft_ND.requires_grad_()
    exact = LocalReceiver(ReceiverConfig(name="one", model=model, dtype="float32"))
    loss = token_ce(exact.supervised_logits(batch, soft_ND), batch.target_N).sum()
    (exact_gradient,) = torch.autograd.grad(loss, soft_ND)

    def through(implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        module: Any = lm.lm
        module.set_attn_implementation(implementation)
        with torch.no_grad():
            read = lm.supervised_logits(batch, soft_ND)
        loss = token_ce(lm.supervised_logits(batch, soft_ND), batch.target_N).sum()
        return read, torch.autograd.grad(loss, soft_ND)[0]

    assert lm.lm.config._attn_implementation == IMPLEMENTATION
    (read, gradient), (read_by_sdpa, gradient_by_sdpa) = through(IMPLEMENTATION), through("sdpa")
    assert torch.equal(read, read_by_sdpa)  # without a gradient nothing is changed
    error, error_by_sdpa = (
        float((one - exact_gradient).norm() / exact_gradient.norm())
        for one in (gradient, gradient_by_sdpa)
    )
    assert error < max(0.02, 1.5 * error_by_sdpa)  # about as exact as the kernel is


def test_other_receivers_keep_transformers_attention() -> None:
    lm = LocalReceiver(ReceiverConfig(name="one", model="toy-llama", dtype="float32"))
    assert lm.lm.config._attn_implementation == "sdpa"
    eager = ReceiverConfig(
        name="one", model="toy-llama", dtype="bfloat16", attn_implementation="eager"
    )
    assert LocalReceiver(eager).lm.config._attn_implementation == "eager"
