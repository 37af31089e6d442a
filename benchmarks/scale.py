"""What sweeps of 10, 100 and 1,000 trials need on 8, 64 and 512 GPUs, from costs measured per unit.

    python benchmarks/scale.py --gpu_hours 1 --trainable_m 60 --rows 80000

Prints the table of docs/experiments/scale.md. Measured: a trial's overhead, the driver's work per trial, processes' memory. Derived
from formats: checkpoints and columns. Assumed, and therefore flags: what one trial trains.
"""

from __future__ import annotations

import argparse

OVERHEAD_S = 22
"""A trial's start and end beside its training: ``time_total_s`` less ``train_seconds`` in Tune's results of ``make tune`` on two
cores, the longest of six (13 to 22 s)."""
DRIVER_S = 0.086
"""The sweep's driver per trial: suggestion, eight reports, end, checkpoints (benchmarks/simulate_sweep.py with 1,000 trials)."""
TRIAL_GB = 0.39
"""Memory of a running trial's processes beside its workers, shared pages by their share (``Pss``): its driver, which is Train's
controller too, 0.27, and Train's SynchronizationActor 0.12."""
STUDY_MB = 0.035
"""The study's journal per trial with eight evaluations (benchmarks/simulate_sweep.py)."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu_hours", type=float, default=1.0, help="GPU-hours that one whole trial trains"
    )
    parser.add_argument("--gpus_per_trial", type=int, default=1, help="GPUs of one trial")
    parser.add_argument(
        "--trainable_m", type=float, default=60, help="trainable parameters, millions"
    )
    parser.add_argument("--rows", type=int, default=80_000, help="training rows")
    parser.add_argument(
        "--row_bytes", type=int, default=4_000, help="bytes of a training row in the object store"
    )
    parser.add_argument("--receivers", type=int, default=2, help="receivers with teachers' columns")
    parser.add_argument("--k", type=int, default=4, help="tokens that a teacher tells of")
    parser.add_argument("--top_k", type=int, default=32, help="its likeliest tokens at each")
    run = parser.parse_args()
    # fp32 weights and AdamW's two moments: 12 bytes a parameter.
    checkpoint_gb = 12e-3 * run.trainable_m
    # At each of k tokens: ids of 4 bytes and log p of 2 for the top_k, and 2 for all others.
    columns_gb = run.rows * run.receivers * run.k * (run.top_k * (4 + 2) + 2) / 1e9
    store_gb = run.rows * run.row_bytes / 1e9 + columns_gb
    print(
        "| trials | GPUs | at once | hours | GPU-hours | head GB | object store GB | disk GB | study MB | driver busy |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for trials in (10, 100, 1_000):
        for gpus in (8, 64, 512):
            at_once = min(trials, gpus // run.gpus_per_trial)
            # Rounded up: trials run in waves of as many as fit.
            waves = -(-trials // at_once)
            hours = waves * (run.gpu_hours / run.gpus_per_trial + OVERHEAD_S / 3600)
            # 4 GB of the head beside the trials; two checkpoints a trial, its best and its last.
            cells = [
                trials, gpus, at_once, f"{hours:.1f}", f"{trials * (run.gpu_hours + OVERHEAD_S / 3600):.0f}",
                f"{at_once * TRIAL_GB + 4:.0f}", f"{store_gb:.1f}", f"{2 * trials * checkpoint_gb + columns_gb:.0f}",
                f"{trials * STUDY_MB:.1f}", f"{trials * DRIVER_S / (3600 * hours):.1%}",
            ]  # fmt: skip
            print("| " + " | ".join(str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
