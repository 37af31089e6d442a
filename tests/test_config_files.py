"""Configurations ship with the package, are found by name from anywhere, and extend one another."""

from pathlib import Path

import pytest

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.files import SHIPPED, shipped_names
from latentwire.config.resolve import ConfigError, load_space

REPOSITORY = Path(__file__).parent.parent
CHECKED_OUT = sorted(
    [*(REPOSITORY / "search_spaces").glob("*.yaml"), *(REPOSITORY / "presets").glob("*.yaml")]
)


def write(folder: Path, **texts: str) -> Path:
    """Write files by name; returns the last one's path."""
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.write_text(text)
    return file


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configurations_load_from_any_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        load_space(name)
        == load_space(SHIPPED / f"{name}.yaml")
        == load_space(str(SHIPPED / f"{name}.yaml"))
    )


PEERS = sorted(path.stem for path in (SHIPPED / "peers").glob("*.yaml"))


@pytest.mark.parametrize("name", PEERS)
def test_a_published_compressor_has_the_budget_of_the_recipe_beside_it(name: str) -> None:
    """It differs in what it is, and not in rows, steps, positions, batches, rates or decoding."""
    run = load_space(f"peers/{name}").run
    stages = ["toy"] if name.startswith("toy") else ["squad_one_pretrain", "squad_one"]
    ours = [load_space(stage).run for stage in stages]
    steps = [one.training.max_steps or 0 for one in ours]
    assert run.training.max_steps == sum(steps) and run.training.epochs >= 1
    for section in ("evaluation", "prompt"):
        assert getattr(run, section) == getattr(ours[-1], section)
    budget = ("batch_size", "bucket_batches", "encoder_lr", "adapter_lr", "optimizer")
    for knob in budget:
        assert getattr(run.training, knob) == getattr(ours[-1].training, knob), knob
    assert run.data == ours[-1].data
    assert run.encoder.tokens_per_latent == ours[-1].encoder.tokens_per_latent
    if run.encoder.tokens_per_latent is None:
        assert run.encoder.latent_len == ours[-1].encoder.latent_len
    names = {receiver.name: receiver for receiver in ours[-1].receivers}
    for receiver in run.receivers:
        assert receiver == names[receiver.name]
    # Nothing but the message reaches a receiver.
    assert not any(run.features.model_dump().values())
    assert {schedule.steps for schedule in run.losses.schedules.values()} <= {350, 620}


@pytest.mark.parametrize("file", CHECKED_OUT, ids=lambda path: path.name)
def test_the_files_of_a_checkout_are_the_shipped_ones(file: Path) -> None:
    assert load_space(file) == load_space(file.stem)


def test_all_that_ships_has_a_file_in_the_checkout() -> None:
    assert [
        path.stem for path in sorted(CHECKED_OUT, key=lambda path: path.stem)
    ] == shipped_names()


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "presets").glob("*.yaml")), ids=lambda path: path.name
)
def test_presets_are_single_runs_that_differ_from_the_defaults(file: Path) -> None:
    space = load_space(file)
    assert not space.search and space.run != RunConfig() and space.tune == SweepConfig().tune


def test_an_instruction_stands_once_among_the_shipped_files() -> None:
    texts = [path.read_text() for path in SHIPPED.rglob("*.yaml")]
    assert sum("Where does Anna live?" in text for text in texts) == 1
    assert sum("bucket_batches" in text for text in texts) == 1


def test_nearer_values_win_section_by_section_and_lists_replace(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        first="run: {encoder: {latent_len: 3, d_z: 32}, training: {tokens_per_latent: [2, 4]}}\ntune: {trials: 7}",
        second="run: {encoder: {d_z: 16, tokens_per_latent: 4}}",
        nearest="extends: [first.yaml, second.yaml]\nrun: {encoder: {layers: 1}, training: {tokens_per_latent: [8]}}",
    )
    space = load_space(file)
    encoder = space.run.encoder
    assert (encoder.latent_len, encoder.d_z, encoder.layers, encoder.tokens_per_latent) == (
        3,
        16,
        1,
        4,
    )
    assert space.run.training.tokens_per_latent == (8,) and space.tune.trials == 7


def test_a_file_may_have_the_name_of_the_shipped_one_that_it_extends(tmp_path: Path) -> None:
    file = write(tmp_path, toy="extends: toy\ntune: {trials: 2}")
    assert load_space(file).tune.trials == 2 and load_space(file).run == load_space("toy").run


