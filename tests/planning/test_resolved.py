"""A sweep is resolved once, and what follows from its space is passed on."""

import pytest

from latentwire.config import SweepConfig
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
