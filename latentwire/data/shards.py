"""Shards: rows ready for training and evaluation, in Parquet files that all trials share.

They live under ``<shard_dir>/<dataset>-<split>-<hash>``, on disk or in an object store. The hash covers everything that
made them: source, splits, tokenisers, prompt and layout version. A directory with a ``manifest.json`` is complete; the
manifest is written last, and nothing reads a directory without one. :mod:`latentwire.data.pipeline` makes what is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from latentwire.config import DataConfig, ReceiverConfig, RunConfig
from latentwire.config.knobs import paths_with
from latentwire.data import sources
from latentwire.models.encoders import encoder_sources
from latentwire.pretrained.weights import load_tokenizer, text_files
from latentwire.prompts.sequences import PROMPT_VERSION, PromptBuilder
from latentwire.prompts.templates import rendered
from latentwire.storage import Place, place, read_parquet

SHARD_VERSION = 3
"""Version of the code that reads rows of files; one more wherever the same files give other rows. A dataset whose
rows alone changed has its own, ``Dataset.version``."""
ShardSplit = Literal["train", "dev", "validation"]
SPLITS: tuple[ShardSplit, ...] = ("train", "dev", "validation")

MANIFEST = "manifest.json"


def source_of(split: ShardSplit) -> sources.Split:
    """Return the split of the source that holds a split's rows: ``dev`` is a part of the training rows."""
    return "validation" if split == "validation" else "train"


def shard_key(run: RunConfig, split: ShardSplit) -> tuple[str, dict[str, Any]]:
    """Return the hash that names a split's shards, and what went into it. Tokenizers are loaded, weights are not."""
    data = run.data.model_dump(include=set(paths_with("shards", "value", DataConfig)))
    # A split is not made anew because another split's size changes.
    sizes = {"train": "samples", "dev": "dev_samples", "validation": "validation_samples"}
    other_sizes = set(sizes.values()) - {sizes[split]}
    data = {name: value for name, value in data.items() if name not in other_sizes}
    if split != "validation" or not run.data.validation_skip:
        del data["validation_skip"]  # shards are older than this knob, and keep their names
    if data["distractors"] is None:
        del data["distractors"]  # likewise
    if data["unanswerable"] is None:
        del data["unanswerable"], data["no_answer"]  # likewise
    if split == "validation":
        del data["dev_fraction"], data["toy_questions"]  # knobs of training rows alone
    if run.data.source.generate is not None:  # its length follows from the samples asked for
        data["samples"] = run.data.samples if split != "validation" else None
    # All that a row's columns depend on; json.dumps makes one text of it, whatever the order.
    spec = {
        "shard_version": run.data.source.version or SHARD_VERSION,
        "layout_version": PROMPT_VERSION,
        "split": split,
        "source": sources.fingerprint(run.data, source_of(split)),
        "data": data,
        "prompt": run.prompt.model_dump(),
        "receivers": {receiver.name: _reads(receiver) for receiver in run.receivers},
    }
    if split == "train":
        spec["together"] = run.training.questions_together
        if sources_of_encoder := encoder_sources(run.encoder, run.receivers):
            # Of several senders the first is the ruler, whose tokens a message's length follows.
            ruler, *others = (_text_side(source)[0] for source in sources_of_encoder)
            encoder: dict[str, Any] = {"tokenizer": ruler, "split": run.encoder.split}
            if others:
                encoder["others"] = others
            spec["encoder"] = encoder
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16], spec


def _reads(receiver: ReceiverConfig) -> dict[str, Any]:
    """Return what a receiver's columns hang on besides the rows."""
    reads = receiver.model_dump(include=set(paths_with("shards", "value", ReceiverConfig)))
    reads["tokenizer"], text = _text_side(receiver)
    if text is not None:
        reads["rendered"] = text
    return reads


def _text_side(source: ReceiverConfig) -> tuple[str, list[str] | None]:
    """Return the hash of a model's tokenizer, and what its chat template writes around a prompt."""
    return _loaded_text_side(source.model_dump_json(), text_files(source))


@functools.lru_cache(maxsize=64)
def _loaded_text_side(source_json: str, _files: tuple) -> tuple[str, list[str] | None]:
    """Load a tokenizer for :func:`_text_side`, once while its files stay as they are.

    Paths of shards are asked for dozens of times, and a large vocabulary takes a second to load.
    """
    # As JSON, since the cache needs keys that hash; ``_files`` is there to be part of the key.
    source = ReceiverConfig.model_validate_json(source_json)
    tokenizer = load_tokenizer(source)
    return tokenizer_hash(tokenizer), rendered(tokenizer, source)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a fast tokenizer's full definition and chat template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_path(run: RunConfig, split: ShardSplit) -> Place:
    """Return the directory of a split's shards, whether they are there or not."""
    return (
        place(run.data.shard_dir).absolute()
        / f"{run.data.dataset}-{split}-{shard_key(run, split)[0]}"
    )


def shard_paths(run: RunConfig, splits: Sequence[ShardSplit] = SPLITS) -> dict[ShardSplit, Place]:
    """Return split → the directory of its shards, whether they are there or not."""
    return {split: shard_path(run, split) for split in splits}


def read_manifest(path: Place) -> dict[str, Any]:
    """Read the manifest of complete shards. Raises :class:`~latentwire.data.sources.DataError` where there is none."""
    file = path / MANIFEST
    if not file.exists():
        raise sources.DataError(
            f"shards must be complete (with a manifest.json), {path} is not; make them by `latentwire preprocess`"
        )
    return json.loads(file.read_text())


def complete(path: Place) -> bool:
    """Return whether all shards of this directory are there."""
    return (path / MANIFEST).exists()


def read_table(path: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of complete shards, in the order they were written. ``columns``: ``None`` for all."""
    names = read_manifest(path)["files"]
    return pa.concat_tables([read_parquet(path / name, columns) for name in names])


def builders(run: RunConfig) -> dict[str, PromptBuilder]:
    """Return a sequence builder per receiver; loads tokenizers only."""
    by_name = {}
    for receiver in run.receivers:
        tokenizer = load_tokenizer(receiver)
        by_name[receiver.name] = PromptBuilder(tokenizer, receiver, run.prompt, run.data.send)
    return by_name
