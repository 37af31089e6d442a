"""Conditions: the rows of a table of scores, each with its stand-in for the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.evaluation.baselines import BUDGET_MODES, MODE_NAMES, MODES, Mode
from latentwire.models.encoders import EncoderTokens, InterlinguaEncoder, MessageLengths

WIDTHS = {16: "fp16", 8: "int8", 4: "int4"}
"""Names of the widths that a packet can have."""
TUNED = " tuned"
"""End of the key of a row whose reader was trained."""
TUNED_MODES: tuple[Mode, ...] = ("text", "truncated", "window", "own_cache", "closed_book")
"""Modes that text readers read; an own cache is that of the whole text's reader."""


@dataclass(frozen=True)
class Budget:
    """A length of message other than the wire's own."""

    knob: Literal["tokens_per_latent", "latent_len"]
    value: int

    def __str__(self) -> str:
        unit = "tokens per latent" if self.knob == "tokens_per_latent" else "latents"
        return f"{self.value} {unit}"


@dataclass(frozen=True)
class Condition:
    """One row of the table.

    ``budget``: ``None`` for the wire's own length, and for modes that have none.
    """

    mode: Mode
    budget: Budget | None = None
    bits: Literal[16, 8, 4] | None = None
    """Width of a latent's entries in a packet: messages go through real packets. ``None``: as the
    encoder made them."""
    tuned: bool = False
    """Read behind a prefix that was trained for :attr:`trained_for`."""

    @property
    def key(self) -> str:
        """Name in the JSON: the mode, then budget and width where there are any."""
        budget = "" if self.budget is None else f" at {self.budget}"
        width = "" if self.bits is None else f" as {WIDTHS[self.bits]}"
        return f"{self.mode}{budget}{width}{TUNED if self.tuned else ''}"

    @property
    def trained_for(self) -> Condition:
        """The row whose reader reads this one: a cache is cut after the whole text was read."""
        return Condition("text", tuned=True) if self.mode == "own_cache" else self

    def tokenize(
        self, encoder: InterlinguaEncoder | MessageLengths, texts: Sequence[str]
    ) -> EncoderTokens:
        """Tokenise sender texts for the encoder, with messages of this length."""
        ids = encoder.token_ids(texts)
        if self.budget is None:
            return encoder.tokens_of(ids)
        if self.budget.knob == "tokens_per_latent":
            return encoder.tokens_of(ids, tokens_per_latent=self.budget.value)
        # latent_len: every text has as many latents, however long it is.
        tokens = encoder.tokens_of(ids)
        return replace(tokens, latents_B=torch.full_like(tokens.latents_B, self.budget.value))


def label(key: str) -> str:
    """Return a row's key in words."""
    # A key is a mode, then " at <budget>" and " as <width>" where there are any.
    mode, _, rest = key.removesuffix(TUNED).partition(" ")
    tuned = ", tuned" if key.endswith(TUNED) else ""
    return f"{MODE_NAMES[cast(Mode, mode)]} {rest}".strip() + tuned


def own_condition(run: RunConfig) -> Condition:
    """Return what a run's receivers read in its training."""
    if run.prompt.reads == "message":
        return Condition("latent")
    return Condition(run.prompt.reads, tuned=True)


def with_tuned(rows: Sequence[Condition]) -> tuple[Condition, ...]:
    """Return the rows of a table with a tuned twin after each one that has one."""
    twins = []
    for row in rows:
        twins.append(row)
        if row.mode in TUNED_MODES:
            twins.append(replace(row, tuned=True))
    return tuple(twins)


def conditions(
    run: RunConfig,
    modes: Sequence[Mode],
    tokens_per_latent: Sequence[int] = (),
    latent_len: Sequence[int] = (),
    bits: Sequence[Literal[16, 8, 4]] = (),
) -> tuple[Condition, ...]:
    """Return the rows of a table in their order.

    Text comes first, then for every budget the messages and what is as short, then the rest.
    ``bits``: widths in which the messages are sent besides. Without budgets the wire's own length
    is the only one. Raises :class:`~latentwire.config.resolve.ConfigError` for budgets that this
    wire's encoder does not have.
    """
    if tokens_per_latent and run.encoder.tokens_per_latent is None:
        raise ConfigError(
            "--tokens_per_latent needs an encoder whose message grows with the text, got "
            f"encoder.tokens_per_latent null (latent_len {run.encoder.latent_len}); use "
            "--latent_len"
        )
    if latent_len and run.encoder.tokens_per_latent is not None:
        raise ConfigError(
            f"--latent_len needs an encoder whose messages have a fixed length, got "
            f"encoder.tokens_per_latent {run.encoder.tokens_per_latent}; use --tokens_per_latent"
        )
    if tokens_per_latent and run.adapter.kind == "heads":
        raise ConfigError(
            f"--tokens_per_latent needs messages of any length, got adapter.kind heads, whose latents are "
            f"{run.encoder.tokens_per_latent} tokens each; leave --tokens_per_latent out"
        )
    if latent_len and run.adapter.slot_positions:
        raise ConfigError(
            "--latent_len needs adapter.slot_positions false, got true; leave --latent_len out"
        )
    if any(value < 1 for value in (*tokens_per_latent, *latent_len)):
        values = ", ".join(map(str, (*tokens_per_latent, *latent_len)))
        raise ConfigError(f"budgets must be ≥ 1, got {values}")
    budgets: list[Budget | None] = [
        *(Budget("tokens_per_latent", value) for value in tokens_per_latent),
        *(Budget("latent_len", value) for value in latent_len),
    ]
    chosen = [mode for mode in MODES if mode in modes]
    rows = [Condition("text")] if "text" in chosen else []
    # None is the wire's own length.
    for budget in budgets or [None]:
        for mode in chosen:
            if mode in BUDGET_MODES:
                rows.append(Condition(mode, budget))
            if mode == "latent":
                rows += [Condition(mode, budget, width) for width in bits]
    rows += [Condition(mode) for mode in chosen if mode != "text" and mode not in BUDGET_MODES]
    return tuple(rows)
