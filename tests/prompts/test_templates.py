"""Chat templates write the same prompt tomorrow, take variables, and are part of every hash."""

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as clock
from pydantic import ValidationError

from latentwire.config import PromptConfig, ReceiverConfig, RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.shards import shard_key
from latentwire.pretrained.weights import load_tokenizer, resolve
from latentwire.prompts.sequences import PromptBuilder, PromptError
from latentwire.prompts.templates import around, rendered

LLAMA_3_2 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today Date: {{ date_string }}\n\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
IN_A_MACRO = (  # as gpt-oss and others have it
    "{% macro now() %}{{ strftime_now('%Y-%m-%d, %A %-d %B, 100%% %H:%M') }}{% endmacro %}"
    "{{ now() }}\n{% for m in messages %}{{ m.content }}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' clock, years ahead."""

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2031, 1, 2, 3, 4)

    monkeypatch.setattr(clock, "datetime", Later)


def receiver(**knobs: Any) -> ReceiverConfig:
    return ReceiverConfig(name="qwen", model="toy-qwen", **knobs)


def tokenizer(template: str | dict[str, str]) -> Any:
    loaded = load_tokenizer(receiver())
    loaded.chat_template = template
    return loaded


@pytest.mark.usefixtures("tomorrow")
def test_the_date_is_the_same_every_day() -> None:
    turns = [{"role": "user", "content": "a"}]
    loaded = tokenizer(LLAMA_3_2)
    assert "02 Jan 2031" in loaded.apply_chat_template(
        turns, tokenize=False
    )  # so the clock is asked
    assert around(loaded, receiver()).head.startswith("Today Date: 26 Jul 2024\n\nuser: Passage:")
    assert around(tokenizer(IN_A_MACRO), receiver()).head.startswith(
        "2024-07-26, Friday 26 July, 100% 12:00\n"
    )
    named = {"default": LLAMA_3_2, "tool_use": "{{ messages }}"}
    assert around(tokenizer(named), receiver()).head.startswith("Today Date: 26 Jul 2024\n")
    other = receiver(template_options={"date_string": "1 May 1999"})
    assert around(loaded, other).head.startswith("Today Date: 1 May 1999\n")


def test_templates_take_variables() -> None:
    loaded = tokenizer(THINKING)
    assert around(loaded, receiver()).tail == "\nassistant\n"
    assert (
        around(loaded, receiver(template_options={"enable_thinking": True})).tail == "\nassistant\n"
    )
    quiet = receiver(template_options={"enable_thinking": False})
    assert around(loaded, quiet).tail == "\nassistant\n<think>\n\n</think>\n\n"
    ids = PromptBuilder(loaded, quiet, PromptConfig(), "context").tail_ids
    assert loaded.decode(ids) == "\nassistant\n<think>\n\n</think>\n\n"


def test_variables_that_nothing_reads_or_that_are_none_are_refused() -> None:
    with pytest.raises(
        PromptError,
        match="template_options need a chat template, receiver qwen is read as plain and has a; leave",
    ):
        PromptBuilder(
            tokenizer(THINKING),
            receiver(template="plain", template_options={"a": 1}),
            PromptConfig(),
            "context",
        )
    with pytest.raises(
        ValidationError,
        match="must be variables of the template, got tokenize, which the prompt sets itself",
    ):
        receiver(template_options={"tokenize": True})


def test_what_a_template_writes_is_part_of_the_shards_hash(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    shutil.copytree(resolve(receiver()), folder)
    run = with_values(RunConfig(), {"receivers.1.model": str(folder)})
    plain = with_values(run, {"receivers.1.template": "plain"})
    before = {split: shard_key(run, split)[0] for split in ("train", "dev", "validation")}
    written = shard_key(run, "dev")[1]["receivers"]
    assert written["qwen"]["rendered"] == rendered(
        load_tokenizer(run.receivers[1]), run.receivers[1]
    )
    assert (
        "rendered" not in written["llama"]
        and "rendered" not in shard_key(plain, "dev")[1]["receivers"]["qwen"]
    )
    (folder / "chat_template.jinja").write_text(THINKING)
    keys = {shard_key(run, "dev")[0]}
    keys.add(
        shard_key(
            with_values(run, {"receivers.1.template_options": {"enable_thinking": False}}), "dev"
        )[0]
    )
    assert len(keys | set(before.values())) == 5
