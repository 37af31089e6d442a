"""What is kept of each answer."""

from latentwire.evaluation.predictions import context_id


def test_contexts_are_named_by_their_text_whatever_stands_in_it() -> None:
    texts = ("Ada lives in Oslo.", "Ada lives in Rome.", "", "half of a pair: \ud83d", "\ud83e")
    names = [context_id(text) for text in texts]
    assert len(set(names)) == len(texts) and {len(name) for name in names} == {16}
    assert context_id(texts[0]) == names[0]
