"""The wire that is shipped for two families."""

from pathlib import Path

import pytest

from latentwire.cli import main
from latentwire.model import WIRES, LatentWire


@pytest.mark.slow
def test_the_shipped_wire_is_read_by_both_receivers(
    real_receivers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says of a paragraph is in no receiver's weights."""
    context = (
        "The old bridge across the Vela was closed in 1998. The new one, 412 metres long, was built by Ines Duarte and "
        "opened in May 2003."
    )
    wire = LatentWire.from_pretrained(
        "smollm2-qwen",
        receivers={name: str(real_receivers / name) for name in ("smollm2", "qwen")},
    )
    message = wire.encode(context)
    for name in wire.receivers:
        (answer,) = wire.answer(message, "Who built the new bridge?", name)
        assert "Ines" in answer, answer
    del wire
    if real_receivers.resolve() == (WIRES.parent / "receivers").resolve():  # where the export looks
        question = ["--question", "When was the old bridge closed?", "--context", context]
        assert main(["ask", "--wire", "smollm2-qwen", *question]) == 0
        assert "1998" in capsys.readouterr().out
