"""Pooling: token states → latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from latentwire.models.attention import merge, mlp, split


class SpanQueries(nn.Module):
    """Learned queries that start out reading evenly spaced spans.

    Attention to state s from query l carries a bias −sharpness·((s − centre_l) / span)², with one
    learned sharpness per head: at first each latent looks at its own stretch of text, whatever the
    text's length, and training is free to flatten the bias. Random queries must find that out
    before anything else is learned. A message of another length than ``count`` interpolates the
    queries. The last ``private`` ones are further groups that each cover the text once more.
    """

    def __init__(self, count: int, width: int, heads: int, private: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.count, self.heads = count, heads
        self.query = nn.Parameter(torch.randn(count + sum(private), width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = mlp(width)
        # One span from the centre, weights are e^−0.2 of their peak in the first head, e^−2 in the
        # last.
        self.sharpness = nn.Parameter(torch.linspace(0.2, 2.0, heads))
        self.share_P: torch.Tensor
        self.size_P: torch.Tensor
        # Centres of the private groups' spans as shares of the text, and each group's size.
        shares = [torch.zeros(0), *((torch.arange(n) + 0.5) / n for n in private)]
        sizes = [torch.zeros(0), *(torch.full((n,), float(n)) for n in private)]
        self.register_buffer("share_P", torch.cat(shares), persistent=False)
        self.register_buffer("size_P", torch.cat(sizes), persistent=False)

    def forward(
        self, x_BSM: torch.Tensor, length_B: torch.Tensor, latents_B: torch.Tensor
    ) -> torch.Tensor:
        """Pool ``[B, S, M]``, of which each row's first ``length_B`` are real, to ``[B, L, M]``.

        L is the largest of ``latents_B`` and all private ones; a row's entries after its own
        latents mean nothing.
        """
        states = torch.arange(x_BSM.shape[1], device=x_BSM.device)
        # An empty text is one state of padding.
        keep_BS = (states < length_B[:, None]) | (states == 0)
        key_BSM, value_BSM = self.key_value(self.norm(x_BSM)).chunk(2, dim=-1)
        query_BLM, share_BL, size_BL = self._queries(latents_B)
        # −sharpness · ((s − centre) / span)², in states: [B, L, S] for each of the heads.
        span_BL = length_B.clamp(min=1)[:, None] / size_BL
        centre_BL = share_BL * length_B.clamp(min=1)[:, None] - 0.5
        distance_BLS = (states - centre_BL[..., None]) / span_BL.clamp(min=1.0)[..., None]
        bias_BHLS = -self.sharpness[None, :, None, None] * distance_BLS[:, None].square()
        bias_BHLS = bias_BHLS.masked_fill(~keep_BS[:, None, None], float("-inf"))
        dtype = key_BSM.dtype
        parts = (query_BLM.to(dtype), key_BSM, value_BSM)
        query, key, value = (split(part, self.heads) for part in parts)
        read_BHLE = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_BHLS.to(dtype))
        y_BLM = query_BLM + self.out(merge(read_BHLE))
        return y_BLM + self.mlp(y_BLM)

    def _queries(self, latents_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each latent's query, its place in the text (0 to 1), and the size of its group."""
        place_L = torch.arange(int(latents_B.max()), device=latents_B.device)
        share_BL = ((place_L + 0.5) / latents_B[:, None]).clamp(max=1)
        query_BLM = interpolated(self.query[: self.count], share_BL)
        size_BL = latents_B[:, None].expand_as(share_BL)
        # Behind the shared queries, of which there may be any number, stand all private ones.
        alike = (len(latents_B), -1)
        return (
            torch.cat((query_BLM, self.query[self.count :].expand(len(latents_B), -1, -1)), 1),
            torch.cat((share_BL, self.share_P.expand(alike)), 1),
            torch.cat((size_BL, self.size_P.expand(alike)), 1),
        )


def interpolated(vector_CM: torch.Tensor, share_BL: torch.Tensor) -> torch.Tensor:
    """Read between C vectors, linearly, at places from 0 to 1: ``[B, L, M]``.

    A message of C latents, whose centres lie at (l + 0.5) / C, reads the vectors themselves.
    """
    # Vector c lies at (c + 0.5) / C, so a share s lies at s · C − 0.5 among them.
    last = len(vector_CM) - 1
    at_BL = (share_BL * len(vector_CM) - 0.5).clamp(0, last)
    below_BL = at_BL.floor().long()
    above_BL = (below_BL + 1).clamp(max=last)
    return torch.lerp(vector_CM[below_BL], vector_CM[above_BL], (at_BL - below_BL)[..., None])


@dataclass(frozen=True)
class Coarsening:
    """A stage of training at which messages are longer than they will be."""

    tokens_per_latent: float
    """Tokens per latent at the first stage."""
    share: float
    """Share of the way to the final length, from 0 to 1."""

    def latents(self, length_B: torch.Tensor, final_B: torch.Tensor) -> torch.Tensor:
        """Return the latents of texts of ``length_B`` states; never fewer than ``final_B``."""
        # Linearly from ⌈length / tokens_per_latent⌉ to the final number.
        start_B = (length_B / self.tokens_per_latent).ceil().long()
        return final_B + ((start_B - final_B).clamp(min=0) * (1 - self.share)).round().long()


