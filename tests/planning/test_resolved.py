"""A sweep is resolved once, and what follows from its space is passed on."""

import pytest

from latentwire.config import SweepConfig
from latentwire.data import teachers
from latentwire.losses.bundles import teacher_reads
from latentwire.planning import resolved
from latentwire.planning.resolved import ResolvedSweep, resolve

SPACE = {
    "search": {
        "data.dev_samples": {"type": "categorical", "choices": [8, 16]},
        "encoder.latent_len": {"type": "int", "low": 2, "high": 6},
    },
    "tune": {"objectives": {"wire_bytes": "min"}},
}


def test_each_variant_has_its_key_and_its_shards() -> None:
    sweep = resolve(SweepConfig.model_validate(SPACE))
    assert [variant.run.data.dev_samples for variant in sweep.variants] == [8, 16]
    first, second = sweep.variants
    assert first.key != second.key and first.shards["dev"] != second.shards["dev"]
    assert sweep.largest.encoder.latent_len == 6
    assert list(sweep.objectives.items()) == [("dev_f1", "max"), ("wire_bytes", "min")]


def test_what_is_resolved_is_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(resolved, "data_variants", lambda space: calls.append(space) or [space.run])
    sweep = ResolvedSweep(SweepConfig())
    assert resolve(sweep) is sweep
    assert sweep.variants is sweep.variants and len(calls) == 1


@pytest.mark.parametrize(
    ("first", "second", "tokens", "reads"),
    [
        ({"kd_weight": 1.0, "k": 8}, {"kd_weight": 1.0, "k": 2}, 8, {"logits"}),
        ({"kd_weight": 1.0}, {"hidden_kd_weight": 0.5}, 4, {"logits", "states"}),
        # A stage without a teacher asks for no more tokens, whatever its k is.
        ({"kd_weight": 1.0, "k": 2}, {"first_k_ce_weight": 1.0, "k": 8}, 2, {"logits"}),
    ],
)
def test_stages_with_one_key_have_columns_that_serve_both(
    first: dict, second: dict, tokens: int, reads: set[str]
) -> None:
    stages = {"first": {"losses": first}, "second": {"losses": second}}
    sweep = resolve(SweepConfig.model_validate({"run": {"stages": stages}}))
    assert len({variant.key for variant in sweep.variants}) == 1
    taught = [sweep.taught(variant).losses for variant in sweep.variants]
    with_teachers = [losses for losses in taught if teachers.needed(losses)]
    assert {teachers.most_tokens(losses) for losses in with_teachers} == {tokens}
    assert all(teacher_reads(losses) == reads for losses in with_teachers)


def test_a_schedule_of_k_counts_with_its_largest_factor() -> None:
    growing = {"k": {"kind": "linear", "start": 1.0, "end": 3.0, "steps": 10}}
    first = {"kd_weight": 1.0, "k": 4, "schedules": growing}
    stages = {"first": {"losses": first}, "second": {"losses": {"kd_weight": 1.0, "k": 8}}}
    sweep = resolve(SweepConfig.model_validate({"run": {"stages": stages}}))
    assert [teachers.most_tokens(sweep.taught(each).losses) for each in sweep.variants] == [12, 12]
