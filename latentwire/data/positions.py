"""Counts of the positions that receivers read of shard rows, from the lengths of their columns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentwire.config import RunConfig
from latentwire.data import shards, sources
from latentwire.data.packing import Units
from latentwire.data.streams import training_columns
from latentwire.features.registry import FEATURES
from latentwire.losses.bundles import terms_on
from latentwire.models.encoders import MessageLengths, encoder_tokenizers
from latentwire.prompts.sequences import ANSWER, CONTINUE, RECONSTRUCT, sender_text
from latentwire.storage import Place, read_parquet
from latentwire.tokens import ByteTokenizer


@dataclass(frozen=True)
class RowPositions:
    """What N receivers read of each of R rows."""

    key_R: np.ndarray
    """Neighbours with the same key stay together."""
    bytes_R: np.ndarray
    """Bytes of the sender's text."""
    head_NR: np.ndarray
    """Positions up to the end of the message."""
    rest_NR: np.ndarray
    """Positions of question and answer, with the template's around them."""
    text_NR: np.ndarray
    """Tokens of the text that the message stands for."""

    @classmethod
    def joined(cls, tables: list[RowPositions]) -> RowPositions:
        """Return the rows of several tables as one."""
        columns = []
        for field in fields(cls):
            parts = [getattr(table, field.name) for table in tables]
            columns.append(np.concatenate(parts, axis=-1))
        return cls(*columns)


