"""What a wire into retrieval heads begins from: how much of it is missing, and what making it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from latentwire.config import RunConfig
from latentwire.data import calibrations, shards
from latentwire.data.readers import reader_budget, tuned_text
from latentwire.planning.planner import WORKER_BASE_BYTES, Plan, estimates, on_meta
from latentwire.planning.resolved import ResolvedSweep
from latentwire.planning.sharing import BYTES_PER_TOKEN, PROMPT_POSITIONS
from latentwire.planning.variants import calibration_runs
from latentwire.storage import Place

QUESTIONS = 5
"""Questions to a text whose answers' gradients are taken, about: SQuAD has 4.6 to a paragraph."""


@dataclass(frozen=True)
class CalibrationForecast:
    """The calibrations that all trials of a sweep begin from."""

    missing: int
    """Text readers, rankings and moments that are to be made."""
    there: int
    """Those that are there."""
    flop: float | None
    """Floating-point operations of making them; ``None``: training rows are not counted yet."""
    bytes_per_task: int
    """Bytes of the largest task that makes one, or a part of one."""

    def line(self, plan: Plan, rate: float | None, reached: tuple[float, float]) -> str:
        """Describe it for the terminal.

        Args:
            plan: a task has the resources of one of its workers.
            rate: FLOP/s of a worker, where it was measured.
            reached: the lowest and the highest share of it that is reached.
        """
        line = f"calibration: {self.missing} to be made, {self.there} there"
        if self.missing:
            line += (
                f"; a task of {plan.cpus_per_worker:g} CPU, {plan.gpus_per_worker:g} GPU takes about "
                f"{self.bytes_per_task / 1e9:.2f} GB"
            )
        if self.missing and self.flop is not None and rate is not None:
            kind = "GPU" if plan.gpus_per_worker else "CPU"
            devices = plan.gpus_per_worker or plan.cpus_per_worker
            # The lower share of the rate makes for more hours, so it comes first.
            high, low = (devices * self.flop / (share * rate) / 3600 for share in reached)
            line += f", all {low:.2g} to {high:.2g} {kind}-hours ({self.flop / 1e12:.3g} TFLOP)"
        return line


def forecast_calibrations(
    sweep: ResolvedSweep, plan: Plan, rows: int | None
) -> CalibrationForecast | None:
    """Forecast the calibrations of a sweep; ``None`` where its trials begin at random.

    ``rows``: training rows, where they are known.
    """
    multiplied = {receiver.name: receiver.multiplied for receiver in plan.receivers}
    there: dict[str, bool] = {}
    flop: float | None = 0.0
    largest = 0
    for variant in sweep.variants:
        if variant.stage:  # a later stage begins with the wire of the one before
            continue
        for run in calibration_runs(sweep.space, variant.run):
            for name, exists, takes in _parts(run, variant.shards["train"], multiplied, rows):
                # Variants share parts, and each is made once. One of unknown work leaves the sum so.
                if name not in there and not exists:
                    flop = None if flop is None or takes is None else flop + takes
                    largest = max(largest, task_bytes(run, plan.gpus_per_worker > 0))
                there[name] = exists
    missing = sum(not exists for exists in there.values())
    return CalibrationForecast(missing, len(there) - missing, flop, largest) if there else None


def _parts(
    run: RunConfig, train: Place, multiplied: Mapping[str, int], rows: int | None
) -> Iterator[tuple[str, bool, float | None]]:
    """Yield a name of each part of a calibration, whether it is there, and FLOP of making it."""
    known = shards.complete(train)  # before, no hash is
    tokens = run.data.max_context_bytes / BYTES_PER_TOKEN

    def named(what: str, path: Place | None) -> tuple[str, bool]:
        return (f"{what} for {train}", False) if path is None else (str(path), path.exists())

    for name in calibrations.needed_readers_of(run):
        path = calibrations.readers(run, train)[name] / "manifest.json" if known else None
        flop = None
        if rows is not None:
            tuned, questions = tuned_text(run), reader_budget(run, rows).questions
            # A question is read behind the tuned prefix and the text. Per parameter and position:
            # 2 FLOP forward and 2 backward to the inputs, since the receiver is frozen.
            positions = questions * (tuned.tokens + tokens + PROMPT_POSITIONS)
            flop = 4 * multiplied[name] * positions * tuned.trials
        yield *named(f"text reader of {name}", path), flop
    if run.adapter.kind != "heads":
        return
    names = calibrations.fresh(run, "adapters")
    for receiver in run.receivers:
        if receiver.name in names:
            path = calibrations.ranking_path(run, receiver, train) if known else None
            # Each text is read, then recited, 2 FLOP per parameter and position each time.
            flop = 2 * multiplied[receiver.name] * run.adapter.ranking_texts * 2 * tokens
            yield *named(f"heads of {receiver.name}", path), flop
    if run.closed_form is not None and names:
        path = calibrations.moments_path(run, train) if known else None
        what = f"moments at {run.encoder.tokens_per_latent} tokens a latent"
        yield *named(what, path), _moments_flop(run, multiplied, tokens)


def _moments_flop(run: RunConfig, multiplied: Mapping[str, int], tokens: float) -> float:
    """Estimate the pass over texts: what senders and receivers read, gradients, and products."""
    closed_form = run.closed_form
    interlingua: Any = on_meta(run)
    assert closed_form is not None
    sending = 0
    for sender in interlingua.encoder.states.senders:
        sending += sum(weight.numel() for weight in sender.backbone.layers.parameters())
    reading = sum(multiplied[name] for name in calibrations.fresh(run, "adapters"))
    width, entries = _widths(run)
    # Per token: both models forward, x xᵀ [width, width], and x yᵀ [width, entries] per receiver.
    flop = 2 * closed_form.texts * tokens * (sending + reading + width * (width + sum(entries)))
    if calibrations.has_fresh_encoder(run):
        products = sum(size**2 for size in entries)
        # Per token the text and g gᵀ [entries, entries]; per question a pass forward and back.
        answered = QUESTIONS * PROMPT_POSITIONS * 4 * reading
        flop += closed_form.gradient_texts * (tokens * 2 * (reading + products) + answered)
    return flop


def task_bytes(run: RunConfig, on_gpu: bool) -> int:
    """Estimate the memory of one task of a calibration: all models, one's step, and the sums."""
    receivers, encoder = estimates(run, on_gpu, files=False), on_meta(run).encoder
    models = sum(receiver.bytes_weights for receiver in receivers)
    step = max(receiver.bytes_step for receiver in receivers)
    states: Any = getattr(encoder, "states", None)  # a text reader has none
    if run.encoder.kind == "senders" and states is not None:
        # Weights of receivers that also send are counted above already; the others are fp32.
        encoder_weights = sum(weight.numel() for weight in states.parameters())
        models += 4 * (encoder_weights - states.lent_parameters)
    sums = 0
    if run.closed_form is not None:
        width, entries = _widths(run)
        # In float64: x xᵀ once, and for each receiver x yᵀ [width, size] and g gᵀ [size, size].
        sums = 8 * (width**2 + sum(size * (width + size) for size in entries))
    return int(models + step + sums + WORKER_BASE_BYTES)


def _widths(run: RunConfig) -> tuple[int, list[int]]:
    """Return the width of the senders' states, and of the targets of each receiver that begins."""
    interlingua: Any = on_meta(run)
    names = calibrations.fresh(run, "adapters")
    entries = [interlingua.adapters[name].linear.out_features for name in names]
    return interlingua.encoder.states.width, entries
