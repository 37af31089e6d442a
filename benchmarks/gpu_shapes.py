"""Training steps at the shapes of Llama-3.1-8B and Qwen2.5-7B with random bf16 weights: no download, no Ray.

python -m benchmarks.gpu_shapes                              # one CUDA device of 80 GB or more
python -m benchmarks.gpu_shapes --scale 0.05 --batch_size 2  # a smaller copy, anywhere
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.shards import builders
from latentwire.dataset.toy import toy_rows
from latentwire.model import LatentWire
from latentwire.pretrained.weights import pick_device
from latentwire.training.loop import Trainer

SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "llama": (LlamaConfig, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}),
    "qwen": (Qwen2Config, {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                           "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}),
}  # fmt: skip
"""Published configurations; the embedded pair's tokenizers feed them, since ids have no meaning to random weights."""
HEAD = 128
"""Width of an attention head in both."""


def model_of(name: str, scale: float, device: torch.device) -> Any:
    """The receiver's shape, ``scale`` of its layers, heads and widths, in random bf16 weights."""
    kind, sizes = SHAPES[name]
    sizes = dict(sizes)
    if scale < 1:
        # Queries a key-value head stay as they are, and so does a head's width.
        groups = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        sizes["num_key_value_heads"] = max(1, round(scale * sizes["num_key_value_heads"]))
        sizes["num_attention_heads"] = groups * sizes["num_key_value_heads"]
        sizes["hidden_size"] = HEAD * sizes["num_attention_heads"]
        for key in ("num_hidden_layers", "intermediate_size"):
            sizes[key] = max(1, round(scale * sizes[key]))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            kind(**sizes, tie_word_embeddings=False), dtype=torch.bfloat16
        )


def wire_of(run: RunConfig, scale: float) -> LatentWire:
    """A wire between the two shapes."""
    # Receivers are loaded in the order in which the run names them.
    device, waiting = pick_device(), iter(receiver.name for receiver in run.receivers)
    with patch(
        "latentwire.models.frozen_lm.load_model",
        lambda *_, **__: model_of(next(waiting), scale, device),
    ):
        return LatentWire(run)


def rows_of(run: RunConfig, count: int) -> pa.Table:
    """Toy rows in shard columns, four contexts long each."""
    rows = list(toy_rows(count, seed=0, people=4, kinds=4))
    columns: dict[str, list] = {name: [row[name] for row in rows] for name in rows[0]}
    columns["context"] = [4 * (context + " ") for context in columns["context"]]
    columns["sender_bytes"] = [len(context) for context in columns["context"]]
    for name, builder in builders(run).items():
        answers = [golds[0] for golds in columns["answers"]]
        ids = builder.tokenize(columns["context"], columns["question"], answers)
        columns |= {f"{name}_{piece}": values for piece, values in ids.items()}
    return pa.table(columns)


def matmul_ceiling(device: torch.device, size: int) -> float:
    """FLOP/s of the best of ten bf16 products of two square matrices."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    # The first of eleven warms up: it can only be slower, and the best is taken.
    for _ in range(11):
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    # size² entries, each of size products and sums.
    return 2 * size**3 / best


def flops(wire: LatentWire, trainer: Trainer, table: pa.Table) -> float:
    """FLOPs of one step: 4 per receiver weight and position (forward, and backward to the inputs), 6 per trained weight.

    Trained weights are counted once per soft-prompt position, embeddings and attention's own products not at all.
    """
    total = 0.0
    # Forward 2 FLOPs a weight and position, backward 2 to the inputs and 2 to trained weights.
    (batch,) = trainer.collate(table, 10**9)
    for name, lm in wire.receivers.items():
        sequences = lm.read_head(batch.sequences[name].to(lm.device))
        body = sum(p.numel() for p in lm.lm.base_model.layers.parameters())
        total += 4 * (
            body * sequences.ids_BS.numel() + lm.head.weight.numel() * len(sequences.target_N)
        )
    trained = sum(p.numel() for p in wire.interlingua.parameters() if p.requires_grad)
    return total + 6 * trained * table.num_rows * wire.run.encoder.latent_len


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of layers, heads and widths, up to 1"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    options = parser.parse_args()
    device = pick_device()
    ceiling = matmul_ceiling(device, 8192 if device.type == "cuda" else 512)
    print(f"{device}: bf16 products reach {ceiling / 1e12:.3g} TFLOP/s\n")
    print(
        "| step | examples/s | TFLOP/s | share of that (goal ≥ 0.45) | peak memory |\n|---|---|---|---|---|"
    )
    for sequential in (False, True):
        run = with_values(
            RunConfig(),
            {"encoder.latent_len": 32, "encoder.d_z": 256, "training.batch_size": options.batch_size,
             "training.sequential_models": sequential},
        )  # fmt: skip
        table = rows_of(run, options.batch_size)
        wire = wire_of(run, options.scale)
        trainer = Trainer(wire, 10**6)
        # Unmeasured: kernels are chosen and memory is reserved.
        for _ in range(2):
            trainer.step(table)
        _wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        for _ in range(options.steps):
            trainer.step(table)
        _wait(device)
        seconds = (time.perf_counter() - began) / options.steps
        rate = flops(wire, trainer, table) / seconds
        memory = "not on a GPU"
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
        name = "one receiver after the other" if sequential else "joint"
        print(
            f"| {name} | {options.batch_size / seconds:.3g} | {rate / 1e12:.3g} | {rate / ceiling:.2g} | {memory} |"
        )
        # Or the next pair of receivers would stand beside this one in memory.
        del wire, trainer
    return 0


if __name__ == "__main__":
    sys.exit(main())