class PositionCounter:
    """Counts for one run; its receivers' tokenizers are loaded, their weights are not."""

    def __init__(self, run: RunConfig) -> None:
        """Begin to count for ``run``, of which ``training.positions_per_batch`` is set."""
        assert run.training.positions_per_batch is not None, "batches are filled by rows"
        self.run, self.builders = run, shards.builders(run)
        self.prefix = 0 if run.prefix is None else run.prefix.tokens
        tokenizers = encoder_tokenizers(run.encoder, run.receivers) or (ByteTokenizer(),)
        self.lengths = MessageLengths(run.encoder, self.builders, tokenizers)
        self.controls = {term.control for term in terms_on(run.losses)}

    def of_shards(self, train: Place) -> Units:
        """Count for all training rows, in the order of their files.

        Raises :class:`~latentwire.data.sources.DataError` for a row beyond the budget.
        """
        names, columns = shards.read_manifest(train)["files"], training_columns(self.run)
        return self.units([self.rows(read_parquet(train / name, columns)) for name in names])

    def of_table(self, table: pa.Table) -> Units:
        """Count for the rows of a table, as :meth:`of_shards` does."""
        return self.units([self.rows(table)])

    def rows(self, table: pa.Table) -> RowPositions:
        """Count for each row of a table of training columns."""
        key_R = np.arange(table.num_rows)
        if self.run.training.questions_together:
            key_R = table["sender_hash"].to_numpy()
        # Rows at which a new key begins; a table without rows has none.
        first_U = np.flatnonzero(np.append(True, key_R[1:] != key_R[:-1])[: len(key_R)])
        sizes = np.diff(np.append(first_U, len(key_R)))
        # Slots follow from the text, which rows of one key share: counted once, then repeated.
        slots_of = self._slots(table.take(first_U))
        head, rest, text = [], [], []
        for name, builder in self.builders.items():
            columns = [f"{name}_{piece}_ids" for piece in ("context", "question", "answer")]
            context, question, answer = (_lengths(table, column) for column in columns)
            slots = np.repeat(slots_of[name], sizes)
            # An empty prompt: what the template writes around message, question and answer.
            frame = builder.latent(0, [], [])
            after = len(frame.ids) - frame.message.stop + answer
            message = context
            if self.run.data.send == "prompt":  # the message stands for the question too
                asked = len(builder.mid_ids) + question
                message = context + asked
                shown = self._shown(context, slots - asked) + asked
            else:
                after = after + question
                shown = self._shown(context, slots)
            read = shown if self.run.is_reader else slots
            head.append(len(builder.head_ids) + self.prefix + read)
            rest.append(after)
            text.append(message)
        bytes_R = table["sender_bytes"].to_numpy()
        return RowPositions(key_R, bytes_R, np.stack(head), np.stack(rest), np.stack(text))

    def units(self, tables: list[RowPositions]) -> Units:
        """Join rows that stay together. Contexts beyond the budget are parted.

        Raises :class:`~latentwire.data.sources.DataError` for a row beyond it.
        """
        budget = self.run.training.positions_per_batch
        assert budget is not None
        rows = RowPositions.joined(tables)
        count = len(rows.bytes_R)
        changes = rows.key_R[1:] != rows.key_R[:-1]
        if not self.run.training.questions_together:  # keys are counted anew in each table
            changes[:] = True
        # Units above the budget are halved until they fit, or are single rows.
        start_U = np.flatnonzero(np.append(True, changes)[:count])
        while True:
            units = self._units(rows, start_U)
            beyond_U = units.alone_U > budget if count else np.zeros(0, bool)
            parted_U = beyond_U & (units.rows_U > 1)
            if not parted_U.any():
                break
            middle = units.start_U[parted_U] + units.rows_U[parted_U] // 2
            start_U = np.sort(np.append(start_U, middle))
        if beyond_U.any():
            most = int(units.alone_U.max())
            raise sources.DataError(
                f"training.positions_per_batch must hold every row by itself, got {budget}, and {int(beyond_U.sum())} of "
                f"{count} rows take more, up to {most}; set it to {most} or more, or lower data.max_context_bytes"
            )
        return units

    def _units(self, rows: RowPositions, start_U: np.ndarray) -> Units:
        # 1 where such sequences are read at all, else 0.
        asks = int(ANSWER in self.controls)
        recites = int(RECONSTRUCT in self.controls)
        continues = int(CONTINUE in self.controls)
        size_U = np.diff(np.append(start_U, len(rows.bytes_R)))

        def longest(length: np.ndarray) -> np.ndarray:
            if not len(start_U):
                return length[..., :0]
            # [..., R] → [..., U]: the maximum from each start up to the next.
            return np.maximum.reduceat(length, start_U, axis=-1)

        head, rest, text = map(longest, (rows.head_NR, rows.rest_NR, rows.text_NR))
        whole = longest(rows.head_NR + rows.rest_NR) * asks
        rest = rest * asks
        read_back = []
        if recites:
            read_back.append(self._recited(text))
        if continues:
            read_back.append(text)
        # A control embedding stands before what is recited or continued.
        for tokens in read_back:
            rest = np.maximum(rest, 1 + tokens)
            whole = np.maximum(whole, head + 1 + tokens)
        return Units(
            start_U=start_U,
            rows_U=size_U,
            bytes_U=longest(rows.bytes_R),
            # The text that is continued begins with a message of its own.
            messages_U=np.full_like(size_U, 1 + continues),
            sequences_U=size_U * asks + recites + continues,
            head_NU=head,
            rest_NU=rest,
            whole_NU=whole,
            shares=self._shares(),
        )

    def _recited(self, text: np.ndarray) -> np.ndarray:
        """Return how many tokens of texts are read for being recited."""
        losses = self.run.losses
        if (stretch := losses.reconstruction_tokens) is None:
            return text
        return np.where(text > stretch, np.minimum(text, stretch + losses.reconstruction_cue), text)

    def _shown(self, context: np.ndarray, budget: np.ndarray) -> np.ndarray:
        """Return how many tokens of contexts a text reader is shown."""
        reads = self.run.prompt.reads
        if reads in ("text", "message"):
            return context
        if reads == "closed_book":
            return np.zeros_like(context)
        return np.minimum(context, budget.clip(0))

    def _shares(self) -> bool:
        """Return whether receivers of their own read a message once for all its rows."""
        run = self.run
        asking = [name for name, feature in FEATURES.items() if feature.reads_question]
        if run.training.gradient_checkpointing:
            return False
        if any(getattr(run.features, name) is not None for name in asking):
            return False
        same_text = run.prompt.reads in ("text", "truncated") and run.data.send == "context"
        return same_text or not run.is_reader

    def _slots(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Return receiver → slots of each row's message."""
        encoder, count = self.run.encoder, table.num_rows
        fixed = encoder.tokens_per_latent is None and encoder.split == "none"
        if count == 0 or (fixed and encoder.pooling != "tokens"):
            # Messages of one length, whatever their texts: nothing is tokenised.
            fixed_slots = {}
            for name in self.builders:
                private = len(self.lengths.private.get(name, ()))
                fixed_slots[name] = np.full(count, encoder.latent_len + private)
            return fixed_slots
        if "encoder_ids" in table.column_names:
            ids = table["encoder_ids"].to_pylist()
        else:
            pairs = zip(table["context"].to_pylist(), table["question"].to_pylist(), strict=True)
            ids = self.lengths.token_ids([sender_text(self.run.data.send, *pair) for pair in pairs])
        tokens = self.lengths.tokens_of(ids)
        return {name: np.array(self.lengths.slots(tokens, name)) for name in self.builders}


def units_of(run: RunConfig, rows: pa.Table | Place) -> Units | None:
    """Return the units that a run's batches are filled with; ``None`` where they are filled by rows.

    ``rows``: all training rows, or their shards. Raises
    :class:`~latentwire.data.sources.DataError` for a row beyond the budget.
    """
    if run.training.positions_per_batch is None:
        return None
    counter = PositionCounter(run)
    return counter.of_table(rows) if isinstance(rows, pa.Table) else counter.of_shards(rows)


def _lengths(table: pa.Table, column: str) -> np.ndarray:
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)
