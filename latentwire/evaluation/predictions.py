"""One receiver's answer to one row, with its scores, its sizes and its times."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire.dataset.rows import digest
from latentwire.evaluation.baselines import Mode


@dataclass(frozen=True)
class Prediction:
    """One receiver's answer to one row."""

    id: str
    receiver: str
    condition: str
    """Key of the row of the table: the mode, then budget and width where there are any."""
    mode: Mode
    text: str
    golds: list[str]
    context: str
    context_id: str
    """Identity of the context, by :func:`context_id`: rows that share it are resampled together."""
    document: str
    """The document that the context is a part of: an article of SQuAD, say."""
    question: str
    em: float
    f1: float
    match: float
    """1 where a gold answer occurs in the text, by :func:`~latentwire.evaluation.metrics.match`,
    else 0."""
    nll: float
    """Negative log-likelihood of the first gold answer and its stop token, nats per token."""
    first_1: float
    """1 where the gold answer's first token is the likeliest one, else 0."""
    first_5: float
    """1 where it is among the five likeliest, else 0."""
    positions: int
    """Positions of the prompt that the receiver reads; a cut cache, and a message in some heads alone,
    counts as those that have as many entries."""
    message_positions: int
    """Positions of the prompt that stand for the context."""
    bytes: int
    """Bytes that had to be sent: the text shown as UTF-8, the latents as fp16, the row's packet, or
    a cache's keys and values as fp16, without saying which ones they are."""
    context_bytes: int
    """UTF-8 bytes of the whole context."""
    context_tokens: int
    """The whole context in this receiver's tokens."""
    forward_ms: float
    """Time of one forward over prompt and gold answer, adapter and features included. Like all
    times it is shared out over its batch."""
    encode_ms: float
    """Time from the sender's token ids to the message; with ``bits``, packed and unpacked. For a cut
    cache, that of reading and reciting the text; 0 for other texts."""
    prefill_ms: float
    """Time from the message, or the text's token ids, to the answer's first token: adapter,
    features and receiver."""
    decode_ms: float
    """Time from the answer's first token to its end."""
    joint_logp: float | None = None
    """Log-likelihood of this answer and its stop token, summed over all receivers; ``None`` where
    they were not asked."""

    @property
    def first_token_ms(self) -> float:
        """Time from token ids to the answer's first token, the message's encoding included."""
        return self.encode_ms + self.prefill_ms


def context_id(context: str) -> str:
    """Return a short hash that names a context."""
    return digest(context)
