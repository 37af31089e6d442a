"""Columns that tokenising adds to rows."""

import pyarrow as pa

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.token_columns import tokenise

ROWS = {
    "context": ["Ada lives in Oslo.", "Tom has a red ball."],
    "question": ["Where does Ada live?", "What has Tom?"],
    "answers": [["Oslo"], ["a red ball"]],
}
SCHEMA = pa.schema(
    {"context": pa.string(), "question": pa.string(), "answers": pa.list_(pa.string())}
)
OF_AN_LM = {"encoder.kind": "lm", "encoder.model": "receiver:llama"}


def test_the_encoder_reads_lines_apart_where_it_splits_texts(run: RunConfig) -> None:
    rows = ROWS | {"context": ["Ada lives in Oslo.\nTom has a red ball.", "No."]}
    table = pa.Table.from_pydict(rows, SCHEMA)
    apart, whole = (
        tokenise(table, with_values(run, OF_AN_LM | {"encoder.split": split}), "train")[0][
            "encoder_ids"
        ]
        for split in ("lines", "none")
    )
    assert [len(parts) for parts in apart.to_pylist()] == [2, 1]
    assert [len(parts) for parts in whole.to_pylist()] == [1, 1]


def test_columns_have_the_same_types_with_and_without_rows(run: RunConfig) -> None:
    together = with_values(run, {"training.questions_together": True, "encoder.kind": "byte"})
    table = pa.Table.from_pydict(ROWS, SCHEMA)
    full, reasons = tokenise(table, together, "train")
    empty, none = tokenise(table.slice(0, 0), together, "train")
    assert "sender_hash" in full.column_names and len(reasons) == 2 and len(none) == 0
    # Blocks of rows are joined: one without rows must not be of another type.
    assert empty.schema == full.schema and pa.concat_tables([empty, full]).num_rows == 2
