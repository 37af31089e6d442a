"""What the latents hold, apart from what receivers make of them."""

from __future__ import annotations

import random

import pyarrow as pa
import torch

from latentwire.data.batches import sender_texts
from latentwire.model import LatentWire

LEAST = 4
"""Rows, at least, that a class of the probe has."""
RIDGE = 0.1
"""Ridge of the probe per row it is fitted to; the features have unit variance."""


@torch.no_grad()
def diagnose(wire: LatentWire, table: pa.Table) -> dict[str, float]:
    """Cosines between messages of different contexts, and what a linear probe reads from a message.

    ``cosine``: mean over pairs of rows of the messages' mean latents; near 1, messages differ little beside what they
    share. ``cosine_centred``: the same after the mean message is taken off. ``probe_answer``: share of held-out rows whose
    answer's first token a ridge classifier picks from the message alone, beside ``probe_majority``, the commonest class;
    ``probe_word``: the same for whether a word that about half of the contexts hold is in this one (mean over words, chance
    ``probe_word_majority``). Keys that have too few rows are left out.
    """
    wire.interlingua.eval()
    encoder, size = wire.interlingua.encoder, wire.run.evaluation.batch_size
    means = []
    for start in range(0, table.num_rows, size):
        rows = table.slice(start, size).select(["context", "question"]).to_pydict()
        ids = encoder.token_ids(sender_texts(wire.run.data.send, rows))
        message = wire.interlingua.encode(encoder.tokens_of(ids))
        z_BLZ, keep_BL = message.read_by(next(iter(wire.receivers)))
        means.append(((z_BLZ * keep_BL[..., None]).sum(1) / keep_BL.sum(1, keepdim=True)).float().cpu())
    x_NZ = torch.cat(means).double()
    contexts = table["context"].to_pylist()
    found = {"cosine": _cosine(x_NZ, contexts), "cosine_centred": _cosine(x_NZ - x_NZ.mean(0), contexts)}
    name = next(iter(wire.receivers))
    answers = [ids[0] if ids else -1 for ids in table[f"{name}_answer_ids"].to_pylist()]
    kept = [row for row, answer in enumerate(answers) if answers.count(answer) >= LEAST]
    classes = sorted({answers[row] for row in kept})
    if len(classes) > 1:
        labels = torch.tensor([classes.index(answers[row]) for row in kept])
        found["probe_answer"], found["probe_majority"] = probe(x_NZ[kept], labels, [contexts[row] for row in kept])
    words = [set(context.split()) for context in contexts]
    common = sorted(
        {w for own in words for w in own}, key=lambda w: (abs(sum(w in own for own in words) / len(words) - 0.5), w)
    )
    tried = [w for w in common[:8] if LEAST <= sum(w in own for own in words) <= len(words) - LEAST]
    if tried:
        scores = [probe(x_NZ, torch.tensor([int(w in own) for own in words]), contexts) for w in tried]
        found["probe_word"] = sum(score for score, _ in scores) / len(scores)
        found["probe_word_majority"] = sum(chance for _, chance in scores) / len(scores)
    return found


def probe(x_NZ: torch.Tensor, label_N: torch.Tensor, contexts: list[str]) -> tuple[float, float]:
    """Accuracy on half of the contexts of a ridge classifier fitted to the other half, and that of the commonest class.

    Rows of one context stay together: their messages are the same, and one would tell of the other.
    """
    order = list(dict.fromkeys(contexts))
    random.Random(0).shuffle(order)
    fitted = set(order[: len(order) // 2])
    fit = [row for row, context in enumerate(contexts) if context in fitted]
    held = [row for row, context in enumerate(contexts) if context not in fitted]
    centre_Z, scale_Z = x_NZ[fit].mean(0), x_NZ[fit].std(0).clamp(min=1e-9)
    a_NZ = torch.cat(((x_NZ - centre_Z) / scale_Z, torch.ones(len(x_NZ), 1, dtype=x_NZ.dtype)), 1)
    target_NC = torch.nn.functional.one_hot(label_N, int(label_N.max()) + 1).to(x_NZ.dtype)
    ridge_ZZ = RIDGE * len(fit) * torch.eye(a_NZ.shape[1], dtype=x_NZ.dtype)
    weight_ZC = torch.linalg.solve(a_NZ[fit].T @ a_NZ[fit] + ridge_ZZ, a_NZ[fit].T @ target_NC[fit])
    right = (a_NZ[held] @ weight_ZC).argmax(1) == label_N[held]
    majority = label_N[fit].bincount().argmax()
    return float(right.double().mean()), float((label_N[held] == majority).double().mean())


def _cosine(x_NZ: torch.Tensor, contexts: list[str]) -> float:
    """Mean cosine over pairs of rows with different contexts; not a number where there are none."""
    unit_NZ = torch.nn.functional.normalize(x_NZ, dim=1)
    ids = {context: place for place, context in enumerate(dict.fromkeys(contexts))}
    own_N = torch.tensor([ids[context] for context in contexts])
    different_NN = own_N[:, None] != own_N[None]
    return float((unit_NZ @ unit_NZ.T)[different_NN].mean())
