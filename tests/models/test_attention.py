"""Attention blocks, low-rank updates and pooling against the same written out: one row, head and position after the other."""

import cmath
import math

import pytest
import torch
from torch.nn import functional as F

from latentwire.models.attention import Block, rotary_at, rotary_of, rotate
from latentwire.models.low_rank import LowRank, attached, updates_of
from latentwire.models.pooling import SpanQueries


def turned(x_E: torch.Tensor, position: int) -> torch.Tensor:
    """One head's entries as complex numbers, turned by their position: rates fall from 1 to nearly 1/10,000."""
    half = len(x_E) // 2
    found = [
        complex(float(x_E[i]), float(x_E[half + i]))
        * cmath.exp(1j * position * 10_000 ** (-i / half))
        for i in range(half)
    ]
    return torch.tensor([z.real for z in found] + [z.imag for z in found])


def attend(
    query_E: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], bias: list[float]
) -> torch.Tensor:
    """Softmax of scaled products and a bias, over values."""
    scores = [
        math.exp(float(query_E @ key) / math.sqrt(len(query_E)) + b)
        for key, b in zip(keys, bias, strict=True)
    ]
    return torch.stack([s / sum(scores) * v for s, v in zip(scores, values, strict=True)]).sum(0)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(2)
    for p in module.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return module.requires_grad_(False)


def test_rotary_turns_pairs_by_their_positions_angle() -> None:
    x_BHSE = torch.randn(1, 1, 40, 8)
    found = rotate(x_BHSE, rotary_of(40, 8, torch.device("cpu")))
    for position in (0, 1, 7, 39):
        torch.testing.assert_close(
            found[0, 0, position], turned(x_BHSE[0, 0, position], position), atol=1e-4, rtol=1e-4
        )
    places = torch.tensor([[3, 9], [0, 1]])
    rows = rotate(x_BHSE[:, :, :2].expand(2, -1, -1, -1), rotary_at(places, 8))
    torch.testing.assert_close(rows[0, 0, 1], turned(x_BHSE[0, 0, 1], 9), atol=1e-4, rtol=1e-4)


def test_a_block_is_attention_and_mlp_on_top_of_what_it_reads() -> None:
    block = shaken(Block(8, 2))
    x_BSM, keep_BS = torch.randn(1, 5, 8), torch.tensor([[True, True, False, True, True]])
    found = block(x_BSM, keep_BS, rotary_of(5, 4, x_BSM.device))[0]
    normal = F.layer_norm(x_BSM[0], (8,), block.norm.weight, block.norm.bias)
    qkv = normal @ block.query_key_value.weight.T + block.query_key_value.bias
    kept = [0, 1, 3, 4]
    for place in range(5):
        heads = []
        for head in range(2):
            at = slice(4 * head, 4 * head + 4)
            query = turned(qkv[place, :8][at], place)
            keys = [turned(qkv[other, 8:16][at], other) for other in kept]
            heads.append(attend(query, keys, [qkv[other, 16:][at] for other in kept], [0.0] * 4))
        y = x_BSM[0, place] + block.out.weight @ torch.cat(heads) + block.out.bias
        inner = F.layer_norm(y, (8,), block.mlp[0].weight, block.mlp[0].bias)
        inner = F.gelu(block.mlp[1].weight @ inner + block.mlp[1].bias)
        torch.testing.assert_close(
            found[place], y + block.mlp[3].weight @ inner + block.mlp[3].bias, atol=1e-5, rtol=1e-4
        )


def test_an_identity_block_adds_nothing_at_first() -> None:
    block = Block(8, 2).start_as_identity()
    x_BSM = torch.randn(2, 3, 8)
    assert torch.equal(
        block(x_BSM, torch.ones(2, 3, dtype=torch.bool), rotary_of(3, 4, x_BSM.device)), x_BSM
    )


@pytest.mark.parametrize(("rank", "alpha"), [(2, 6.0), (4, 1.0)])
def test_an_update_is_alpha_over_rank_times_two_thin_matrices(rank: int, alpha: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    updates = updates_of(model, ["0"], rank, alpha)
    update: LowRank = updates["0"]  # type: ignore[assignment]
    x = torch.randn(7, 5)
    plain = model(x)
    with attached(model, updates):
        torch.testing.assert_close(model(x), plain)  # nothing at first
        shaken(update)
        whole = model[0].weight + alpha / rank * update.up.weight @ update.down.weight
        torch.testing.assert_close(model(x), x @ whole.T + model[0].bias)
    torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("latents", [3, 5])
def test_queries_read_states_by_likeness_and_nearness(latents: int) -> None:
    """A message of another length than the table's has queries between those of the table."""
    torch.manual_seed(0)
    pool = shaken(SpanQueries(3, 8, 2, private=(2,)))
    pool.sharpness.abs_()
    x_BSM, length = torch.randn(1, 9, 8), 7
    found = pool(x_BSM, torch.tensor([length]), torch.tensor([latents]))[0]
    normal = F.layer_norm(x_BSM[0, :length], (8,), pool.norm.weight, pool.norm.bias)
    kv = normal @ pool.key_value.weight.T + pool.key_value.bias

    def query(share: float) -> torch.Tensor:
        at = min(max(share * 3 - 0.5, 0), 2)
        low = min(int(at), 1)
        return pool.query[low] + (at - low) * (pool.query[low + 1] - pool.query[low])

    wanted = [(query((i + 0.5) / latents), (i + 0.5) / latents, latents) for i in range(latents)]
    wanted += [(pool.query[3 + i], (i + 0.5) / 2, 2) for i in range(2)]
    assert len(found) == len(wanted)
    for place, (query_M, share, count) in enumerate(wanted):
        span = max(length / count, 1.0)
        heads = []
        for head in range(2):
            at = slice(4 * head, 4 * head + 4)
            bias = [
                -float(pool.sharpness[head]) * ((s + 0.5 - share * length) / span) ** 2
                for s in range(length)
            ]
            heads.append(attend(query_M[at], list(kv[:, :8][:, at]), list(kv[:, 8:][:, at]), bias))
        y = query_M + pool.out.weight @ torch.cat(heads) + pool.out.bias
        inner = F.layer_norm(y, (8,), pool.mlp[0].weight, pool.mlp[0].bias)
        inner = F.gelu(pool.mlp[1].weight @ inner + pool.mlp[1].bias)
        torch.testing.assert_close(
            found[place], y + pool.mlp[3].weight @ inner + pool.mlp[3].bias, atol=1e-5, rtol=1e-4
        )
