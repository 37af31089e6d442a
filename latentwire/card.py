"""The model card of an export, written from its manifest and configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from latentwire.config import RunConfig

MODES = {
    "text": "the full text",
    "latent": "**the message**",
    "embeddings": "the text's token embeddings, by the message's way",
    "truncated": "the text cut to as many positions",
    "window": "as many tokens from anywhere in the text",
    "selected": "as many tokens, the most surprising ones",
    "own_cache": "its own cache of the full text, cut to as much",
    "own_heads": "its own keys and values of the full text, in the message's heads",
    "shuffled": "another row's message",
    "closed_book": "nothing",
}
UNTUNED_TEXT = (
    "In rows that are not called tuned the receivers read text as they come, with the examples of "
    "their prompts; they were not trained to answer from it as the wire was. Behind a few trained "
    "vectors a receiver can read the same text much better."
)
"""A note on rows in which an untuned receiver reads text."""
TUNED_ROWS = (
    "In rows that are called tuned the frozen receiver reads text behind a few vectors that were "
    "trained on the wire's own training rows."
)
"""A note on rows in which a tuned receiver reads text."""
TUNED_TEXT, UNTUNED_KEY = "text tuned", "text"
"""Keys of the rows that read the full text, behind trained vectors and without."""
FROZEN = "The receivers are **frozen**: not one of their weights changes."
NOT_FROZEN = "The receivers are **not frozen**: low-rank updates of their weights act while they read a message."
LICENCE = (
    "LatentWire's code is Apache-2.0. These weights were trained through the receivers above and "
    "on the data above, and each of those has its own licence, which may bind what is derived from "
    "it: look there before you pass them on."
)
COLUMNS = {
    "em": "EM",
    "f1": "F1",
    "match": "match",
    "nll": "NLL",
    "positions": "positions",
    "bytes": "bytes",
    "rows": "rows",
    "contexts": "contexts",
}
AGAINST_TEXT = {
    "retention_em": "retention EM",
    "retention_f1": "retention F1",
    "retention_match": "retention match",
    "resilience_tuned_text": "resilience of tuned text",
    "boost_tuned_text": "boost over tuned text",
    "resilience_untuned_text": "resilience of untuned text",
    "boost_untuned_text": "boost over untuned text",
}
"""Metric against full text → its column."""
USAGE = """```python
from latentwire import LatentWire

wire = LatentWire.from_pretrained("path/to/export")  # this directory, or its Hub id
packet = wire.encode([context]).to_bytes(bits=8)
answers = wire.answer(packet, [question], receiver="{receiver}")
```"""


def write(run: RunConfig, manifest: dict[str, Any]) -> str:
    """Return the ``README.md`` of an export: receivers, data, scores beside baselines, use."""
    tags = ["latentwire", "soft-prompt", "context-compression"]
    data = ModelCardData(library_name="latentwire", tags=tags, language=None)
    names = [receiver.name for receiver in run.receivers]
    if run.is_reader:
        data = ModelCardData(library_name="latentwire", tags=["latentwire", "soft-prompt"])
        return "\n\n".join([f"---\n{data.to_yaml()}\n---", *_reader(run, manifest)]) + "\n"
    answer = "answer" if len(names) > 1 else "answers"
    size = _message_size(run)
    becomes = "a soft prompt"
    if run.adapter.kind == "heads":
        becomes = "keys and values in the few heads that read a context"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        "# A LatentWire",
        f"An encoder compresses a text into one message of latent vectors; an adapter per receiver "
        f"turns it into {becomes}, and {_listed(names)} {answer} from it. The encoder is of "
        f"kind `{run.encoder.kind}`; a message has {size} of width {run.encoder.d_z}. Encoder and "
        f"adapters are in this directory, as safetensors; no weight of a receiver is.",
        f"Encoder id: `{manifest['encoder_id']}`. Packets of another encoder are refused.",
        "## Receivers",
        FROZEN if manifest["receivers_frozen"] else NOT_FROZEN,
        _receivers(run, manifest),
        "## Data",
        f"{run.data.source.description}. {_rows(run)} The encoder reads the {_sent(run)}.",
        "## Scores",
        _scores(manifest["metrics"], set(names)),
        "## Use",
        USAGE.format(receiver=run.receivers[0].name),
        "## Licence",
        LICENCE,
        "## How it was made",
        _origin(run, manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _reader(run: RunConfig, manifest: dict[str, Any]) -> list[str]:
    """Return the sections of a text reader's card."""
    assert run.prefix is not None
    reads = {"text": "whole texts", "closed_book": "questions without a text"}
    what = reads.get(run.prompt.reads, f"texts cut to a message's length ({run.prompt.reads})")
    return [
        "# A text reader",
        f"{run.prefix.tokens} trained vectors stand before the prompt of "
        f"{_listed([receiver.name for receiver in run.receivers])}, which reads {what}. Wires are "
        f"compared with it: they answer from a message, it answers from text, after the same "
        f"training.",
        "## Receivers",
        FROZEN,
        _receivers(run, manifest),
        "## Data",
        f"{run.data.source.description}. {_rows(run)}",
        "## Licence",
        LICENCE,
        "## How it was made",
        _origin(run, manifest),
    ]


