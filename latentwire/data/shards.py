"""Rows to Parquet shards with Ray Data, once for all trials.

Shards live under ``<shard_dir>/<dataset>-<split>-<hash>``, where the hash covers everything that made them: source,
splits, tokenisers, prompt and layout version. A directory with a ``manifest.json`` is complete; work in progress has
another name and is never read. Rows that cannot be used are kept in ``rejects.jsonl`` with their reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentwire.config import RunConfig
from latentwire.data import sources
from latentwire.data.layout import LAYOUT_VERSION, SequenceBuilder, sender_text
from latentwire.models.lm import load_tokenizer
from latentwire.models.tokens import truncate_utf8

SHARD_VERSION = 1
ShardSplit = Literal["train", "dev", "validation"]
SPLITS: tuple[ShardSplit, ...] = ("train", "dev", "validation")

SHARD_KNOBS = ("data.", "prompt.")
"""Parts of the configuration that shards depend on; a search may vary them only by enumerable choices."""


def shard_key(run: RunConfig, split: ShardSplit) -> tuple[str, dict[str, Any]]:
    """The hash that names a split's shards, and what went into it. Tokenizers are loaded, weights are not."""
    data = run.data.model_dump(exclude={"shard_dir", "data_dir"})
    # A split is not made anew because another split's size changes.
    sizes = {"train": "samples", "dev": "dev_samples", "validation": "validation_samples"}
    data = {name: value for name, value in data.items() if name == sizes[split] or name not in sizes.values()}
    if run.data.dataset == "toy":  # the generator's length follows from the samples asked for
        data["samples"] = run.data.samples if split != "validation" else None
    spec = {
        "shard_version": SHARD_VERSION,
        "layout_version": LAYOUT_VERSION,
        "split": split,
        "source": sources.fingerprint(run.data, "validation" if split == "validation" else "train"),
        "data": data,
        "prompt": run.prompt.model_dump(),
        "receivers": {
            receiver.name: {
                "template": receiver.template,
                "bos": receiver.bos,
                "instruction": receiver.instruction,
                "tokenizer": tokenizer_hash(load_tokenizer(receiver)),
            }
            for receiver in run.receivers
        },
    }
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16], spec


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a fast tokenizer's full definition and chat template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_path(run: RunConfig, split: ShardSplit) -> Path:
    """Where a split's shards are, or will be."""
    return Path(run.data.shard_dir).absolute() / f"{run.data.dataset}-{split}-{shard_key(run, split)[0]}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of complete shards. Raises :class:`~latentwire.data.sources.DataError` where there is none."""
    file = path / "manifest.json"
    if not file.exists():
        raise sources.DataError(
            f"shards must be complete (with a manifest.json), {path} is not; run ray_jobs/preprocess.py"
        )
    return json.loads(file.read_text())


def read_table(path: Path) -> pa.Table:
    """All rows of complete shards, in the order they were written."""
    manifest = read_manifest(path)
    return pa.concat_tables([pq.read_table(path / name) for name in manifest["files"]])