def span_means(
    x_BSM: torch.Tensor,
    length_B: torch.Tensor,
    spans_B: torch.Tensor,
    ends_BS: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """Average each row's first ``length_B`` vectors over ``spans_B`` spans, ``[B, L·P, M]``.

    The spans are contiguous (:func:`span_edges`; ARC-Encoder, arXiv 2510.20535), each in P equal
    ``parts``. Spans share a vector by how much of it they cover; with more spans than vectors,
    several take the same one. L is the largest of ``spans_B``; a row's entries after its own are
    zero, and so is a row without vectors.
    """
    # Every state counts for 1, and padding for 0.
    size_BS = (torch.arange(x_BSM.shape[1], device=x_BSM.device) < length_B[:, None]).float()
    start_BL1, end_BL1 = text_spans(size_BS, length_B, spans_B, ends_BS).split(1, -1)
    # Part p of a span lies between the edges p/P and (p + 1)/P of the way through it.
    edge_BLP = torch.lerp(start_BL1, end_BL1, torch.arange(parts + 1, device=x_BSM.device) / parts)
    part_BLP2 = torch.stack((edge_BLP[..., :-1], edge_BLP[..., 1:]), -1)
    return overlap_means(x_BSM, size_BS, part_BLP2.flatten(1, 2))


def span_edges(
    length_B: torch.Tensor, spans_B: torch.Tensor, ends_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the edges ``[B, L + 1]`` of spans of each row's first ``length_B`` states.

    They are counted in states from 0 and evenly spaced. ``ends_BS`` is true where a sentence ends
    after a state: in a row with no more spans than sentences each span is then some whole
    sentences, as many as in the others, to the rounding. A row's entries after its own edges lie at
    its end.
    """
    place_BE = torch.arange(int(spans_B.max()) + 1, device=spans_B.device).minimum(spans_B[:, None])
    # Edge e of L spans lies at e · length / L.
    even_BE = place_BE * length_B[:, None] / spans_B[:, None]
    if ends_BS is None:
        return even_BE
    state_S = torch.arange(ends_BS.shape[1], device=spans_B.device)
    ended_BS = (ends_BS & (state_S + 1 < length_B[:, None])).cumsum(1)
    sentences_B = ended_BS.amax(1) + 1 if ended_BS.shape[1] else torch.ones_like(length_B)
    # Edge e comes after sentence round(e · sentences / spans), which ends at the first state that
    # has that many sentence ends up to it.
    read_BE = (place_BE * sentences_B[:, None] / spans_B[:, None] + 0.5).floor()
    end_BE = (ended_BS[:, None] < read_BE[..., None]).sum(2) + 1.0
    inner_BE = (place_BE > 0) & (place_BE < spans_B[:, None])
    return torch.where(inner_BE & (spans_B <= sentences_B)[:, None], end_BE, even_BE)


def text_spans(
    size_BS: torch.Tensor,
    length_B: torch.Tensor,
    spans_B: torch.Tensor,
    ends_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return start and end ``[B, L, 2]`` of the spans between :func:`span_edges`.

    They are shares of the row's whole size, of which state s has ``size_BS``: two tokenizers that
    cut the same text differently agree on them. A row's entries after its own spans are empty.
    """
    edge_BE = F.pad(size_BS.cumsum(1), (1, 0))
    state_BE = span_edges(length_B, spans_B, ends_BS)
    below_BE = state_BE.floor().long()
    above_BE = (below_BE + 1).clamp(max=size_BS.shape[1])
    # An edge within a state lies as far through its size.
    below, above = edge_BE.gather(1, below_BE), edge_BE.gather(1, above_BE)
    at_BE = torch.lerp(below, above, state_BE - below_BE)
    share_BE = at_BE / edge_BE[:, -1:].clamp(min=1e-9)
    return torch.stack((share_BE[:, :-1], share_BE[:, 1:]), -1)


def overlap_means(
    x_BSM: torch.Tensor, size_BS: torch.Tensor, span_BL2: torch.Tensor
) -> torch.Tensor:
    """Average the vectors that each span meets, by how much of it they cover, ``[B, L, M]``.

    An empty span gives zero. Vector s covers ``size_BS`` of its row; spans are shares of the row
    (:func:`text_spans`).
    """
    end_BS = size_BS.cumsum(1)
    end_BS = end_BS / end_BS[:, -1:].clamp(min=1e-9)
    start_BS = F.pad(end_BS[:, :-1], (1, 0))
    start_BL1, end_BL1 = span_BL2[..., :1], span_BL2[..., 1:]
    # What span l and vector s share, [B, L, S]: from the later start to the sooner end.
    first_BLS = torch.maximum(start_BL1, start_BS[:, None])
    last_BLS = torch.minimum(end_BL1, end_BS[:, None])
    overlap_BLS = (last_BLS - first_BLS).clamp(min=0)
    share_BLS = overlap_BLS / overlap_BLS.sum(2, keepdim=True).clamp(min=1e-12)
    return share_BLS.to(x_BSM.dtype) @ x_BSM
