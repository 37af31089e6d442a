"""Sums of one pass, against products in float64."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from latentwire.closed_form.moments import ClosedFormError, Moments

ENTRIES = {"llama": 5, "qwen.2": 3}


def batch(tokens: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return states and targets whose means are far larger than their spread."""
    draw = torch.Generator().manual_seed(seed)
    x_NM = 1000 + torch.randn(tokens, 7, generator=draw)
    mix_ME = torch.randn(7, 8, generator=draw)
    y_ND = 300 + (x_NM - 1000) @ mix_ME + torch.randn(tokens, 8, generator=draw)
    return x_NM, dict(zip(ENTRIES, y_ND.split([5, 3], 1), strict=True))


def gathered(x_NM: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> Moments:
    moments = Moments.empty(7, ENTRIES)
    moments.add_tokens(x_NM, targets)
    for name, y_NE in targets.items():
        moments.add_gradients(name, y_NE[: len(y_NE) // 2] - 300)
    return moments


def rows(x_NM: torch.Tensor, targets: Mapping[str, torch.Tensor], part: slice) -> Moments:
    return gathered(x_NM[part], {name: y_NE[part] for name, y_NE in targets.items()})


def assert_same(first: Moments, second: Moments, rtol: float) -> None:
    assert first.count == second.count
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert tensor.dtype == torch.float64, name
        torch.testing.assert_close(tensor, second.tensors()[name], rtol=rtol, atol=0, msg=name)


def test_sums_are_what_products_of_all_tokens_say() -> None:
    x_NM, targets = batch(64)
    moments, x64_NM = gathered(x_NM, targets), x_NM.double()
    torch.testing.assert_close(moments.x_M, x64_NM.sum(0))
    torch.testing.assert_close(moments.xx_MM, x64_NM.T @ x64_NM)
    assert moments.count == 64
    for name, y_NE in targets.items():
        receiver, y64_NE = moments.receivers[name], y_NE.double()
        torch.testing.assert_close(receiver.y_E, y64_NE.sum(0))
        torch.testing.assert_close(receiver.yy_E, y64_NE.square().sum(0))
        torch.testing.assert_close(receiver.xy_ME, x64_NM.T @ y64_NE)
        g_NE = (y_NE[:32] - 300).double()
        torch.testing.assert_close(receiver.gradient_EE, g_NE.T @ g_NE, rtol=1e-5, atol=1e-3)
        assert receiver.gradients == 32


def test_covariances_survive_means_a_thousand_times_the_spread() -> None:
    x_NM, targets = batch(512)
    moments = gathered(x_NM, targets)
    receiver, y_NE = moments.receivers["llama"], targets["llama"].double()
    x64_NM = x_NM.double()
    mean_M, mean_E = moments.x_M / 512, receiver.y_E / 512
    closeness = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        moments.xx_MM / 512 - torch.outer(mean_M, mean_M), x64_NM.T.cov(correction=0), **closeness
    )
    torch.testing.assert_close(
        receiver.xy_ME / 512 - torch.outer(mean_M, mean_E),
        (x64_NM - x64_NM.mean(0)).T @ (y_NE - y_NE.mean(0)) / 512,
        **closeness,
    )
    torch.testing.assert_close(
        receiver.yy_E / 512 - mean_E.square(), y_NE.var(0, correction=0), **closeness
    )


def test_parts_that_are_merged_are_one_pass() -> None:
    x_NM, targets = batch(90)
    merged = Moments.empty(7, ENTRIES)
    for start, stop in ((0, 10), (10, 10), (10, 60), (60, 90)):
        part = Moments.empty(7, ENTRIES)
        part.add_tokens(x_NM[start:stop], {name: y[start:stop] for name, y in targets.items()})
        merged.merge(part)
    for name, y_NE in targets.items():
        part = Moments.empty(7, ENTRIES)
        part.add_gradients(name, y_NE[:15] - 300)
        part.add_gradients(name, y_NE[15:45] - 300)
        merged.merge(part)
        assert merged.receivers[name].gradients == 45
    assert_same(merged, gathered(x_NM, targets), rtol=1e-5)


def test_a_file_holds_the_same_sums(tmp_path: Path) -> None:
    moments = gathered(*batch(40))
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    assert_same(loaded, moments, rtol=0)
    assert loaded.widths() == moments.widths() == {"x": 7, "y of llama": 5, "y of qwen.2": 3}
    assert [one.gradients for one in loaded.receivers.values()] == [20, 20]
    assert [file.name for file in tmp_path.iterdir()] == ["moments.safetensors"]
    loaded.merge(moments)
    assert loaded.count == 80


def test_autocast_and_half_precision_leave_products_in_fp32() -> None:
    x_NM, targets = batch(40)
    half = {name: y_NE.bfloat16() for name, y_NE in targets.items()}
    with torch.autocast("cpu", torch.bfloat16):
        moments = gathered(x_NM.bfloat16(), half)
    whole = {name: y_NE.double() for name, y_NE in half.items()}
    expected = x_NM.bfloat16().double().T @ whole["llama"]
    torch.testing.assert_close(moments.receivers["llama"].xy_ME, expected)


def test_targets_may_carry_gradients() -> None:
    x_NM, targets = batch(8)
    moments = gathered(x_NM, {name: y.requires_grad_() for name, y in targets.items()})
    assert not any(tensor.requires_grad for tensor in moments.tensors().values())


@pytest.mark.parametrize("entries", [{"llama": 5}, {"llama": 5, "qwen.2": 4}])
def test_moments_of_other_widths_are_not_added(entries: dict[str, int]) -> None:
    moments = Moments.empty(7, ENTRIES)
    with pytest.raises(ClosedFormError, match="same widths"):
        moments.merge(Moments.empty(7, entries))
    with pytest.raises(ClosedFormError, match="same widths"):
        moments.merge(Moments.empty(6, ENTRIES))


def test_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ClosedFormError, match="gather them anew"):
        Moments.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no moments")
    with pytest.raises(ClosedFormError, match="gather them anew"):
        Moments.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ClosedFormError, match="latentwire-moments-1 file, got None"):
        Moments.load(tmp_path / "other")
