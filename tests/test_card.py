"""What a model card says, from a manifest that holds a different figure wherever one could be taken for another."""

from typing import Any

import pytest

from latentwire import card
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation.baselines import MODE_NAMES


def scores(first: float) -> dict[str, Any]:
    """Scores that all differ, and differ from those of another ``first``."""
    names = (
        *("em_low", "em", "em_high", "f1_low", "f1", "f1_high"),
        *("match_low", "match", "match_high"),
    )
    row: dict[str, Any] = {name: first + 0.01 * place for place, name in enumerate(names)}
    return row | {"nll": 10 * first, "positions": 31.0, "bytes": 77.0, "rows": 48, "contexts": 19}


def manifest(**values: Any) -> dict[str, Any]:
    return {
        "receivers_frozen": True,
        "encoder_id": "abc123",
        "pins": {"receivers": {"llama": "hash-of-llama", "qwen": "hash-of-qwen"}},
        "parameters": {"interlingua.safetensors": 1_000, "adapters/llama.safetensors": 200, "adapters/qwen.safetensors": 30},
        "packages": {"latentwire": "1.2", "torch": "3.4"},
        "metrics": {
            "development": {"step": 1_234},
            "validation": {
                "text": {"llama": scores(0.1), "qwen": scores(0.2), "phi": scores(0.3), "mean": scores(0.4)},
                "latent as int8": {"llama": scores(0.5), "qwen": scores(0.6), "mean": scores(0.7)},
            },
            "readings": {"rows": 48, "read_before": 20, "scorings": 3, "wires": 2, "again": False, "trained_on": 0},
        },
    } | values  # fmt: skip


def line(text: str, *words: str) -> str:
    """The one line of a card that has these words."""
    (found,) = [one for one in text.splitlines() if all(word in one for word in words)]
    return found


def test_scores_are_those_of_their_row_and_receiver() -> None:
    text = card.write(RunConfig(), manifest())
    header = "| the receiver reads | receiver | EM | F1 | match | NLL | positions | bytes | rows | contexts |"
    assert line(text, "| the receiver reads") == header
    for read, receiver, first in (
        ("the full text", "llama", 0.1), ("the full text", "qwen", 0.2), ("**the message** as int8", "llama", 0.5),
        ("**the message** as int8", "qwen", 0.6),
    ):  # fmt: skip
        low = 100 * first
        shown = " | ".join(
            f"{low + place + 1:.1f} [{low + place:.1f}, {low + place + 2:.1f}]"
            for place in (0, 3, 6)
        )
        assert line(text, f"| {read} | {receiver} |") == (
            f"| {read} | {receiver} | {shown} | {10 * first:.3g} | 31 | 77 | 48 | 19 |"
        )
    assert (
        "phi" not in text and "| mean |" not in text
    )  # a receiver that stayed away, and no receiver at all
    assert card.UNTUNED_TEXT in text
    assert (
        "20 of 48 had been read before, in 3 scorings, by 2 other wires" in text
        and "intervals over contexts" in text
    )


def test_a_card_without_a_tuned_reader_has_no_retention_and_says_why() -> None:
    text = card.write(RunConfig(), manifest())
    why = "No retention: the text was read untuned; evaluation.tuned_text trains a reader for it. "
    assert why in text and "retention EM" not in text and card.TUNED_ROWS not in text


def test_a_card_shows_retention_against_tuned_full_text() -> None:
    share = {"retention_em": 0.5, "retention_em_low": 0.4, "retention_em_high": 0.6}
    validation = {
        "text": {"llama": scores(0.1) | share},
        "text tuned": {"llama": scores(0.2)},
        "latent": {"llama": scores(0.3)},
    }
    text = card.write(RunConfig(), manifest(metrics={"validation": validation}))
    assert line(text, "| the receiver reads").endswith(" contexts | retention EM |")
    assert line(text, "| the full text | llama").endswith("| 50.0 [40.0, 60.0] |")
    assert line(text, "| the full text, tuned | llama").endswith("| – |")
    assert card.TUNED_ROWS in text and "No retention" not in text
    said = (
        "Retention is a score over that of full text, tuned, on the same rows; shares of full text"
    )
    assert f"{said} whose divisor is 0 are left out. " in text  # the latents' own is


def test_a_tuned_reader_that_reads_worse_than_an_untuned_one_is_named() -> None:
    table = {"text": {"llama": scores(0.1), "qwen": scores(0.3), "mean": scores(0.2)}}
    tuned = {"llama": scores(0.2), "qwen": scores(0.2), "mean": scores(0.1)}
    note = card.retention_note(table | {"text tuned": tuned})
    assert note.endswith("better untuned by qwen; spend more on evaluation.tuned_text")
    assert "flatters" not in card.retention_note({"text": tuned, "text tuned": tuned})
    assert "flatters" not in card.retention_note({"text tuned": tuned})