def full_text(keys: Iterable[str]) -> str | None:
    """Return which key is the full text that others are measured against: tuned where it can be."""
    present = set(keys)
    return next((key for key in (TUNED_TEXT, UNTUNED_KEY) if key in present), None)


def against_text_columns(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return the metrics against full text that any row of a table has."""
    scored = _scored(scores)
    return [name for name in AGAINST_TEXT if name in scored]


def _scored(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> set[str]:
    """Return the names of all metrics that a table has somewhere."""
    names: set[str] = set()
    for rows in scores.values():
        for row in rows.values():
            names |= row.keys()
    return names


def retention_note(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a sentence that says what retention is against, or why there is none.

    ``scores``: condition's key → receiver → metrics. Ratios that have no value are explained too.
    """
    yardstick = full_text(scores)
    if yardstick is None:
        return "no retention: no row of the table reads the full text"
    note = "no retention: the text was read untuned; evaluation.tuned_text trains a reader for it"
    if yardstick == TUNED_TEXT:
        note = "retention is a score over that of full text, tuned, on the same rows"
        if better := _better_untuned(scores):
            note += (
                f"; here it flatters, since the full text is read better untuned by {', '.join(better)}; spend more on "
                f"evaluation.tuned_text"
            )
    # Metrics against this table's yardstick: "…untuned_text" where it is untuned, else the rest.
    expected = {name for name in AGAINST_TEXT if ("untuned" in name) == (yardstick != TUNED_TEXT)}
    others: list[Mapping[str, float]] = []
    for key, rows in scores.items():
        if key != yardstick:
            others += rows.values()
    lacks_some = any(expected - row.keys() for row in others)
    # Results of an earlier version have none of them, and nothing is left out.
    if against_text_columns(scores) and lacks_some:
        note += "; shares of full text whose divisor is 0 are left out"
    return note


def _better_untuned(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return the receivers whose F1 on full text is higher as they are than tuned."""
    tuned, untuned = scores[TUNED_TEXT], scores.get(UNTUNED_KEY, {})
    names = []
    for name, row in untuned.items():
        if name != "mean" and name in tuned and row["f1"] > tuned[name]["f1"]:
            names.append(name)
    return names


def text_notes(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Say how receivers read the texts of a table, and what retention is against."""
    note = retention_note(scores)
    sentences = [f"{note[0].upper()}{note[1:]}.", UNTUNED_TEXT]
    if any(key.endswith(" tuned") for key in scores):
        sentences.append(TUNED_ROWS)
    return " ".join(sentences)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _message_size(run: RunConfig) -> str:
    encoder = run.encoder
    if encoder.tokens_per_latent is not None:
        return f"one latent for every {encoder.tokens_per_latent} of its tokens,"
    parts = "a line" if encoder.split == "lines" else "a text"
    private = (
        f" and {encoder.private_len} more for each receiver alone" if encoder.private_len else ""
    )
    return f"{encoder.latent_len} latents {parts}{private},"


def _receivers(run: RunConfig, manifest: dict[str, Any]) -> str:
    hashes = manifest["pins"].get("receivers", {})
    lines = ["| name | model | revision | SHA-256 of its weights |", "|---|---|---|---|"]
    for receiver in run.receivers:
        sha256 = f"`{hashes[receiver.name]}`" if receiver.name in hashes else "not recorded"
        model, revision = _model(receiver.model), receiver.revision or "–"
        lines.append(f"| {receiver.name} | {model} | {revision} | {sha256} |")
    return "\n".join(lines)


def _model(address: str) -> str:
    """Show a Hub id, or the last name of a directory of its trainer's."""
    local = address.startswith((".", "/"))
    return f"a directory `{address.rpartition('/')[2]}`" if local else f"`{address}`"


def _rows(run: RunConfig) -> str:
    samples = run.data.samples
    return f"At most {samples:,} training rows." if samples else "All training rows."


def _sent(run: RunConfig) -> str:
    if run.data.send == "context":
        return "context alone; the question goes to the receiver"
    return "context and question"


def _scores(metrics: dict[str, Any], receivers: set[str]) -> str:
    validation = metrics.get("validation") or {}
    if not validation:
        return "None: this wire was not scored on questions."
    scored = _scored(validation)
    columns = COLUMNS | AGAINST_TEXT
    present = [name for name in columns if name in scored]
    resampled = "contexts" if "contexts" in present else "rows"
    lines = [
        f"On validation rows: {_readings(metrics.get('readings'))}. In brackets 95 % bootstrap "
        f"intervals over {resampled}; match: a gold answer occurs in what was said; NLL in nats "
        f"per token of the gold answer; bytes of text or of the message as fp16.",
        "",
        f"| the receiver reads | receiver | {' | '.join(columns[name] for name in present)} |",
        f"|{'---|' * (2 + len(present))}",
    ]
    # A condition's key: its mode, then a budget, a width and "tuned" where it has them.
    for key, rows in validation.items():
        mode, _, rest = key.removesuffix(" tuned").partition(" ")
        tuned = ", tuned" if key.endswith(" tuned") else ""
        read = f"{MODES[mode]} {rest}".strip() + tuned
        for receiver, row in rows.items():
            if receiver in receivers:
                cells = " | ".join(_cell(row, name) for name in present)
                lines.append(f"| {read} | {receiver} | {cells} |")
    return "\n".join([*lines, "", text_notes(validation)])


def _readings(readings: dict[str, Any] | None) -> str:
    """Say how often the rows were read before this wire was scored on them."""
    if not readings:
        return "how often they were read before this scoring is not recorded"
    if not readings["wires"]:
        return "no other wire was scored on them before"
    return (
        f"{readings['read_before']:,} of {readings['rows']:,} had been read before, in "
        f"{readings['scorings']:,} scorings, by {readings['wires']:,} other wires"
    )


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "–"
    # Shares are shown in percent.
    if name in ("em", "f1", "match", *AGAINST_TEXT):
        value = f"{100 * row[name]:.1f}"
        return f"{value} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"
    return f"{row[name]:.3g}" if name == "nll" else f"{row[name]:.0f}"


def _origin(run: RunConfig, manifest: dict[str, Any]) -> str:
    step = manifest["metrics"].get("development", manifest["metrics"]).get("step")
    total = sum(manifest["parameters"].values())
    counts = []
    for name, count in manifest["parameters"].items():
        counts.append(f"{name.removesuffix('.safetensors')} {count:,}")
    parts = ", ".join(counts)
    lines = [
        f"- {total:,} trained parameters ({parts})"
        + (f", {step:,} steps of {run.training.size_of_batch}" if step else ""),
        f"- seed {run.training.seed}; the whole configuration is in `config.json`",
        "- " + ", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
        "- `manifest.json` has the hash of every file; a directory that does not fit it is refused",
    ]
    if run.training.train_only:
        lines.insert(
            1, f"- only {_listed(list(run.training.train_only))} trained; the rest stayed as it was"
        )
    return "\n".join(lines)
