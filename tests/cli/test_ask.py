"""One question, answered from the text and from the message side by side."""

from pathlib import Path

import pytest

from latentwire import model
from latentwire.cli import main
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.model import LatentWire
from tests.conftest import wire_of


@pytest.fixture
def export(wire: LatentWire, tmp_path: Path) -> Path:
    wire.save_pretrained(tmp_path / "best")
    return tmp_path / "best"


def test_each_receiver_answers_from_both(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("Ben owns a duck. Ben lives in Seoul.")
    question = ["--question", "Where is the home of Ben?", "--context_file", str(tmp_path / "text")]
    assert main(["ask", str(export), *question]) == 0
    printed = capsys.readouterr().out
    assert printed.count("vectors") == 2 and "llama" in printed and "qwen" in printed
    assert printed.count("Seoul") >= 1  # the frozen pair reads text by itself
    assert "bytes as fp16" in printed
    assert main(["ask", str(export), *question, "--receiver", "qwen"]) == 0
    assert "llama" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:contexts should have at most")
def test_a_text_that_is_too_long_for_a_receiver_leaves_the_latents_answer(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("Ada lives in Oslo. " * 500)
    question = ["--question", "Where?", "--context_file", str(tmp_path / "text")]
    assert main(["ask", str(export), *question, "--receiver", "llama"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "none: receiver" in printed and "vectors" in printed


def test_a_file_that_is_no_text_is_named(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    assert main(["ask", str(export), "--question=Who?", f"--context_file={tmp_path / 'text'}"]) == 2
    assert "--context_file must be a text in UTF-8" in capsys.readouterr().err


def test_a_shipped_wire_is_asked_by_its_name(
    wire: LatentWire,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model, "WIRES", tmp_path / "wires")
    wire.save_pretrained(tmp_path / "wires" / "some-pair")
    question = ["--question=Where is the home of Ben?", "--context=Ben lives in Seoul."]
    assert main(["ask", "--wire", "some-pair", *question]) == 0
    assert "vectors" in capsys.readouterr().out
    assert main(["ask", "--wire", "../wires/other", *question]) == 2
    assert "a wire must be a directory or a Hub id" in capsys.readouterr().err


def test_a_wire_with_vectors_of_its_own_reads_the_text_behind_them_too(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wire_of(with_values(run, {"prefix": {"tokens": 3}})).save_pretrained(tmp_path / "best")
    asked = ["--question=Where is the home of Ben?", "--context=Ben lives in Seoul."]
    assert main(["ask", str(tmp_path / "best"), *asked]) == 0
    rows = capsys.readouterr().out.splitlines()
    behind = [row for row in rows if "behind the wire's vectors" in row]
    assert len(behind) == 2 and all("tokens" in row for row in behind)


def test_what_looks_like_markup_is_shown_as_it_was_said(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LatentWire, "answer", lambda *_: ["list[b]"])
    monkeypatch.setattr(LatentWire, "decode", lambda *_: (["a [/b]"], None))
    assert main(["ask", str(export), "--question=Who?", "--context=Ben lives in Seoul."]) == 0
    printed = capsys.readouterr().out
    assert printed.count("list[b]") == printed.count("a [/b]") == 2
