"""Make what a wire into retrieval heads begins from, once for all trials, beside the shards.

Each receiver's heads are ranked in a task with a worker's resources. The sums of the closed form
are shared out over such tasks, each of which reads its part of the texts; adding them up gives what
one would have given, to rounding. A file that is there is whole. A receiver that joins an earlier
wire is ranked and regressed alone, for that wire's encoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from latentwire import exports, loading
from latentwire.closed_form import begin, gather, ranking
from latentwire.closed_form.moments import Moments
from latentwire.config import RunConfig
from latentwire.config.wire import LENT
from latentwire.data import calibrations, shards
from latentwire.data.batches import once
from latentwire.distributed.remote import on_cluster, result_of, started
from latentwire.distributed.teachers import ensure_text_reader
from latentwire.model import LatentWire
from latentwire.planning.calibrations import task_bytes
from latentwire.storage import Place, local, place, write_text
from latentwire.threads import use_threads


def ensure_calibrations(run: RunConfig, train: Place, gpus: float = 0.0) -> None:
    """Make what a run begins from, unless it is there. Ray must be initialised to make it.

    Args:
        run: the configuration; where it begins at random, nothing is made.
        train: its complete training shards.
        gpus: GPUs that one task asks for.
    """
    for name, path in calibrations.needed_readers(run, train).items():
        ensure_text_reader(run, f"prefix {name}", name, path, train, gpus)
    missing = [path for path in calibrations.paths(run, train) if not path.exists()]
    if not missing:
        return
    for receiver in run.receivers:
        path, began = calibrations.ranking_path(run, receiver, train), time.monotonic()
        if path in missing:
            write_text(path, on_cluster(run, gpus, rank_heads, run, receiver.name, train))
            print(
                f"heads {receiver.name}: ranked in {time.monotonic() - began:.0f} s, {path}",
                flush=True,
            )
    if run.closed_form is not None and (path := calibrations.moments_path(run, train)) in missing:
        began = time.monotonic()
        moments = gather_on_cluster(run, train, gpus)
        moments.save(path)
        print(
            f"closed form: {moments.count:,} tokens in {time.monotonic() - began:.0f} s, {path}",
            flush=True,
        )


def prepared(
    built: RunConfig, run: RunConfig, train: Place, receivers: Collection[str]
) -> LatentWire:
    """Return a fresh wire in this process, with the prefixes that a run begins with.

    Args:
        built: the run itself, or a part of it.
        run: the run.
        train: its training shards.
        receivers: those whose prefixes are needed.
    """
    use_threads(run.training.cpus_per_worker)
    wire = LatentWire(built)
    begin.begin_prefixes(wire, run, train, receivers)
    return wire


def rank_heads(run: RunConfig, receiver: str, train: Place) -> str:
    """Rank one receiver's heads, and return the JSON of the scores."""
    # Of the others' models none is needed here, nor of other senders'. LENT marks a sender that is
    # this receiver's own model.
    only = tuple(one for one in run.receivers if one.name == receiver)
    encoder = run.encoder.model_copy(update={"senders": (f"{LENT}{receiver}",)})
    alone = run.model_copy(update={"receivers": only, "encoder": encoder})
    wire = prepared(alone, run, train, [receiver])
    builder = wire.builders[receiver]
    column = f"{receiver}_context_ids"
    table = shards.read_table(train, ["context", column])
    rows = first_texts(table, 0, run.adapter.ranking_texts).to_pydict()
    # A context has a row for each of its questions: first_T is where each text stands first.
    _, first_T = once([[text] for text in rows["context"]])
    scores = ranking.rank(
        wire.local_receiver(receiver),
        builder,
        [rows[column][row] for row in first_T],
        lambda recitals: wire.reading(receiver, recitals, None),
        builder.prefix,
    )
    return scores.to_json()


def gather_on_cluster(run: RunConfig, train: Place, gpus: float) -> Moments:
    """Share the pass over texts out over the cluster, and add its sums up in order."""
    import ray

    cluster = ray.cluster_resources()
    if gpus:
        room = cluster.get("GPU", 0.0) / gpus
    else:
        in_memory = cluster.get("memory", math.inf) / task_bytes(run, on_gpu=False)
        room = min(cluster["CPU"] / run.training.cpus_per_worker, in_memory)
    assert run.closed_form is not None, "nobody asked for a closed form"
    # As many parts as run at once, and none without texts.
    parts = max(1, min(int(room), run.closed_form.texts, run.closed_form.gradient_texts))
    tasks = [started(run, gpus, gather_part, run, train, part, parts) for part in range(parts)]
    # In the order of the parts, not of their ends: the last digits of a sum hang on it.
    total: Moments = result_of(tasks[0])
    for reference in tasks[1:]:
        total.merge(result_of(reference))
    return total


def gather_part(run: RunConfig, train: Place, part: int, parts: int) -> Moments:
    """Return the sums over every ``parts``-th text, from number ``part`` on."""
    config, names = run.closed_form, calibrations.fresh(run, "adapters")
    assert config is not None
    wire = prepared(run, run, train, names)
    is_fresh = calibrations.has_fresh_encoder(run)
    for name in names:
        begin.choose_heads(wire, name, train, senders=is_fresh)
    if run.encoder.sender_heads and not is_fresh:
        # The senders' heads are those of the wire that receivers join.
        assert run.training.init_from is not None
        encoder: Any = wire.interlingua.encoder
        with local(place(run.training.init_from) / exports.ENCODER) as file:
            loading.fill(file, encoder)
    moments = gather.empty_moments(wire, names)
    pieces = []
    for name in names:
        pieces += [f"{name}_{piece}_ids" for piece in ("context", "question", "answer")]
    table = shards.read_table(train, ["context", "encoder_ids", *pieces])
    gather.add_tokens(moments, wire, first_texts(table, 0, config.texts, part, parts))
    if is_fresh:
        # Texts behind those of the sums over tokens, so far as there are any.
        further = first_texts(table, config.texts, config.gradient_texts, part, parts)
        gather.add_gradients(moments, wire, further)
    return moments


def first_texts(table: pa.Table, start: int, count: int, part: int = 0, parts: int = 1) -> pa.Table:
    """Return rows of training texts, each text with all its rows.

    Args:
        table: training rows, with their contexts.
        start: texts that are left out before them; where there are no more, it begins again.
        count: texts.
        part: which of some parts of these texts.
        parts: how many parts there are.
    """
    # numbers: which text each row has; first: the row where each text stands first.
    numbers, first = once([[text] for text in table["context"].to_pylist()])
    # Places part, part + parts, … of the texts from start on, round the end to the beginning.
    chosen = {(start + place) % len(first) for place in range(part, min(count, len(first)), parts)}
    rows = [row for row, number in enumerate(numbers) if number in chosen]
    return table.take(pa.array(rows, pa.int64()))
