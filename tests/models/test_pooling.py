"""Token states to latents: even spans, no padding, lengths that are told before."""

import pytest
import torch

from latentwire.models.pooling import SpanQueries, overlap_means, span_edges, span_means, text_spans


def means(x_BSM: torch.Tensor, length: int, spans: int) -> list[float]:
    return span_means(x_BSM, torch.tensor([length]), torch.tensor([spans])).flatten().tolist()


def test_spans_are_even_and_share_what_they_cut() -> None:
    x_BSM = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [0.0]]])
    assert means(x_BSM, 4, 2) == [1.5, 3.5]
    assert means(x_BSM, 4, 4) == [1, 2, 3, 4]
    # Three vectors in two spans of one and a half each: the middle one is in both.
    assert means(x_BSM, 3, 2) == pytest.approx([(1 + 1) / 1.5, (1 + 3) / 1.5])
    assert means(x_BSM, 4, 8) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_parts_of_spans_are_equal_stretches_of_each() -> None:
    x_BSM, length_B, ends_BS = (
        torch.randn(1, 6, 2),
        torch.tensor([6]),
        torch.tensor([[0, 0, 0, 1, 0, 1]]).bool(),
    )
    two_B = torch.tensor([2])
    torch.testing.assert_close(
        span_means(x_BSM, length_B, two_B, parts=3), span_means(x_BSM, length_B, torch.tensor([6]))
    )
    by_sentences = span_means(x_BSM, length_B, two_B, ends_BS, parts=2)[
        0
    ]  # spans of four states and of two
    expected = [x_BSM[0, :2].mean(0), x_BSM[0, 2:4].mean(0), x_BSM[0, 4], x_BSM[0, 5]]
    torch.testing.assert_close(by_sentences, torch.stack(expected))


def test_padding_is_in_no_span_and_no_row_sees_another() -> None:
    x_BSM = torch.randn(2, 6, 3)
    changed = x_BSM.clone()
    changed[0, 4:] = 99
    length_B, spans_B = torch.tensor([4, 6]), torch.tensor([2, 3])
    pooled = span_means(changed, length_B, spans_B)
    torch.testing.assert_close(pooled, span_means(x_BSM, length_B, spans_B))
    assert pooled[0, 2].tolist() == [0, 0, 0]
    torch.testing.assert_close(
        pooled[0, :2], span_means(x_BSM[:1, :4], length_B[:1], spans_B[:1])[0]
    )


def test_queries_of_unequal_messages_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    pool = SpanQueries(4, 8, 2).eval()
    x_BSM, length_B, latents_B = (
        torch.randn(3, 9, 8),
        torch.tensor([9, 5, 0]),
        torch.tensor([4, 2, 7]),
    )
    together = pool(x_BSM, length_B, latents_B)
    assert together.shape == (3, 7, 8)
    for row, (length, latents) in enumerate(
        zip(length_B.tolist(), latents_B.tolist(), strict=True)
    ):
        alone = pool(
            x_BSM[row : row + 1, : max(1, length)],
            length_B[row : row + 1],
            latents_B[row : row + 1],
        )
        torch.testing.assert_close(together[row, :latents], alone[0])


def test_a_message_of_the_tables_length_has_the_tables_queries() -> None:
    pool = SpanQueries(4, 8, 2, private=(2,))
    query_BLM, share_BL, size_BL = pool._queries(torch.tensor([4]))
    assert torch.equal(query_BLM[0], pool.query)
    assert share_BL[0].tolist() == [0.125, 0.375, 0.625, 0.875, 0.25, 0.75] and size_BL[
        0
    ].tolist() == [
        4,
        4,
        4,
        4,
        2,
        2,
    ]
    longer, _, _ = SpanQueries._queries(pool, torch.tensor([8]))
    torch.testing.assert_close(longer[0, 2], 0.25 * pool.query[0] + 0.75 * pool.query[1])


