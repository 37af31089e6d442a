"""A wire's export says which heads read, and a page shows it."""

from pathlib import Path

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.reports.heads import PICTURE, write_picture
from tests.conftest import HEADS, choose_some_heads, wire_of


def test_the_page_outlines_the_heads_of_the_export(run: RunConfig, tmp_path: Path) -> None:
    wire = choose_some_heads(wire_of(with_values(run, HEADS)))
    exports.save(tmp_path / "best", wire, {}, {"receivers": wire.fingerprints()})
    page = write_picture(wire.run, tmp_path / "best", tmp_path)
    assert page == tmp_path / PICTURE
    text = page.read_text()
    chosen = sum(len(adapter.head_J2) for adapter in wire.interlingua.adapters.values())
    assert text.count('"type":"rect"') >= chosen > 2
    assert "key-value head" in text and "qwen" in text


def test_wires_in_every_head_have_none(run: RunConfig, tmp_path: Path) -> None:
    assert write_picture(run, tmp_path / "best", tmp_path) is None
    assert list(tmp_path.iterdir()) == []
