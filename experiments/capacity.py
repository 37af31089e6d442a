"""Where a short message loses what the text holds: in the receivers, in what reads the latents, or in the encoder.

Three rungs on fresh toy contexts, each with all its questions at once, from the receivers outwards:

    python experiments/capacity.py slots --slots 4 2 1                         # soft slots, optimised for each context
    python experiments/capacity.py latents --wire runs/eight/best              # a trained wire's latents, optimised for each context
    python experiments/capacity.py encoder --wire runs/eight/best --seen 64    # its encoder, trained on a few contexts, readers as they are

A rung that reaches exact match 1 is not the limit; the first that does not is where to look. Every context has
its own vectors in the first two, as in arXiv 2502.13063; nothing of them would carry over to another context.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.dataset.toy import Facts, context_of, facts
from latentwire.model import LatentWire
from latentwire.models.slots import projections
from latentwire.prompts.batch import Batch, collate

Read = Callable[[str, Batch], AbstractContextManager[torch.Tensor | None]]
"""Receiver and batch → the soft vectors ``[N, D]`` of its slots, with whatever acts inside the receiver attached."""
TOLD_AT = (0, 10, 30, 100, 300)
BATCH = 16
"""Contexts of one step of the encoder."""


def draw(seed: str, count: int) -> list[Facts]:
    """Fresh contexts of the default space's size."""
    rng = random.Random(seed)
    return [facts(rng, people=3, kinds=2) for _ in range(count)]


class Contexts:
    """Toy contexts with all their questions, and how well receivers answer them."""

    def __init__(self, wire: LatentWire, drawn: list[Facts]) -> None:
        self.wire, self.count = wire, len(drawn)
        self.texts = [context_of(context) for context in drawn]
        self.questions: list[str] = []
        self.golds: list[str] = []
        # Row → its context, whose message or vectors it reads: a row is a question.
        self.context_R: list[int] = []
        for index, context in enumerate(drawn):
            for name, kind, value in context:
                self.questions.append(kind.question.format(name=name))
                self.golds.append(value)
                self.context_R.append(index)

    def loss(self, read: Read, slots: int) -> torch.Tensor:
        """Cross-entropy of the answers in nats per token, mean over receivers."""
        losses = []
        for name, builder in self.wire.builders.items():
            ids = builder.tokenize([], self.questions, self.golds)
            rows = zip(ids["question_ids"], ids["answer_ids"], strict=True)
            batch = collate([builder.latent(slots, *row) for row in rows], messages=self.context_R)
            with read(name, batch) as soft_ND:
                logits_NV = self.wire.local_receiver(name).supervised_logits(batch, soft_ND)
            losses.append(F.cross_entropy(logits_NV, batch.target_N))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def exact_match(self, read: Read, slots: int) -> dict[str, float]:
        """Share of right answers of each receiver, decoded freely."""
        shares = {}
        for name, lm in self.wire.receivers.items():
            builder = self.wire.builders[name]
            questions = builder.tokenize([], self.questions, [])["question_ids"]
            batch = collate(
                [builder.latent(slots, ids) for ids in questions],
                side="left",
                messages=self.context_R,
            )
            with read(name, batch) as soft_ND:
                decoded = lm.generate(
                    batch, builder.stop_ids, self.wire.run.evaluation.max_answer_tokens, soft_ND
                )
            texts = lm.tokenizer.batch_decode(decoded.rows, skip_special_tokens=True)
            right = [text.strip() == gold for text, gold in zip(texts, self.golds, strict=True)]
            shares[name] = statistics.mean(right)
        return shares


def tell(rung: str, step: int, loss: torch.Tensor, exact: dict[str, float]) -> None:
    """Print one line of the table. ``exact``: each receiver's exact match."""
    cells = " | ".join(f"{em:.3f}" for em in exact.values())
    print(f"| {rung} | {step} | {float(loss.detach()):.3f} | {cells} |", flush=True)