def test_dimensions_are_replaced_whole_and_null_takes_one_out(tmp_path: Path) -> None:
    text = "extends: toy\nsearch: {encoder.d_z: null, encoder.latent_len: {type: int, low: 2, high: 8}}"
    search = load_space(write(tmp_path, mine=text)).search
    assert search["encoder.latent_len"].type == "int" and "encoder.d_z" not in search
    assert list(search) == ["encoder.latent_len", "prompt.anchor", "losses.first_token_ce_weight"]


def test_receivers_by_name_merge_and_share_what_stands_under_each(tmp_path: Path) -> None:
    listed = "run: {receivers: [{name: a, model: x, bos: 'yes'}, {name: b, model: y}]}"
    nearer = "extends: listed.yaml\nrun: {receivers: {each: {dtype: float16}, b: {dtype: float32}, c: {model: z}}}"
    receivers = load_space(write(tmp_path, listed=listed, mine=nearer)).run.receivers
    assert [(r.name, r.model, r.bos, r.dtype) for r in receivers] == [
        ("a", "x", "yes", "float16"),
        ("b", "y", "auto", "float32"),
        ("c", "z", "auto", "float16"),
    ]
    replaced = "extends: listed.yaml\nrun: {receivers: [{name: d, model: z}]}"
    assert [r.name for r in load_space(write(tmp_path, mine=replaced)).run.receivers] == ["d"]


def test_a_nearer_bundle_is_not_outvoted_by_inherited_weights(tmp_path: Path) -> None:
    file = write(tmp_path, mine="extends: toy_eight\nrun: {losses: {bundle: distil, k: 3}}")
    losses = load_space(file).run.losses
    assert (losses.kd_weight, losses.answer_ce_weight, losses.first_token_ce_weight, losses.k) == (
        1.0,
        0.5,
        0.0,
        3,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "extends: recipes/toi",
            r"extends must name .*, got recipes/toi .*mine\.yaml: extends.; did you mean recipes/toy",
        ),
        ("extends: other.yaml", r"extends must name .*, got other\.yaml"),
        ("extends: 3", "extends must be a name, a path or a list of them, got 3"),
        (
            "extends: mine.yaml",
            r"extends must not go round in a circle, got \S*mine\.yaml → \S*mine\.yaml",
        ),
        ("extend: toy", "did you mean extends"),
        (
            "run: {receivers: {a: toy-llama}}",
            r"must be a mapping of its knobs, got 'toy-llama' .*run\.receivers\.a",
        ),
    ],
)
def test_what_cannot_be_extended_is_one_clear_error(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_space(write(tmp_path, mine=text))


def test_a_circle_by_the_directory_above_is_told_too(tmp_path: Path) -> None:
    file = write(tmp_path, mine=f"extends: ../{tmp_path.name}/mine.yaml")
    with pytest.raises(ConfigError, match=r"in a circle, got \S*mine\.yaml → \S*mine\.yaml"):
        load_space(file)


def test_a_name_that_is_none_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"a file that exists, got nowhere\.yaml; known here: llama_qwen, losses"
    ):
        load_space("nowhere.yaml")
    with pytest.raises(ConfigError, match="got smal; did you mean small"):
        load_space("smal")


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("mine.yaml", "run: {{RUN}}", "must be valid YAML: .*found unhashable key"),
        ("mine.json", "[" * 100_000, "must be valid JSON: maximum recursion depth"),
        ("mine.yaml", "[" * 3_000, "must be valid YAML: maximum recursion depth"),
    ],
)
def test_what_cannot_be_read_is_told_by_its_file(
    tmp_path: Path, name: str, text: str, rule: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s){name} {rule}"):
        load_space(tmp_path / name)


def test_a_configuration_that_is_given_as_text_is_no_path() -> None:
    rule = (
        r"must be a shipped name or a file's path, got run: .*… .*write what it holds into a file"
    )
    with pytest.raises(ConfigError, match=rule):
        load_space("run: {training: {seed: 1}}" * 20)


def test_a_byte_order_mark_begins_json_as_it_does_yaml(tmp_path: Path) -> None:
    for name in ("mine.json", "mine.yaml"):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"run": {"training": {"seed": 3}}}')
        assert load_space(tmp_path / name).run.training.seed == 3