def test_shares_without_a_divisor_are_told_even_where_no_row_has_them() -> None:
    undefined = "; shares of full text whose divisor is 0 are left out"
    shares: dict[str, Any] = dict.fromkeys(card.AGAINST_TEXT, 0.5)
    untuned = {name: share for name, share in shares.items() if "untuned" in name}
    tuned = {name: share for name, share in shares.items() if "untuned" not in name}

    def note(key: str, row: dict[str, Any]) -> str:
        return card.retention_note({key: {"llama": scores(0.1)}, "latent": {"llama": row}})

    assert undefined not in note("text tuned", tuned) and undefined not in note("text", untuned)
    assert undefined not in note("text", scores(0.2))  # of an earlier version
    del tuned["boost_tuned_text"], untuned["resilience_untuned_text"]
    assert note("text tuned", tuned).endswith(undefined)
    assert note("text", untuned).endswith(undefined)
    assert "no row of the table reads the full text" in card.retention_note(
        {"latent": {"llama": scores(0.1)}}
    )


def test_every_mode_says_what_is_read() -> None:
    assert card.MODES.keys() == MODE_NAMES.keys()
    assert len(set(card.MODES.values())) == len(card.MODES)
    for mode, words in {
        "text": "full text", "latent": "the message", "embeddings": "embeddings", "truncated": "cut to as many",
        "window": "from anywhere", "selected": "most surprising", "shuffled": "another row", "closed_book": "nothing",
    }.items():  # fmt: skip
        assert words in card.MODES[mode]  # type: ignore[index]


def test_a_card_tells_receivers_data_and_how_it_was_made() -> None:
    text = card.write(RunConfig(), manifest())
    assert (
        "| llama | `toy-llama` | – | `hash-of-llama` |" in text
        and "| qwen | `toy-qwen` | – | `hash-of-qwen` |" in text
    )
    assert (
        "- 1,230 trained parameters (interlingua 1,000, adapters/llama 200, adapters/qwen 30), 1,234 steps of"
        in text
    )
    assert (
        "latentwire 1.2, torch 3.4" in text
        and "Encoder id: `abc123`" in text
        and "llama and qwen answer from it" in text
    )
    assert (
        "At most 20,000 training rows. The encoder reads the context alone" in text
        and "synthetic reading task" in text
    )
    assert "The receivers are **frozen**" in text and "not frozen" not in text
    assert (
        f"a message has {RunConfig().encoder.latent_len} latents a text, of width {RunConfig().encoder.d_z}"
        in text
    )
    other = {
        "data.samples": 0, "data.send": "prompt", "encoder.tokens_per_latent": 4, "encoder.latent_len": 64,
        "receivers.0.revision": "v9", "training.seed": 7,
    }  # fmt: skip
    changed = card.write(with_values(RunConfig(), other), manifest(receivers_frozen=False, pins={}))
    assert (
        "All training rows. The encoder reads the context and question." in changed
        and "- seed 7;" in changed
    )
    assert (
        "one latent for every 4 of its tokens, of width" in changed and "**not frozen**" in changed
    )
    assert "| llama | `toy-llama` | v9 | not recorded |" in changed
    lines = with_values(RunConfig(), {"encoder.split": "lines", "encoder.latent_len": 5})
    assert "5 latents a line, of width" in card.write(lines, manifest())
    parts = {"encoder.private_len": 2, "encoder.latent_len": 5}
    assert "5 latents a text and 2 more for each receiver alone, of" in card.write(
        with_values(RunConfig(), parts), manifest()
    )


@pytest.mark.parametrize(
    ("readings", "told"),
    [
        (None, "how often they were read before this scoring is not recorded"),
        (
            {"rows": 9, "read_before": 9, "scorings": 1, "wires": 0},
            "no other wire was scored on them before",
        ),
    ],
)
def test_a_card_says_how_often_its_rows_were_read(
    readings: dict[str, Any] | None, told: str
) -> None:
    metrics = manifest()["metrics"] | {"readings": readings}
    assert f"On validation rows: {told}. In brackets" in card.write(
        RunConfig(), manifest(metrics=metrics)
    )


def test_a_wire_without_scores_says_so() -> None:
    text = card.write(RunConfig(), manifest(metrics={"step": 55}))
    assert "None: this wire was not scored on questions." in text and "55 steps of" in text
    joined = with_values(
        RunConfig(), {"training.train_only": ["qwen"], "training.init_from": "runs/best"}
    )
    assert "- only qwen trained; the rest stayed as it was" in card.write(joined, manifest())