def climb(rung: str, told: Contexts, read: Read, slots: int, vectors: list[dict]) -> None:
    """Optimise vectors of each context for all its questions; a line at each of :data:`TOLD_AT`."""
    # Only the vectors learn; whatever reads them stays as it is.
    optimizer = torch.optim.Adam(vectors)
    for step in range(max(TOLD_AT) + 1):
        loss = told.loss(read, slots)
        if step in TOLD_AT:
            tell(rung, step, loss, told.exact_match(read, slots))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def slots_rung(options: argparse.Namespace) -> None:
    """Embeddings of the slots, then their keys and values too, from means of the text's token embeddings on."""
    wire = LatentWire(with_values(RunConfig(), {"prompt.anchor": "A: "}))
    told = Contexts(wire, draw("capacity", options.contexts))
    for slots in options.slots:
        for inside in (False, True):
            # Receiver → [contexts, slots, D]; [contexts, slots, E]: keys and values of all layers.
            p_NLD, kv_NLE = {}, {}
            for name, lm in wire.receivers.items():
                texts = wire.builders[name].tokenize(told.texts, [], [])["context_ids"]
                starts = []
                for ids in texts:
                    # [T, D] in as many even pieces as there are slots, each its mean.
                    pieces = lm.token_embeddings(torch.tensor(ids)).tensor_split(slots)
                    starts.append(torch.stack([piece.mean(0) for piece in pieces]))
                p_NLD[name] = torch.stack(starts).requires_grad_()
                targets = projections(lm.skeleton(), "deep_prefix")
                width = sum(target.out_features for target in targets)
                kv_NLE[name] = torch.zeros(told.count, slots, width, requires_grad=inside)

            # The vectors of this turn are bound as defaults: a closure would see those of the last.
            @contextmanager
            def read(
                name: str, batch: Batch, p_NLD: dict = p_NLD, kv_NLE: dict = kv_NLE
            ) -> Iterator[torch.Tensor]:
                # message_R: row → context. [N, L, D] → [R, L, D] → [R · L, D], row by row.
                with wire.receivers[name].added_to_slots(
                    kv_NLE[name][batch.message_R].flatten(0, 1), batch.latents_BS
                ):
                    yield p_NLD[name][batch.message_R].flatten(0, 1)

            vectors = [
                {"params": list(p_NLD.values()), "lr": 0.02},
                {"params": list(kv_NLE.values()), "lr": 0.05},
            ]
            rung = f"{slots} slots, {'keys and values too' if inside else 'embeddings'}"
            # The first group alone, or both.
            climb(rung, told, read, slots, vectors[: 1 + inside])


def latents_rung(options: argparse.Namespace) -> None:
    """The latents of a trained wire, from the encoder's on; adapters and features stay as they are."""
    wire = LatentWire.from_pretrained(options.wire)
    wire.interlingua.requires_grad_(False)
    told = Contexts(wire, draw("capacity", options.contexts))
    message = wire.encode(told.texts)
    z_BLZ = message.z_BLZ.clone().requires_grad_()
    optimised = replace(message, z_BLZ=z_BLZ)
    read: Read = partial(wire.reading, message=optimised)
    climb("latents", told, read, z_BLZ.shape[1], [{"params": [z_BLZ], "lr": 0.03}])
    # RMS of the change over RMS of what the encoder gave.
    change, before = (z_BLZ - message.z_BLZ).square().mean(), message.z_BLZ.square().mean()
    moved = float((change / before).sqrt().detach())
    print(f"the latents moved by {moved:.2f} of their RMS")


def encoder_rung(options: argparse.Namespace) -> None:
    """The encoder of a trained wire on a few contexts, and what that gives on fresh ones; adapters and features stay."""
    wire = LatentWire.from_pretrained(options.wire)
    wire.interlingua.train_only(["encoder"])
    seen, rng = draw("seen", options.seen), random.Random("batches")
    held = {
        f"encoder, {options.seen} seen": seen[: options.contexts],
        "encoder, fresh": draw("capacity", options.contexts),
    }
    rungs = {rung: Contexts(wire, drawn) for rung, drawn in held.items()}
    slots = wire.run.encoder.latent_len

    def read_of(told: Contexts) -> Read:
        return partial(wire.reading, message=wire.interlingua.encode(told.texts))

    trained = [one for one in wire.interlingua.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps + 1):
        if step % options.tell_every == 0:
            wire.interlingua.eval()
            for rung, told in rungs.items():
                with torch.no_grad():
                    read = read_of(told)
                    tell(rung, step, told.loss(read, slots), told.exact_match(read, slots))
        wire.interlingua.train()
        told = Contexts(wire, rng.sample(seen, min(BATCH, len(seen))))
        loss = told.loss(read_of(told), slots)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rung", choices=("slots", "latents", "encoder"))
    parser.add_argument(
        "--wire", type=Path, help="export of a wire trained on the toy pair; not for slots"
    )
    parser.add_argument(
        "--contexts", type=int, default=48, help="contexts that are scored, six questions each"
    )
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[4, 2, 1], help="soft slots of each receiver"
    )
    parser.add_argument(
        "--seen", type=int, default=64, help="contexts that the encoder is trained on"
    )
    parser.add_argument("--steps", type=int, default=300, help="of the encoder, 16 contexts each")
    parser.add_argument(
        "--tell_every", type=int, default=150, help="steps of the encoder between two lines"
    )
    options = parser.parse_args()
    if (options.wire is None) != (options.rung == "slots"):
        parser.error("latents and encoder take --wire, slots does not")
    torch.set_num_threads(1)
    print("| rung | steps | nats per token | EM llama | EM qwen |\n|---|---|---|---|---|")
    {"slots": slots_rung, "latents": latents_rung, "encoder": encoder_rung}[options.rung](options)


if __name__ == "__main__":
    main()
