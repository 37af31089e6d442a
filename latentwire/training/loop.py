"""The optimisation loop: the same for the plain command and for every worker of a Ray trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from transformers import get_scheduler

from latentwire.data.batches import TrainingBatch
from latentwire.evaluation.evaluator import predict, summarise
from latentwire.losses.bundles import ce_counts, ce_loss
from latentwire.losses.terms import alignment_loss, span_means
from latentwire.models.latentwire import LatentWire
from latentwire.training.workers import Workers

Epoch = Callable[[int], Iterator[TrainingBatch]]
"""The batches of epoch number e, in an order that e alone decides."""


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why and what to change."""


@dataclass
class Progress:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    epoch: int = 0
    """Epoch that the next batch belongs to."""
    batch: int = 0
    """Batches of that epoch already used."""
    bad_steps: int = 0
    """Steps skipped because their gradient was not finite."""
    bad_in_a_row: int = 0
    """Of these, the ones since the last good step."""
    seconds: float = 0.0
    """Time spent in steps, evaluation left out."""
    loss: float = float("nan")
    """Training loss, averaged since the last progress line."""
    first_loss: float | None = None
    """Training loss of the first progress line after the alignment."""


class Trainer:
    """One run's optimiser, schedule and progress."""

    def __init__(self, wire: LatentWire, steps_per_epoch: int, workers: Workers | None = None) -> None:
        """``steps_per_epoch``: batches in one epoch, the same on every worker; at least 1."""
        self.wire, self.workers = wire, workers or Workers()
        self.config = wire.run.training
        self.progress = Progress()
        self.total_steps = min(self.config.epochs * steps_per_epoch, self.config.max_steps or 10**12)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98))
        self.scheduler = get_scheduler(
            "cosine_with_min_lr",
            self.optimizer,
            num_warmup_steps=min(self.config.warmup_steps, self.total_steps // 2),
            num_training_steps=self.total_steps,
            scheduler_specific_kwargs={"min_lr_rate": self.config.min_lr_ratio},
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Encoder and adapters, each with its rate; vectors, gains and embeddings have no decay."""
        groups = []
        parts = {"encoder": self.config.encoder_lr, "adapters": self.config.adapter_lr}
        for part, rate in parts.items():
            named = [
                (name, p) for name, p in self.wire.interlingua.named_parameters()
                if p.requires_grad and name.startswith(part)
            ]  # fmt: skip
            decayed = [p for name, p in named if p.ndim >= 2 and "embed" not in name]
            others = [p for name, p in named if p.ndim < 2 or "embed" in name]
            groups.append({"params": decayed, "lr": rate, "weight_decay": self.config.weight_decay})
            groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
        return groups

    # -------------------------------------------------------------------------------------------------------- training

    def train(self, epochs: Epoch, at_evaluation: Callable[[], None]) -> None:
        """Train to the end, from wherever ``progress`` stands; ``at_evaluation`` is called every so many steps and last.

        Raises :class:`TrainingError` after ``max_bad_steps`` steps in a row without a finite gradient.
        """
        config, progress = self.config, self.progress
        running: list[float] = []
        evaluated_at = progress.step
        while progress.step < self.total_steps:
            used = 0
            for used, batch in enumerate(epochs(progress.epoch), start=1):
                if used <= progress.batch:
                    continue  # a resumed epoch: these were trained on before
                began = time.perf_counter()
                if progress.step == config.alignment_steps:
                    running.clear()  # another loss from here on
                running.append(self.step(batch)["loss"])
                progress.batch, progress.seconds = used, progress.seconds + time.perf_counter() - began
                if progress.step % config.log_every == 0 or progress.step == self.total_steps:
                    progress.loss = sum(running) / len(running)
                    if progress.first_loss is None and progress.step > config.alignment_steps:
                        progress.first_loss = progress.loss
                    running.clear()
                    self._print_line()
                if progress.step % config.evaluate_every == 0:
                    at_evaluation()
                    evaluated_at = progress.step
                if progress.step >= self.total_steps:
                    break
            else:
                if used == 0:
                    raise TrainingError(
                        "an epoch must hold at least one batch, got none; lower batch_size or add samples"
                    )
                progress.epoch, progress.batch = progress.epoch + 1, 0
        if evaluated_at < progress.step or progress.step == 0:
            at_evaluation()

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """One optimiser step on one batch; returns the loss terms, summed over workers' shares of the batch."""
        interlingua = self.wire.interlingua.train()
        self.optimizer.zero_grad(set_to_none=True)
        aligning = self.progress.step < self.config.alignment_steps
        values = self.align(batch) if aligning else self.backward(batch)
        parameters = [p for p in interlingua.parameters() if p.requires_grad]
        self.workers.sum_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm))
        if norm == norm and norm != float("inf"):
            self.optimizer.step()
            self.progress.bad_in_a_row = 0
        else:
            self.progress.bad_steps += 1
            self.progress.bad_in_a_row += 1
            if self.progress.bad_in_a_row >= self.config.max_bad_steps:
                raise TrainingError(
                    f"gradients must be finite, got norm {norm} in {self.progress.bad_in_a_row} steps in a row at step "
                    f"{self.progress.step}; lower training.encoder_lr and adapter_lr, or use float32 receivers"
                )
        self.scheduler.step()
        self.progress.step += 1
        return values

    def backward(self, batch: TrainingBatch) -> dict[str, float]:
        """Forward and backward of every receiver; gradients are left in ``.grad``. Losses are means over receivers.

        With ``sequential_models`` each receiver's graph is freed before the next one's is built; the encoder's graph
        waits for the sum of their gradients with respect to the latents.
        """
        wire, sequential = self.wire, self.config.sequential_models
        z_BLZ = wire.interlingua.encode(batch.texts)
        shared_BLZ = z_BLZ.detach().requires_grad_() if sequential else z_BLZ
        total = z_BLZ.new_zeros(())
        values: dict[str, float] = {}
        for name, lm in wire.receivers.items():
            sequences = batch.sequences[name].to(lm.device)
            counts = self.workers.sum_counts(ce_counts(wire.run.losses, sequences), lm.device)
            p_BLD = wire.interlingua.prompt(name, shared_BLZ).to(lm.device)
            # With reconstruction the same messages stand a second time: still one forward per receiver.
            logits_NV = lm.supervised_logits(sequences, p_BLD.repeat(len(sequences.ids_BS) // len(p_BLD), 1, 1))
            loss, terms = ce_loss(wire.run.losses, sequences, logits_NV, counts)
            values |= {f"{term}_{name}": value for term, value in terms.items()}
            if sequential:
                (loss / len(wire.receivers)).backward()
                total += loss.detach().to(total.device) / len(wire.receivers)
            else:
                total = total + loss.to(total.device) / len(wire.receivers)
        if sequential:
            z_BLZ.backward(shared_BLZ.grad)
        else:
            total.backward()
        return values | {"loss": float(total.detach())}

    def align(self, batch: TrainingBatch) -> dict[str, float]:
        """Forward and backward of the alignment alone: soft prompts against span means of token embeddings."""
        z_BLZ = self.wire.interlingua.encode(batch.texts)
        total = z_BLZ.new_zeros(())
        for name, lm in self.wire.receivers.items():
            p_BLD = self.wire.interlingua.prompt(name, z_BLZ).to(lm.device)
            e_BTD, length_B = lm.text_embeddings(batch.message_ids[name])
            distance_B = alignment_loss(p_BLD, span_means(e_BTD, length_B, p_BLD.shape[1]))
            total = total + distance_B.sum().to(total.device) / (self.config.batch_size * len(self.wire.receivers))
        total.backward()
        return {"loss": float(total.detach())}

    def _print_line(self) -> None:
        progress = self.progress
        if self.workers.rank == 0:
            rate = progress.step * self.config.batch_size / max(progress.seconds, 1e-9)
            print(
                f"step {progress.step}/{self.total_steps}  epoch {progress.epoch}  "
                f"{'alignment' if progress.step <= self.config.alignment_steps else 'loss'} {progress.loss:.4f}  "
                f"lr {self.scheduler.get_last_lr()[0]:.2e}  {rate:.1f} examples/s",
                flush=True,
            )

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, dev: pa.Table) -> dict[str, float]:
        """Development metrics, shared out over workers: ``dev_f1``, ``dev_em``, ``dev_loss`` (means over receivers) and one each."""
        share = dev.take(pa.array(range(self.workers.rank, dev.num_rows, self.workers.size)))
        predictions = self.workers.gather(list(predict(self.wire, share, "latent")) if share.num_rows else [])
        metrics: dict[str, float] = {}
        for name, row in summarise(predictions).items():
            suffix = "" if name == "mean" else f"_{name}"
            metrics |= {f"dev_f1{suffix}": row["f1"], f"dev_em{suffix}": row["em"], f"dev_loss{suffix}": row["nll"]}
        progress = self.progress
        rate = progress.step * self.config.batch_size / max(progress.seconds, 1e-9)
        return metrics | {
            "step": progress.step,
            "epoch": progress.epoch,
            "train_loss": progress.loss,
            "first_train_loss": progress.first_loss if progress.first_loss is not None else progress.loss,
            "examples_per_s": rate,
            "bad_steps": progress.bad_steps,
        }
