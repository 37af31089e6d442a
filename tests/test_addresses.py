"""Addresses as people write them, wherever one is given."""

from pathlib import Path

import pytest

from latentwire import storage
from latentwire.addresses import cache_dir
from latentwire.cli.flags import input_path, input_place, output_path, output_place
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError, validate
from latentwire.storage import Remote


@pytest.mark.parametrize(
    "uri", ["s3://key:sesame@bucket/x", "s3://bucket/x?access_key=key&secret_key=sesame"]
)
def test_credentials_in_an_address_are_refused_and_not_quoted(uri: str) -> None:
    for tree in (
        {"data": {"data_dir": uri}},
        {"data": {"shard_dir": uri}},
        {"training": {"init_from": uri}},
    ):
        with pytest.raises(ConfigError, match="a URI must not hold credentials") as caught:
            validate(RunConfig, tree, "test")
        assert "sesame" not in str(caught.value)
    with pytest.raises(ValueError, match="a URI must not hold credentials"):
        Remote(uri)


def test_home_and_variables_in_paths_are_replaced_wherever_one_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BUCKET", "s3://bucket")
    monkeypatch.delenv("LATENTWIRE_HOME", raising=False)
    (tmp_path / "x").mkdir()
    place = tmp_path / "x"
    for given in ("~/x", "$HOME/x", "${HOME}/x"):
        for flag in (input_place, input_path, output_place, output_path):
            assert flag(given) == place
        tree = {
            "run": {
                "data": {"dataset": "custom", "data_dir": given, "shard_dir": given},
                "encoder": {"kind": "lm", "model": given},
                "training": {"init_from": given},
                "receivers": [{"name": "own", "model": given}],
            },
            "tune": {"warm_start": given, "storage_path": given},
            "search": {"encoder.model": {"type": "categorical", "choices": [given, "org/name"]}},
        }
        space = with_home(SweepConfig.model_validate(tree))
        run, tune = space.run, space.tune
        named = [run.data.data_dir, run.data.shard_dir, run.encoder.model, run.training.init_from]
        named += [
            run.receivers[0].model,
            tune.warm_start,
            tune.storage_path,
            space.search["encoder.model"].choices[0],
        ]
        assert named == [str(place)] * 8
        monkeypatch.setenv("LATENTWIRE_HOME", given)
        assert output_place("runs") == place / "runs"
        monkeypatch.setenv("LATENTWIRE_CACHE", given)
        assert cache_dir() == place
    assert storage.place("$BUCKET/~/x") == Remote("s3://bucket/~/x")
    with pytest.raises(
        ConfigError,
        match=r"a path's variables must be set, \$NOWHERE is not; set it, or write the path out",
    ):
        validate(RunConfig, {"data": {"shard_dir": "$NOWHERE/x"}}, "test")
    monkeypatch.setenv("SECRET", "key:sesame@bucket")
    with pytest.raises(ConfigError, match="must not hold credentials") as caught:
        validate(RunConfig, {"data": {"shard_dir": "s3://$SECRET/x"}}, "test")
    assert "sesame" not in str(caught.value)