def ensure_shards(run: RunConfig, split: ShardSplit) -> Path:
    """Make a split's shards unless complete ones are there; returns their directory. Needs Ray initialised to make them.

    Raises :class:`~latentwire.data.sources.DataError` for a source that cannot be read or leaves no row.
    """
    path = shard_path(run, split)
    if (path / "manifest.json").exists():
        manifest = read_manifest(path)
        print(f"shards {split}: {manifest['rows']:,} rows, reused from {path}", flush=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.part-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    aside.mkdir()
    try:
        manifest = _make(run, split, aside)
        try:
            aside.rename(path)
        except OSError:
            if not (path / "manifest.json").exists():
                raise
            # Another process finished the same shards first: equal by hash, so theirs serve.
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    rejected = ", ".join(f"{count:,} × {reason}" for reason, count in manifest["rejects"].items())
    print(f"shards {split}: {manifest['rows']:,} rows ({manifest['truncated']:,} truncated), "
          f"{sum(manifest['rejects'].values()):,} rejected "
          f"({rejected or 'none'}; see rejects.jsonl), {path}", flush=True)  # fmt: skip
    return path


def quiet_ray_data() -> None:
    """Keep rows in order, and progress bars to terminals: in a log file they are a page a second."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _make(run: RunConfig, split: ShardSplit, aside: Path) -> dict[str, Any]:
    import ray.data

    key, spec = shard_key(run, split)
    source: sources.Split = "validation" if split == "validation" else "train"
    quiet_ray_data()
    raw = ray.data.from_items([{"piece": piece} for piece in sources.pieces(run.data, source)])
    cleaned = (
        raw.flat_map(functools.partial(_read_and_clean, run=run, split=source))
        .filter(functools.partial(_belongs, run=run, split=split))
        .materialize()
    )
    rejects, _, _ = _sort_out(cleaned)
    wanted = {"train": run.data.samples, "dev": run.data.dev_samples, "validation": run.data.validation_samples}[split]
    good = cleaned.filter(lambda row: not row["reason"]).sort("order")
    if wanted:
        good = good.limit(wanted)
    tokenised = good.map_batches(
        functools.partial(_tokenise, run=run), batch_format="pyarrow", batch_size=512
    ).materialize()
    merged, rows, truncated = _sort_out(tokenised)
    rejects += merged
    kept = tokenised.filter(lambda row: not row["reason"]).drop_columns(["reason", "order", "truncated"])
    reasons = Counter(row["reason"].split(":")[0] for row in rejects)
    if rows == 0:
        found = "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "the source is empty"
        raise sources.DataError(f"{run.data.dataset} {split} must leave at least one row, got none ({found})")
    kept.repartition(-(-rows // run.data.shard_rows)).write_parquet(str(aside), min_rows_per_file=run.data.shard_rows)
    with (aside / "rejects.jsonl").open("w", encoding="utf-8") as stream:
        for row in rejects:
            stream.write(json.dumps({"reason": row["reason"], "id": row["id"], "row": row["context"][:500]}) + "\n")
    files = sorted(file.name for file in aside.glob("*.parquet"))
    manifest = {
        "key": key,
        "rows": rows,
        "truncated": truncated,
        "rejects": dict(reasons.most_common()),
        "files": files,
        "spec": spec,
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


def _sort_out(dataset: Any) -> tuple[list[dict[str, Any]], int, int]:
    """Rejected rows, and how many are good and how many of these are cut, of a materialised dataset.

    Read block by block here: each further Ray Data execution costs seconds on a small machine.
    """
    rejects, rows, truncated = [], 0, 0
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        good = pc.equal(table["reason"], "")
        rows += pc.sum(good).as_py() or 0
        truncated += pc.sum(pc.and_(good, table["truncated"])).as_py() or 0
        rejects += table.filter(pc.invert(good)).select(["reason", "id", "context"]).to_pylist()
    return rejects, rows, truncated


def _read_and_clean(item: dict[str, str], run: RunConfig, split: sources.Split) -> Iterator[dict[str, Any]]:
    """Common columns, or a reason. ``order`` is a seeded hash of the row: sorting by it shuffles and samples at once."""
    data = run.data
    seen: set[str] = set()
    for number, raw in enumerate(sources.read(data, split, item["piece"])):
        row: dict[str, Any] = {
            "reason": "",
            "truncated": False,
            "order": _hash(f"{data.seed} {number} {item['piece']}"),
        }
        try:
            row |= sources.clean(raw, data.dataset)
            if data.dataset == "text":
                if row["id"] in seen:
                    continue  # SQuAD asks several questions about one paragraph: its text is one row all the same
                seen.add(row["id"])
            text = sender_text(data.send, row["context"], row["question"])
            size = len(text.encode())
            if size > data.max_context_bytes:
                if data.overflow == "reject":
                    raise sources.RowError(f"sender text must be ≤ {data.max_context_bytes} bytes: got {size}")
                spare = data.max_context_bytes - (size - len(row["context"].encode()))
                if spare < 1:
                    raise sources.RowError(f"question must fit {data.max_context_bytes} bytes: got {size}")
                row |= {"context": truncate_utf8(row["context"], spare), "truncated": True}
        except sources.RowError as error:
            row |= {"id": f"row {number}", "document": "", "question": "", "answers": []}
            row |= {"context": raw[:500].decode("utf-8", "replace"), "reason": str(error)}
        yield row


def _belongs(row: dict[str, Any], run: RunConfig, split: ShardSplit) -> bool:
    """Development rows are those of the documents whose seeded hash falls under ``dev_fraction``."""
    if split == "validation":
        return True
    if row["reason"]:  # a rejected row of the training source is reported with train
        return split == "train"
    share = int(_hash(f"dev {run.data.seed} {row['document']}")[:12], 16) / 16**12
    return (share < run.data.dev_fraction) == (split == "dev")


def _tokenise(table: pa.Table, run: RunConfig) -> pa.Table:
    """Adds each receiver's ids of context, question and first gold answer."""
    columns = table.to_pydict()
    answers = [golds[0] if golds else "" for golds in columns["answers"]]
    for receiver in run.receivers:
        builder = _builder(run.model_dump_json(), receiver.name)
        ids = builder.tokenize(columns["context"], columns["question"], answers)
        good = builder.check_boundaries(answers, ids["answer_ids"])
        columns["reason"] = [
            reason
            or ("" if fits or not golds else f"anchor and answer must not merge into one token for {receiver.name}")
            for reason, fits, golds in zip(columns["reason"], good, columns["answers"], strict=True)
        ]
        for name, values in ids.items():
            table = table.append_column(f"{receiver.name}_{name}", pa.array(values, pa.list_(pa.int32())))
    return table.set_column(table.column_names.index("reason"), "reason", pa.array(columns["reason"], pa.string()))


@functools.lru_cache(maxsize=8)
def _builder(run_json: str, name: str) -> SequenceBuilder:
    return builders(RunConfig.model_validate_json(run_json))[name]


def builders(run: RunConfig) -> dict[str, SequenceBuilder]:
    """A sequence builder per receiver; loads tokenizers only."""
    return {
        receiver.name: SequenceBuilder(load_tokenizer(receiver), receiver, run.prompt, run.data.send)
        for receiver in run.receivers
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