def test_queries_look_at_their_own_stretch_first() -> None:
    torch.manual_seed(0)
    pool = SpanQueries(4, 8, 2, private=(2,))
    x_BSM = torch.randn(1, 40, 8, requires_grad=True)
    pooled = pool(x_BSM, torch.tensor([40]), torch.tensor([4]))
    assert pooled.shape == (1, 6, 8)
    for latent, (start, stop) in enumerate(
        [(0, 10), (10, 20), (20, 30), (30, 40), (0, 20), (20, 40)]
    ):
        (gradient,) = torch.autograd.grad(
            pooled[0, latent].square().sum(), x_BSM, retain_graph=True
        )
        share = gradient[0].abs().sum(-1)
        assert share[start:stop].sum() > 1.2 * (stop - start) / 40 * share.sum(), latent


def edges(length: int, spans: int, ends: list[int], wide: int = 24) -> list[float]:
    """Of a row of ``length`` states in which sentences end after so many of them."""
    ends_BS = torch.tensor([[place + 1 in ends for place in range(wide)]])
    return span_edges(torch.tensor([length]), torch.tensor([spans]), ends_BS)[0].tolist()


def test_spans_are_whole_sentences_where_there_are_enough_of_them() -> None:
    assert edges(24, 4, []) == [0, 6, 12, 18, 24]
    assert edges(24, 4, [5, 8, 19]) == [0, 5, 8, 19, 24]
    assert edges(24, 4, [5, 8]) == [0, 6, 12, 18, 24]  # three sentences
    assert edges(24, 2, [5, 8, 10]) == [0, 8, 24]
    assert edges(24, 4, [4, 8, 12, 16, 20]) == [0, 8, 12, 20, 24]
    assert edges(20, 2, [10, 20, 24]) == [
        0,
        10,
        20,
    ]  # what ends with the row or after it is no border
    assert edges(20, 1, [10]) == [0, 20]


@pytest.mark.parametrize("seed", range(20))
def test_no_span_is_empty_wherever_sentences_end(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends_BS = torch.rand(4, 30, generator=generator) < 0.4
    length_B, spans_B = torch.tensor([30, 30, 17, 1]), torch.tensor([7, 29, 4, 3])
    edge_BE = span_edges(length_B, spans_B, ends_BS)
    for row, (length, spans) in enumerate(zip(length_B.tolist(), spans_B.tolist(), strict=True)):
        own = edge_BE[row, : spans + 1]
        assert own[0] == 0 and own[-1] == length and bool((own.diff() > 0).all())
        assert bool((edge_BE[row, spans:] == length).all())
        alone = span_edges(length_B[row : row + 1], spans_B[row : row + 1], ends_BS[row : row + 1])
        torch.testing.assert_close(own, alone[0])


def test_two_cuts_of_one_text_meet_at_the_same_places() -> None:
    # "Ada | lives | in Oslo" to the sender, "Ad | a lives in | Oslo" to the receiver: bytes 4, 6, 7 and 2, 11, 4.
    span_BL2 = text_spans(torch.tensor([[4.0, 6.0, 7.0]]), torch.tensor([3]), torch.tensor([3]))
    edges = [0, 4 / 17, 10 / 17, 1]
    assert span_BL2[0, :, 0].tolist() == pytest.approx(edges[:3]) and span_BL2[
        0, :, 1
    ].tolist() == pytest.approx(edges[1:])
    met_BLM = overlap_means(torch.eye(3)[None], torch.tensor([[2.0, 11.0, 4.0]]), span_BL2)
    expected = torch.tensor([[2 / 4, 2 / 4, 0], [0, 1, 0], [0, 3 / 7, 4 / 7]])
    torch.testing.assert_close(met_BLM[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "spans"), [(7, 3), (10, 3), (49, 13), (1, 5)])
def test_nothing_stands_after_a_rows_own_spans(length: int, spans: int) -> None:
    length_B, spans_B = torch.tensor([length, 60]), torch.tensor([spans, 30])
    pooled_BLM = span_means(torch.ones(2, 60, 1), length_B, spans_B)
    assert torch.equal(pooled_BLM[0, spans:], torch.zeros(30 - spans, 1))
    torch.testing.assert_close(pooled_BLM[0, :spans], torch.ones(spans, 1))
