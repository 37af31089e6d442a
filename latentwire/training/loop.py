"""The optimisation loop: the same for the plain command and for every worker of a Ray trial."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import torch

from latentwire.data.batches import TrainingBatch, TrainingCollator, padding
from latentwire.errors import UserError
from latentwire.features.registry import check_training
from latentwire.losses.bundles import Weights, term_counts, weights_at
from latentwire.losses.terms import alignment_loss
from latentwire.message import Message
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.slots import recorded
from latentwire.prompts.batch import Batch
from latentwire.receivers.base import LossTask, part
from latentwire.storage import Place
from latentwire.training import development
from latentwire.training.development import add_to
from latentwire.training.optimizer import optimizer_of, rate_share, set_rates
from latentwire.training.progress import Progress
from latentwire.training.span_teacher import SpanTeacher, slot_distance
from latentwire.training.workers import Workers

Epoch = Callable[[int], Iterator[pa.Table]]
"""The rows of each step of epoch number e, as shard columns, in an order that e alone decides."""
SLOT_KD = "slot_kd"
"""Name of the comparison of latents' keys and values; no term of a receiver's output."""


class TrainingError(UserError):
    """Training that cannot go on; the message says why and what to change."""


class Trainer:
    """One run's optimiser, schedule and progress."""

    def __init__(
        self,
        wire: LatentWire,
        steps_per_epoch: int,
        workers: Workers | None = None,
        train: Place | None = None,
        all_steps: int | None = None,
    ) -> None:
        """Begin at step 0.

        Args:
            wire: what is trained.
            steps_per_epoch: batches in one epoch, the same on every worker; at least 1.
            workers: those that train together. None: this process alone.
            train: the training shards, where a tuned reader teaches keys and values, or a wire begins
                from what was calibrated on them.
            all_steps: batches of all epochs, where these differ (``positions_per_batch``).
        """
        self.train_shards = train
        self.wire, self.workers = wire, workers or Workers()
        slots = wire.run.losses.slot_kd_weight > 0
        self.span_teacher = SpanTeacher(wire, train) if slots else None
        self.config = wire.run.training
        self.collate = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)
        self.progress = Progress()
        self._rows = 0  # of this worker, since they were last added to the progress
        self.last_values: dict[str, float] = {}
        """Loss terms, prompt scales and, on request, gradient norms of the last step."""
        self.stop_asked = False
        """Set from outside (a signal) to end training after the step that is running."""
        steps = self.config.epochs * steps_per_epoch if all_steps is None else all_steps
        self.total_steps = min(steps, self.config.max_steps or 10**12)
        check_training(wire.interlingua.features)
        wire.interlingua.train_only(self.config.train_only)
        for lm in wire.local_receivers():
            if self.config.gradient_checkpointing:
                lm.recompute_activations()
            if self.config.compile:
                lm.compile_layers()
        closed_form = wire.run.closed_form is not None
        self.optimizer = optimizer_of(wire.interlingua, self.config, closed_form)

    @contextmanager
    def stopped_by(self, signum: signal.Signals) -> Iterator[None]:
        """End training after the running step when this process gets a signal in the block.

        Only for the main thread.
        """

        def ask(*_: Any) -> None:
            self.stop_asked = True

        before = signal.signal(signum, ask)
        try:
            yield
        finally:
            # Ours would keep the wire, its receivers and the optimiser in memory.
            signal.signal(signum, before)

    # ------------------------------------------------------------------------------------- training

    def train(self, epochs: Epoch, at_evaluation: Callable[[], None]) -> None:
        """Train to the end, from wherever ``progress`` stands.

        ``at_evaluation`` is called every ``evaluate_every`` steps, and last. Raises
        :class:`TrainingError` after ``max_bad_steps`` steps in a row without a finite gradient.
        """
        config, progress = self.config, self.progress
        running: list[float] = []
        evaluated_at = progress.step
        while progress.step < self.total_steps and not self.stop_asked:
            used, began = 0, time.perf_counter()
            for used, table in enumerate(epochs(progress.epoch), start=1):
                if used <= progress.batch:
                    continue  # a resumed epoch: these were trained on before
                if progress.step == config.alignment_steps:
                    running.clear()  # another loss from here on
                self.last_values = self.step(table)
                running.append(self.last_values["loss"])
                now = time.perf_counter()
                progress.batch, progress.seconds, began = used, progress.seconds + now - began, now
                progress.first_step_seconds = progress.first_step_seconds or progress.seconds
                if progress.step % config.log_every == 0 or progress.step == self.total_steps:
                    mean = {"loss": sum(running) / len(running)}
                    device = self.wire.interlingua.device
                    progress.loss = self.workers.sum_counts(mean, device)["loss"]
                    if progress.first_loss is None and progress.step > config.alignment_steps:
                        progress.first_loss = progress.loss
                    running.clear()
                    self._print_line(self._examples_per_s())
                if progress.step % config.evaluate_every == 0:
                    at_evaluation()
                    evaluated_at, began = progress.step, time.perf_counter()
                if progress.step >= self.total_steps or self.stop_asked:
                    break
            else:
                if used == 0:
                    raise TrainingError(
                        f"an epoch must hold at least one batch, got none; lower training.{self.config.measure} or add samples"
                    )
                progress.epoch, progress.batch = progress.epoch + 1, 0
        if (evaluated_at < progress.step or progress.step == 0) and not self.stop_asked:
            at_evaluation()

    def step(self, table: pa.Table) -> dict[str, float]:
        """Take one optimiser step on this worker's rows, of which there may be none.

        Returns its share of the loss and of each term, prompt scales and the gradient's norm.
        Dropout depends on seed, step and worker alone, on every device: a resumed run draws what it
        would have drawn.
        """
        seed = f"dropout {self.config.seed} {self.progress.step} {self.workers.rank}"
        torch.manual_seed(random.Random(seed).getrandbits(63))
        interlingua = self.wire.interlingua.train()
        with part("collate"):
            batches = self.collate(table, self.progress.step)
        padded, positions = padding(batches)
        self._rows += table.num_rows
        self.progress.padded += padded
        self.progress.positions += positions
        self.optimizer.zero_grad(set_to_none=True)
        aligning = self.progress.step < self.config.alignment_steps
        values = self.align(batches) if aligning else self.backward(batches)
        parameters = [p for p in interlingua.parameters() if p.requires_grad]
        with part("update"):
            norm = self._update(parameters)
        return values | {"gradient_norm": norm}

    def _update(self, parameters: list[torch.nn.Parameter]) -> float:
        """Clip, change the weights if the gradient is finite; return its norm over all workers."""
        self.workers.sum_gradients(parameters)
        set_rates(self.optimizer, rate_share(self.progress.step, self.total_steps, self.config))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.progress.bad_in_a_row = 0
        else:
            self.progress.bad_steps += 1
            self.progress.bad_in_a_row += 1
            if self.progress.bad_in_a_row >= self.config.max_bad_steps:
                raise TrainingError(
                    f"gradients must be finite, got norm {norm} in {self.progress.bad_in_a_row} "
                    f"steps in a row at step {self.progress.step}; lower training.encoder_lr and "
                    f"adapter_lr, or use float32 receivers"
                )
        self.progress.step += 1
        return norm

    def backward(self, batches: list[TrainingBatch]) -> dict[str, float]:
        """Run forward and backward of this step's receivers; gradients are left in ``.grad``.

        Returns the loss, a mean over receivers, and its terms. With ``sequential_models`` each
        receiver's graph is freed before the next one's is built; the encoder's graph waits for the
        sum of their gradients with respect to the latents.
        """
        step = self.progress.step - self.config.alignment_steps
        losses = self.wire.run.losses
        weights = weights_at(losses, step)
        encoder = self.wire.interlingua.encoder
        if isinstance(encoder, InterlinguaEncoder):
            factor = losses.factor("latent_dropout", step)
            encoder.dropout.p = self.wire.run.encoder.latent_dropout * factor
        sequential = self.config.sequential_models
        names = self._receivers_of(step)
        counts = {name: self._counts(weights, name, batches) for name in names}
        terms = [*weights.terms, *([SLOT_KD] if self.span_teacher else [])]
        values = {"loss": 0.0} | {f"{term}_{name}": 0.0 for name in names for term in terms}
        for index, batch in enumerate(batches):
            message = self.encode(batch)
            # Receivers read latents that are cut off the encoder's graph, or the message itself.
            read = message
            if sequential and message is not None:
                read = message.with_latents(message.z_BLZ.detach().requires_grad_())
            total = torch.zeros((), device=self.wire.interlingua.device)
            with ExitStack() as attached:
                for name in names:
                    shares, scale = self.read(name, batch, read, weights, counts[name], attached)
                    loss = torch.stack(list(shares.values())).sum() / len(names)
                    for term, share in shares.items():
                        values[f"{term}_{name}"] += float(share.detach())
                    if self.config.log_gradient_norms and index == 0 and read is not None:
                        values |= self._gradient_norms(name, shares, read.z_BLZ)
                    values[f"prompt_scale_{name}"] = scale
                    values["loss"] += float(loss.detach())
                    if sequential:
                        with part("backward"):
                            loss.backward()
                    else:
                        total = total + loss.to(total.device)
                if not sequential:
                    with part("backward"):
                        total.backward()
            if message is not None and read is not message and message.z_BLZ.requires_grad:
                assert read is not None
                if read.z_BLZ.grad is not None:  # else no receiver has read a latent
                    with part("backward"):
                        message.z_BLZ.backward(read.z_BLZ.grad)
        return values

    def encode(self, batch: TrainingBatch) -> Message | None:
        """Return the message of a micro-batch's texts; ``None`` for a text reader."""
        if self.wire.run.is_reader:
            return None
        with part("encode"):
            return self.wire.interlingua.encode(batch.tokens)

    def _receivers_of(self, step: int) -> list[str]:
        """Return the receivers that this step trains through; the same on every worker."""
        names = self.wire.interlingua.training_receivers()
        if self.config.receivers_per_step == "all":
            return names
        return [random.Random(f"receiver {self.config.seed} {step}").choice(names)]

    def _counts(
        self, weights: Weights, name: str, batches: list[TrainingBatch]
    ) -> dict[str, float]:
        """Count each term's tokens in the whole step: all micro-batches of all workers."""
        totals = dict.fromkeys(weights.terms, 0.0)
        if self.span_teacher is not None:
            totals[SLOT_KD] = float(sum(int(b.sequences[name].latents_BS.sum()) for b in batches))
        for batch in batches:
            add_to(totals, term_counts(weights, batch.sequences[name]))
        return self.workers.sum_counts(totals, self.wire.receivers[name].device)

    def read(
        self,
        name: str,
        batch: TrainingBatch,
        message: Message | None,
        weights: Weights,
        counts: dict[str, float],
        attached: ExitStack,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Return one receiver's weighted loss terms, and its prompt's RMS over the embeddings'.

        ``attached`` holds the features in place, for activations that the backward pass computes
        again.
        """
        lm, losses = self.wire.receivers[name], self.wire.run.losses
        parts = None
        if not self.config.gradient_checkpointing:  # which allows no cache
            parts = self.wire.parted(name, batch.sequences[name])
        begun = (batch.sequences[name] if parts is None else parts[0]).to(lm.device)
        if self.wire.reads_heads_alike and not self.config.gradient_checkpointing:
            begun = lm.read_head(begun)
        teacher = lm.read_teacher(batch.teacher[name], losses) if weights.needs_teacher else None
        # One backward per term needs a graph per term, which chunks do not have.
        rows = None if self.config.log_gradient_norms else self.config.logit_rows
        teaches_slots = self.span_teacher is not None and SLOT_KD in counts
        targets = self._slot_targets(name, batch, begun, message) if teaches_slots else []
        entries: list[torch.Tensor] = []
        with ExitStack() as first_pass:
            held = attached if parts is None else first_pass
            soft_ND = held.enter_context(self.wire.reading(name, begun, message))
            assert soft_ND is not None
            if teaches_slots:
                here = self.wire.local_receiver(name).lm
                entries = held.enter_context(recorded(here, begun.latents_BS))
            if parts is not None:
                with part(f"read {name}"):
                    past = self.wire.local_receiver(name).prefill(begun, soft_ND)
        rows_M = torch.ones(len(begun.ids_BS), device=lm.device)  # that read each message
        if parts is None:
            task = LossTask(begun, weights, counts, teacher, losses, rows)
            shares_T, rest_ND = lm.losses(task, soft_ND), None
        else:
            rest = parts[1].to(lm.device)
            assert rest.past_R is not None
            rows_M = torch.bincount(rest.past_R, minlength=len(begun.ids_BS)).float()
            task = LossTask(rest, weights, counts, teacher, losses, rows)
            rest_ND = attached.enter_context(self.wire.reading_on(name, rest, message))
            shares_T = self.wire.local_receiver(name).losses(task, rest_ND, past)
        shares = dict(zip(weights.terms, shares_T, strict=True))
        if teaches_slots:
            distance_N = slot_distance(entries, targets)
            rows_N = rows_M.repeat_interleave(begun.latents_BS.sum(1)).to(distance_N)
            step = self.progress.step - self.config.alignment_steps
            weight = losses.slot_kd_weight * losses.factor(f"{SLOT_KD}_weight", step)
            total = (distance_N * rows_N).sum()
            shares[SLOT_KD] = weight * total / max(1.0, counts[SLOT_KD])
        slots_BS = begun.slots_BS
        if self.wire.run.adapter.kind == "heads" and message is not None:
            slots_BS = begun.prefix_BS | begun.control_BS  # its messages have no vectors
        return shares, _rms(soft_ND, rows_M, slots_BS, rest_ND) / lm.embed_rms

    def _slot_targets(
        self, name: str, batch: TrainingBatch, sequences: Batch, message: Message | None
    ) -> list[torch.Tensor]:
        """Return the teacher's keys and values for each latent of some sequences, ``[N, E]`` each."""
        encoder = self.wire.interlingua.encoder
        assert isinstance(encoder, InterlinguaEncoder) and self.span_teacher and message
        spans, ids = encoder.spans(batch.tokens, name), batch.message_ids[name]
        with part(f"teach {name}"):
            targets = self.span_teacher.targets(name, ids, spans)
        _, keep_BL = message.read_by(name)
        message_R = sequences.message_R.to(keep_BL.device)
        return [target_BLE[message_R][keep_BL[message_R]] for target_BLE in targets]

    def _gradient_norms(
        self, name: str, shares: dict[str, torch.Tensor], z_BLZ: torch.Tensor
    ) -> dict[str, float]:
        norms = {}
        for term, share in shares.items():
            (gradient_BLZ,) = torch.autograd.grad(share, z_BLZ, retain_graph=True)
            norms[f"gradient_norm_{term}_{name}"] = float(gradient_BLZ.norm())
        return norms

    def align(self, batches: list[TrainingBatch]) -> dict[str, float]:
        """Run forward and backward of the alignment: soft prompts against token embeddings.

        Each latent meets the mean over its stretch of the text, which is counted in bytes:
        tokenizers cut it differently.
        """
        total, names = 0.0, self.wire.interlingua.training_receivers()
        count = {"messages": float(sum(len(batch.message_ids[names[0]]) for batch in batches))}
        messages = self.workers.sum_counts(count, self.wire.interlingua.device)["messages"]
        encoder = self.wire.interlingua.encoder
        assert isinstance(encoder, InterlinguaEncoder), "a text reader has nothing to align"
        for batch in batches:
            message = self.wire.interlingua.encode(batch.tokens)
            loss = message.z_BLZ.new_zeros(())
            for name in names:
                p_BLD, keep_BL = self.wire.interlingua.prompt(name, message)
                span_BL2 = encoder.spans(batch.tokens, name)
                lm, ids = self.wire.receivers[name], batch.message_ids[name]
                target_BLD = lm.span_embeddings(ids, span_BL2).to(p_BLD.device)
                distance_B = alignment_loss(p_BLD, target_BLD, keep_BL)
                loss = loss + distance_B.sum() / (messages * len(names))
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def _examples_per_s(self) -> float:
        """Return the rows that all workers have trained on in a second; all of them must ask."""
        progress, rows = self.progress, {"rows": float(self._rows)}
        total = self.workers.sum_counts(rows, self.wire.interlingua.device)["rows"]
        progress.rows, self._rows = progress.rows + round(total), 0
        return self.rows_done / max(progress.seconds, 1e-9)

    @property
    def rows_done(self) -> int:
        """Rows that all workers have trained on; where positions fill batches, until the last line or evaluation."""
        if self.config.batch_size is None:
            return self.progress.rows
        return self.progress.step * self.config.batch_size

    def _print_line(self, rate: float) -> None:
        progress = self.progress
        if self.workers.rank == 0:
            loss = "alignment" if progress.step <= self.config.alignment_steps else "loss"
            print(
                f"step {progress.step}/{self.total_steps}  epoch {progress.epoch}  "
                f"{loss} {progress.loss:.4f}  "
                f"lr {self.optimizer.param_groups[0]['lr']:.2e}  {rate:.1f} examples/s",
                flush=True,
            )

    def evaluate(self, dev: pa.Table) -> dict[str, float]:
        """Compute the development metrics, shared out over workers, and how the training stands.

        See :func:`latentwire.training.development.scores`.
        """
        progress = self.progress
        first_loss = progress.loss if progress.first_loss is None else progress.first_loss
        return development.scores(self, dev) | {
            "step": progress.step,
            "total_steps": self.total_steps,
            "epoch": progress.epoch,
            "train_loss": progress.loss,
            "first_train_loss": first_loss,
            "examples_per_s": self._examples_per_s(),
            "train_seconds": progress.seconds,
            "first_step_s": progress.first_step_seconds,
            "padding_share": progress.padded / max(1, progress.positions),
            "bad_steps": progress.bad_steps,
            **self._last_terms(),
        }

    def _last_terms(self) -> dict[str, float]:
        """Return the last step's values but its loss: terms over all workers, others as they are.

        Norms and scales are the same on every worker, or this one's own.
        """
        values = {name: value for name, value in self.last_values.items() if name != "loss"}
        single = ("gradient_norm", "prompt_scale")
        terms = {name: value for name, value in values.items() if not name.startswith(single)}
        if terms:
            values |= self.workers.sum_counts(terms, self.wire.interlingua.device)
        return values


def _rms(
    soft_ND: torch.Tensor,
    rows_M: torch.Tensor,
    slots_BS: torch.Tensor,
    rest_ND: torch.Tensor | None,
) -> float:
    """Return the root mean square of all rows' soft vectors, of which a message's are read once.

    0 where there are none.

    Args:
        soft_ND: of the messages, row by row.
        rows_M: rows that read each of them.
        slots_BS: where they stand in the messages' sequences.
        rest_ND: soft vectors that stand after them.
    """
    square_N = soft_ND.detach().flatten(0, -2).square().mean(-1)
    count_N = rows_M.repeat_interleave(slots_BS.sum(1)).to(square_N)
    if rest_ND is not None:
        square_N = torch.cat((square_N, rest_ND.detach().square().mean(-1).to(square_N)))
        count_N = torch.cat((count_N, count_N.new_ones(len(rest_ND))))
    return float((square_N * count_N).sum() / count_N.sum().clamp(min=1)) ** 0.5
