"""Losses over large vocabularies without all their logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Sums = Callable[[slice, torch.Tensor], torch.Tensor]
"""A slice of rows, and their states ``[n, D]`` → a vector ``[T]`` that adds up over rows."""


def sum_by_chunks(sums: Sums, hidden_ND: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Return ``sums`` over all rows of ``hidden_ND``, computed whole or ``rows`` of them at a time.

    By chunks, the gradient with respect to the states is computed in the forward pass, while a
    chunk's logits are there (as Liger's fused linear cross-entropy does, arXiv 2410.10989): nothing
    is computed twice, and the peak is one chunk's. Then every entry of the vector must be given the
    same gradient, as their plain sum does.
    """
    if rows is None or len(hidden_ND) <= rows:
        return sums(slice(None), hidden_ND)
    if not (torch.is_grad_enabled() and hidden_ND.requires_grad):
        chunks = _chunks(len(hidden_ND), rows)
        return torch.stack([sums(chunk, hidden_ND[chunk]) for chunk in chunks]).sum(0)
    return _ByChunks.apply(hidden_ND, sums, rows)


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, sums: Sums, rows: int) -> torch.Tensor:
        gradient_ND = torch.empty_like(hidden_ND)
        total_T = torch.zeros(())
        for chunk in _chunks(len(hidden_ND), rows):
            # A graph of its own, from a leaf: it goes when its gradient is there.
            chunk_ND = hidden_ND[chunk].detach().requires_grad_()
            with torch.enable_grad():
                sums_T = sums(chunk, chunk_ND)
                (gradient_ND[chunk],) = torch.autograd.grad(sums_T.sum(), chunk_ND)
            # At first a scalar, which takes the shape [T] of the sums.
            total_T = total_T.to(sums_T.device) + sums_T.detach()
        ctx.save_for_backward(gradient_ND)
        return total_T

    # A gradient for each of forward's arguments, of which only the states have one.
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        # Σ_t g_t ∂sum_t/∂hidden = g · ∂(Σ_t sum_t)/∂hidden, since all g_t are the same g.
        return gradient_ND * common_gradient(grad_outputs[0]), None, None


def common_gradient(gradient_T: torch.Tensor) -> torch.Tensor:
    """Return the one gradient that all entries share. Raises RuntimeError where they differ.

    Of entries that were summed before the backward pass, only their sum's gradient is known.
    """
    if not bool((gradient_T == gradient_T[0]).all()):
        raise RuntimeError(
            f"losses must be summed before the backward pass, got gradients {gradient_T.tolist()}"
        )
    return gradient_T[0]
