"""The page of all knobs is what the configuration says."""

from scripts.knobs import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `python scripts/knobs.py`"


def test_every_knob_says_what_it_does() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert not [row[0] for row in rows if len(row[-1].strip(" |")) < 10]
