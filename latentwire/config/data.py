"""The rows and their splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from latentwire.config.section import Address, Section, knob
from latentwire.dataset import DATASETS, Dataset

if TYPE_CHECKING:
    DatasetName = str
else:
    # Made of what is registered, so that pydantic names the choices; mypy cannot read it.
    DatasetName = Literal[tuple(DATASETS)]


class DataConfig(Section):
    """The rows: where they come from and how they are split."""

    dataset: DatasetName = knob("toy", shards="value", protocol=True)
    """``custom``: jsonl/parquet with ``context``, ``question``, ``answers``. ``text``: jsonl/parquet with a ``text`` or
    ``context`` column, SQuAD's and HotpotQA's files too, for pretraining without questions; a text that stands in several
    rows of a file is read once. ``toy`` is generated."""
    data_dir: Address | None = knob(
        None, shards="content", may_change=("resumed run", "repeated trial")
    )
    """Directory, or URI that pyarrow reads (``s3://…``, ``gs://…``), with files of the training and the
    validation split: parquet in the Hub's schema, official JSON, a list of rows, or jsonl; the last
    three may be ``.gz``, ``.zst`` or ``.bz2``. A file, or its folder, is named after its split:
    ``train``, or ``validation``, ``valid``, ``val``, ``dev``, in any case. Where a folder of the
    dataset's name has them, it alone is read. ``None``: the Hub, where the dataset has an id there;
    ``toy`` reads no files."""
    config: str | None = knob(None, min_length=1, shards="content")
    """The configuration of a dataset that is read where there are several, e.g. ``distractor`` or
    ``fullwiki`` of HotpotQA: a word of the files' names or folders, or on the Hub its name there.
    ``None``: the only one; on the Hub, the usual one."""
    samples: int = knob(20_000, ge=0, shards="value")
    """Training rows, drawn by seed after the development split is taken out. 0: all. With ``overflow: chunk`` this and the two below
    count rows before they are cut into chunks."""
    dev_samples: int = knob(256, ge=1, shards="value", may_change=("resumed run",))
    """Development rows scored at each evaluation."""
    validation_samples: int = knob(512, ge=0, shards="value", may_change=("resumed run",))
    """Rows of the untouched validation split scored once at the end. 0: all."""
    validation_skip: int = knob(0, ge=0, shards="value", may_change=("resumed run",))
    """Rows of the validation split to pass over first, in the order that ``seed`` draws them. A split that wires were compared on
    has other rows for the final score: with 400 rows read so far, ``validation_skip: 400`` takes the next ones."""
    dev_fraction: float = knob(0.05, gt=0, lt=1, shards="value")
    """Share of the training *documents* (articles, not rows) that make the development split."""
    seed: int = knob(0, ge=0, shards="value")
    """Seed of the splits, of the draw of rows, and of the toy generator."""
    send: Literal["context", "prompt"] = knob("context", shards="value")
    """The text that is compressed: the context alone (the question travels as text), or context and question."""
    max_context_bytes: int = knob(4_096, ge=16, shards="value")
    """Longest sender text in UTF-8 bytes; longer rows follow ``overflow``."""
    overflow: Literal["reject", "truncate", "chunk"] = knob("reject", shards="value")
    """The fate of a longer row: into the rejects file, cut at the end (counted), or, with ``dataset: text``, parted
    into rows that fit."""
    distractors: tuple[int, int] | None = knob(None, shards="value")
    """The fewest and the most other paragraphs of its document that stand around each context, one a line, in an order
    that is drawn; those that would not fit ``max_context_bytes`` are left out. ``None``: a context stands alone."""
    unanswerable: float | None = knob(None, ge=0, le=1, shards="value")
    """Share of the questions that are put to a paragraph of another document, which cannot answer them: ``no_answer`` is
    then right. Rows that come without an answer, as in SQuAD 2.0, are taken as such too. ``None``: they are rejected, and no
    question is moved."""
    no_answer: str = knob("unanswerable", min_length=1, shards="value")
    """The answer to a question that its text cannot answer."""
    toy_people: int = knob(3, ge=1, le=4, shards="value")
    """People in a toy context."""
    toy_kinds: int = knob(2, ge=1, le=4, shards="value")
    """Facts about each of them."""
    toy_questions: int = knob(1, ge=1, le=16, shards="value")
    """Training rows of each toy context, one for each question; at most people × kinds. Other splits have one."""
    shard_mib: float = knob(16.0, gt=0, le=4_096, shards="value")
    """Size of the rows in one Parquet shard, in MiB, before they are tokenised and compressed."""
    in_memory: bool = knob(True, shards="reading", may_change=("resumed run",))
    """Ray only: training rows are held in the object store, once for all trials. False: they are streamed from their
    shards in every epoch, however many there are; each trial then has ``stream_cpus`` for that."""
    stream_cpus: float = knob(1.0, gt=0, shards="reading", may_change=("resumed run",))
    """CPUs kept free for each trial's reading tasks where rows are streamed."""
    shard_dir: Address = knob(
        "shards", shards="reading", may_change=("resumed run", "repeated trial")
    )
    """Directory or URI (``s3://…``, ``gs://…``) where shards live, in directories named by the hash of what made them."""

    @property
    def source(self) -> Dataset:
        """The dataset that ``dataset`` names."""
        return DATASETS[self.dataset]

    @model_validator(mode="after")
    def _files_where_they_are_read(self) -> DataConfig:
        given = {"data_dir": self.data_dir, "config": self.config}
        # A generator reads no files, whichever of these names them.
        named = [f"{knob} {value}" for knob, value in given.items() if value is not None]
        if self.source.generate is not None and named:
            read = [name for name, dataset in DATASETS.items() if dataset.generate is None]
            others = ", ".join(read)
            raise ValueError(
                f"dataset {self.dataset} is generated and reads no files, got {named[0]}; name the dataset that they hold, "
                f"one of {others}"
            )
        return self

    @model_validator(mode="after")
    def _chunks_are_texts(self) -> DataConfig:
        if self.overflow == "chunk" and self.source.has_questions:
            raise ValueError(
                f"overflow chunk needs dataset text, got {self.dataset}: an answer may lie in another chunk; use truncate"
            )
        return self

    @model_validator(mode="after")
    def _others_of_a_document(self) -> DataConfig:
        if self.distractors is None:
            return self
        fewest, most = self.distractors
        if not 0 <= fewest <= most or most == 0:
            raise ValueError(
                f"distractors must be fewest ≤ most, from 0 and from 1, got {fewest}, {most}; say [1, 9], for example"
            )
        if not self.source.has_articles:
            articles = ", ".join(name for name, one in DATASETS.items() if one.has_articles)
            raise ValueError(
                f"distractors are other paragraphs of a document, which {articles} have, got dataset {self.dataset}; leave "
                f"them out"
            )
        if self.send != "context":
            raise ValueError(
                f"distractors need send context, got {self.send}: questions to one paragraph share a text"
            )
        return self

    @model_validator(mode="after")
    def _questions_that_can_move(self) -> DataConfig:
        if self.unanswerable is None:
            return self
        if not self.source.has_questions or self.send != "context" or self.distractors is not None:
            raise ValueError(
                f"unanswerable {self.unanswerable} puts questions to paragraphs of other documents, so it needs a dataset "
                f"with questions, send context and distractors null, got {self.dataset}, {self.send} and "
                f"{self.distractors}; leave it out, or set these"
            )
        return self

    @model_validator(mode="after")
    def _a_question_for_each_fact(self) -> DataConfig:
        if self.toy_questions > (facts := self.toy_people * self.toy_kinds):
            raise ValueError(
                f"toy_questions must be ≤ toy_people × toy_kinds = {facts}, got {self.toy_questions}; lower it"
            )
        return self
