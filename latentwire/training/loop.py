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
from latentwire.losses.bundles import weights_at
from latentwire.losses.terms import alignment_loss
from latentwire.message import Message
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.receivers.base import part
from latentwire.storage import Place
from latentwire.training import development
from latentwire.training.optimizer import optimizer_of, rate_share, set_rates
from latentwire.training.progress import Progress
from latentwire.training.receiver_losses import ReceiverLosses
from latentwire.training.span_teacher import SpanTeacher
from latentwire.training.workers import Workers

Epoch = Callable[[int], Iterator[pa.Table]]
"""The rows of each step of epoch number e, as shard columns, in an order that e alone decides."""


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
        self.losses = ReceiverLosses(wire, SpanTeacher(wire, train) if slots else None)
        self.config = wire.run.training
        self.collate = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)
        self.progress = Progress()
        self._rows = 0  # of this worker, since they were last added to the progress
        self.last_values: dict[str, float] = {}
        """Loss terms, prompt scales and, on request, gradient norms of the last step."""
        self.title = ""
        """Name and place of the stage that this is, where the run has several."""
        self.stop_asked = False
        """Set from outside (a signal) to end training after the step that is running."""
        steps = self.config.epochs * steps_per_epoch if all_steps is None else all_steps
        # 10¹²: no limit.
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
        aligning = config.alignment_steps
        if 0 < self.total_steps <= aligning:
            self.workers.say(
                f"{self.lead}all {self.total_steps} steps align latents, by training.alignment_steps {aligning}: no "
                f"receiver is asked anything; take more steps, or align in fewer"
            )
        running = progress.losses
        if self.workers.size > 1:
            running.clear()  # a checkpoint has the first worker's alone
        # A run that was stopped is saved without an evaluation.
        evaluated_at = progress.evaluations[-1]["step"] if progress.evaluations else 0
        while progress.step < self.total_steps and not self.stop_asked:
            used, began = 0, time.perf_counter()
            for used, table in enumerate(epochs(progress.epoch), start=1):
                # An epoch's number decides its order: a resumed one begins with the same batches.
                if used <= progress.batch:
                    continue  # a resumed epoch: these were trained on before
                if progress.step == config.alignment_steps:
                    running.clear()  # another loss from here on
                self.last_values = self.step(table)
                running.append(self.last_values["loss"])
                now = time.perf_counter()
                # ``began`` moves on to here: the wait for the next rows counts with the next step.
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
                    # The clock begins anew: an evaluation is no training time.
                    evaluated_at, began = progress.step, time.perf_counter()
                if progress.step >= self.total_steps or self.stop_asked:
                    break
            else:  # the epoch is over, and nothing ended it early
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
        # Seeded anew in every step: a checkpoint then needs no state of a generator.
        seed = f"dropout {self.config.seed} {self.progress.step} {self.workers.rank}"
        torch.manual_seed(random.Random(seed).getrandbits(63))
        interlingua = self.wire.interlingua.train()
        with part("collate"):
            told = self._told_before(table)
            batches = self.collate(table, self.progress.step, told=told)
        padded, positions = padding(batches)
        self._rows += table.num_rows
        self.progress.padded += padded
        self.progress.positions += positions
        # None, not zeros: parameters that a step does not use are passed over by the optimiser.
        self.optimizer.zero_grad(set_to_none=True)
        aligning = self.progress.step < self.config.alignment_steps
        values = self.align(batches) if aligning else self.backward(batches)
        parameters = [p for p in interlingua.parameters() if p.requires_grad]
        with part("update"):
            norm = self._update(parameters)
        return values | {"gradient_norm": norm}

    def _told_before(self, table: pa.Table) -> list[str]:
        """Return the texts of this step that workers before this one have.

        A context whose rows lie on two workers is aligned, recited and continued by the first alone.
        """
        if self.workers.size == 1 or not self.collate.reads_texts(self.progress.step):
            return []  # by all workers alike, or one would wait for the others
        own = [(self.workers.rank, text) for text in self.collate.texts(table)]
        return [text for rank, text in self.workers.gather(own) if rank < self.workers.rank]

    def _update(self, parameters: list[torch.nn.Parameter]) -> float:
        """Clip, change the weights if the gradient is finite; return its norm over all workers."""
        # Before clipping: the norm is that of the joined batch, and the same on every worker.
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
        counts = {}  # of the whole step: all micro-batches of all workers
        values = {"loss": 0.0}
        for name in names:
            own_counts = self.losses.counts(weights, name, batches)
            device = self.wire.receivers[name].device
            counts[name] = self.workers.sum_counts(own_counts, device)
            values |= {f"{term}_{name}": 0.0 for term in self.losses.terms(weights)}
        for index, batch in enumerate(batches):
            message = self.encode(batch)
            # Receivers read latents that are cut off the encoder's graph, or the message itself.
            read = message
            if sequential and message is not None:
                read = message.with_latents(message.z_BLZ.detach().requires_grad_())
            total = torch.zeros((), device=self.wire.interlingua.device)
            with ExitStack() as attached:
                for name in names:
                    shares, scale = self.losses.read(
                        name, batch, read, weights, counts[name], step, attached
                    )
                    # Shares are already divided by the whole step's tokens: micro-batches add up.
                    loss = torch.stack(list(shares.values())).sum() / len(names)
                    for term, share in shares.items():
                        values[f"{term}_{name}"] += float(share.detach())
                    # Of the first micro-batch alone: each norm takes a backward pass of its own.
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
            # Chain rule: d loss / d latents, summed over receivers, goes on into the encoder, once.
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
        # Of the joined batch, as in ``backward``; every receiver reads the same messages.
        count = {"messages": float(sum(int(batch.new_M.sum()) for batch in batches))}
        messages = self.workers.sum_counts(count, self.wire.interlingua.device)["messages"]
        encoder = self.wire.interlingua.encoder
        assert isinstance(encoder, InterlinguaEncoder), "a text reader has nothing to align"
        for batch in batches:
            message = self.wire.interlingua.encode(batch.tokens)
            loss = message.z_BLZ.new_zeros(())
            for name in names:
                # p_BLD: soft prompts. target_BLD: mean embeddings of each latent's stretch.
                p_BLD, keep_BL = self.wire.interlingua.prompt(name, message)
                span_BL2 = encoder.spans(batch.tokens, name)
                lm, ids = self.wire.receivers[name], batch.message_ids[name]
                target_BLD = lm.span_embeddings(ids, span_BL2).to(p_BLD.device)
                distance_B = alignment_loss(p_BLD, target_BLD, keep_BL)
                # A message that stands in several parts counts in the first of them.
                distance_B = distance_B * batch.new_M.to(distance_B)
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

    @property
    def lead(self) -> str:
        """The beginning of each line of this training."""
        return f"stage {self.title}  " if self.title else ""

    def _print_line(self, rate: float) -> None:
        progress = self.progress
        loss = "alignment" if progress.step <= self.config.alignment_steps else "loss"
        self.workers.say(
            f"{self.lead}step {progress.step}/{self.total_steps}  epoch {progress.epoch}  "
            f"{loss} {progress.loss:.4f}  "
            f"lr {self.optimizer.param_groups[0]['lr']:.2e}  {rate:.1f} examples/s"
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
