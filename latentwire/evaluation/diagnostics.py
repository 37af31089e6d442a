"""Probes of the latents, apart from what receivers make of them."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pyarrow as pa
import torch

from latentwire.data.batches import sender_texts
from latentwire.model import LatentWire

LEAST = 4
"""Fewest rows that a class of the probe has."""
WORDS = 8
"""Words, at most, that are probed for."""
RIDGE = 0.1
"""Ridge of the probe per row that it is fitted to; the features have unit variance."""


@torch.no_grad()
def diagnose(wire: LatentWire, table: pa.Table) -> dict[str, float]:
    """Measure how messages of different contexts differ, and what a linear probe reads from them.

    ``cosine`` is the mean over pairs of rows of the messages' mean latents; near 1, messages differ
    little beside what they share. ``cosine_centred`` is the same after the mean message is taken
    off. ``probe_answer`` is the share of held-out rows whose answer's first token a ridge
    classifier picks from the message alone, and ``probe_majority`` that of the commonest class.
    ``probe_word`` is the same for whether a word that about half of the contexts hold is in this
    one: the mean over words, with ``probe_word_majority`` for chance. Keys that have too few rows
    are left out.
    """
    receiver = next(iter(wire.receivers))
    x_NZ = _mean_latents(wire, table, receiver)
    contexts = table["context"].to_pylist()
    measures = {
        "cosine": _cosine(x_NZ, contexts),
        "cosine_centred": _cosine(x_NZ - x_NZ.mean(0), contexts),
    }
    # The answer's first token, where enough rows begin with it.
    tokens = [ids[0] if ids else -1 for ids in table[f"{receiver}_answer_ids"].to_pylist()]
    counts = Counter(tokens)
    rows = [row for row, token in enumerate(tokens) if counts[token] >= LEAST]
    classes = sorted({tokens[row] for row in rows})
    probed = [contexts[row] for row in rows]
    if len(classes) > 1 and _can_be_probed(probed):
        label_N = torch.tensor([classes.index(tokens[row]) for row in rows])
        accuracy, majority = probe(x_NZ[rows], label_N, probed)
        measures |= {"probe_answer": accuracy, "probe_majority": majority}
    # Words whose share of the contexts is nearest to a half: their presence is hardest to guess.
    # A word counts once a row, however often it stands in it.
    words_of = [set(context.split()) for context in contexts]
    contexts_with = Counter(itertools.chain.from_iterable(words_of))
    total = len(contexts)
    by_balance = sorted(
        contexts_with, key=lambda word: (abs(contexts_with[word] / total - 0.5), word)
    )
    scores = []
    probed_words = by_balance[:WORDS] if _can_be_probed(contexts) else []
    for word in probed_words:
        # Enough rows with the word, and enough without.
        if LEAST <= contexts_with[word] <= total - LEAST:
            label_N = torch.tensor([int(word in words) for words in words_of])
            scores.append(probe(x_NZ, label_N, contexts))
    if scores:
        measures["probe_word"] = sum(accuracy for accuracy, _ in scores) / len(scores)
        measures["probe_word_majority"] = sum(majority for _, majority in scores) / len(scores)
    return measures


def _mean_latents(wire: LatentWire, table: pa.Table, receiver: str) -> torch.Tensor:
    """Return the mean latent of each row's message as ``receiver`` reads it, ``[N, Z]``."""
    wire.interlingua.eval()
    encoder, size = wire.interlingua.encoder, wire.run.evaluation.batch_size
    means = []
    for start in range(0, table.num_rows, size):
        rows = table.slice(start, size).select(["context", "question"]).to_pydict()
        ids = encoder.token_ids(sender_texts(wire.run.data.send, rows))
        # Messages of a batch are padded to L latents: the mean is over those that are kept.
        z_BLZ, keep_BL = wire.interlingua.encode(encoder.tokens_of(ids)).read_by(receiver)
        mean_BZ = (z_BLZ * keep_BL[..., None]).sum(1) / keep_BL.sum(1, keepdim=True)
        means.append(mean_BZ.float().cpu())
    # The probes' systems are solved in fp64.
    return torch.cat(means).double()


def probe(x_NZ: torch.Tensor, label_N: torch.Tensor, contexts: list[str]) -> tuple[float, float]:
    """Return the accuracy of a ridge classifier, and that of the commonest class.

    It is fitted to half of the contexts and tested on the other half. Rows of one context stay
    together: their messages are the same. Shapes: N rows, latent width Z.
    """
    fit, test = _parted(contexts)
    # A: the features with unit variance, and a column of ones for the bias.
    centre_Z, scale_Z = x_NZ[fit].mean(0), x_NZ[fit].std(0).clamp(min=1e-9)
    ones_N1 = torch.ones(len(x_NZ), 1, dtype=x_NZ.dtype)
    a_NZ = torch.cat(((x_NZ - centre_Z) / scale_Z, ones_N1), 1)
    # Y: one column per class. Ridge regression: W = (AᵀA + λI)⁻¹ AᵀY; AW's largest is picked.
    y_NC = torch.nn.functional.one_hot(label_N, int(label_N.max()) + 1).to(x_NZ.dtype)
    # λ grows with the rows, as AᵀA does.
    ridge_ZZ = RIDGE * len(fit) * torch.eye(a_NZ.shape[1], dtype=x_NZ.dtype)
    weight_ZC = torch.linalg.solve(a_NZ[fit].T @ a_NZ[fit] + ridge_ZZ, a_NZ[fit].T @ y_NC[fit])
    right = (a_NZ[test] @ weight_ZC).argmax(1) == label_N[test]
    # The commonest class of the fit, so that chance knows no more than the probe.
    majority = label_N[fit].bincount().argmax()
    return float(right.double().mean()), float((label_N[test] == majority).double().mean())


def _parted(contexts: list[str]) -> tuple[list[int], list[int]]:
    """Return the rows that a probe is fitted to and those that it is tested on."""
    # By first appearance, since a set's order changes from process to process.
    order = list(dict.fromkeys(contexts))
    random.Random(0).shuffle(order)
    half = set(order[: len(order) // 2])
    fit = [row for row, context in enumerate(contexts) if context in half]
    test = [row for row, context in enumerate(contexts) if context not in half]
    return fit, test


def _can_be_probed(contexts: list[str]) -> bool:
    """Return whether a probe has rows to be fitted to: one row alone has no variance."""
    fit, _ = _parted(contexts)
    return len(fit) > 1


def _cosine(x_NZ: torch.Tensor, contexts: list[str]) -> float:
    """Return the mean cosine over pairs of rows with different contexts; NaN if there are none."""
    unit_NZ = torch.nn.functional.normalize(x_NZ, dim=1)
    numbers = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
    context_N = torch.tensor([numbers[context] for context in contexts])
    # True where two rows read different messages; the diagonal is False.
    different_NN = context_N[:, None] != context_N[None]
    return float((unit_NZ @ unit_NZ.T)[different_NN].mean())
