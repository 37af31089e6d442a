"""A start of a wire, against regressions that are computed on the data itself."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from latentwire.closed_form.moments import ClosedFormError, Moments
from latentwire.closed_form.regression import Metric, Start, decoder_for, energy_up_to, solve

TOKENS, WIDTH = 400, 12
ENTRIES = {"llama": 6, "qwen": 4}
RIDGE = 0.05


@dataclass
class Texts:
    """States, targets and gradients of every token, float64."""

    x_NM: torch.Tensor
    y: dict[str, torch.Tensor]
    g: dict[str, torch.Tensor]

    def moments(self) -> Moments:
        moments = Moments.empty(WIDTH, {name: y_NE.shape[1] for name, y_NE in self.y.items()})
        moments.add_tokens(self.x_NM.float(), {name: y.float() for name, y in self.y.items()})
        for name, g_NE in self.g.items():
            moments.add_gradients(name, g_NE.float())
        return moments

    def only(self, name: str) -> "Texts":
        return Texts(self.x_NM, {name: self.y[name]}, {name: self.g[name]})

    def standardised(self, name: str) -> torch.Tensor:
        y_NE = self.y[name]
        return (y_NE - y_NE.mean(0)) / y_NE.std(0, correction=0)

    def fit(self, name: str, ridge: float = RIDGE) -> torch.Tensor:
        """Return what ridge regression of full rank says of the standardised targets."""
        x_NM = self.x_NM - self.x_NM.mean(0)
        covariance_MM = x_NM.T @ x_NM / TOKENS
        penalty = ridge * covariance_MM.diagonal().mean() * torch.eye(WIDTH)
        cross_ME = x_NM.T @ self.standardised(name) / TOKENS
        return x_NM @ torch.linalg.solve(covariance_MM + penalty, cross_ME)

    def metric(self, name: str, floor: float = 0.02) -> torch.Tensor:
        g_NE = self.g[name] * self.y[name].std(0, correction=0)
        metric_EE = g_NE.T @ g_NE / len(g_NE)
        return metric_EE / metric_EE.diagonal().mean() + floor * torch.eye(len(metric_EE))

    def in_own_units(self, name: str, y_NE: torch.Tensor) -> torch.Tensor:
        return y_NE * self.y[name].std(0, correction=0) + self.y[name].mean(0)

    def error(self, name: str, start: Start) -> float:
        """Return the mean error of standardised targets in the gradients' metric."""
        std_E = self.y[name].std(0, correction=0)
        e_NE = (self.y[name] - read(start, self, name)) / std_E
        return ((e_NE @ self.metric(name)) * e_NE).sum(1).mean().item()


@pytest.fixture(scope="module")
def texts() -> Texts:
    """Draw tokens; targets' entries, and gradients', differ a hundredfold in size."""
    torch.manual_seed(0)
    x_NM = torch.randn(TOKENS, WIDTH) @ torch.randn(WIDTH, WIDTH) + 5 * torch.randn(WIDTH)
    y, g = {}, {}
    for name, entries in ENTRIES.items():
        size_E = torch.logspace(-1, 1, entries)[torch.randperm(entries)]
        told_NE = x_NM @ torch.randn(WIDTH, entries) / WIDTH
        y[name] = size_E * (told_NE + torch.randn(TOKENS, entries)) + 3 * torch.randn(entries)
        mix_EE = torch.randn(entries, entries) * torch.logspace(0, -1.5, entries)
        g[name] = torch.randn(300, entries) @ mix_EE.T / size_E
    exact = [{name: t.float().double() for name, t in of_all.items()} for of_all in (y, g)]
    return Texts(x_NM.float().double(), exact[0], exact[1])


def codes_of(start: Start, texts: Texts) -> torch.Tensor:
    return texts.x_NM @ start.encoder_MK.double() + start.encoder_bias_K.double()


def read(start: Start, texts: Texts, name: str) -> torch.Tensor:
    decoder = start.decoders[name]
    return codes_of(start, texts) @ decoder.decoder_KE.double() + decoder.bias_E.double()


def assert_reads(start: Start, texts: Texts, name: str, expected_NE: torch.Tensor) -> None:
    error_E = (read(start, texts, name) - expected_NE).abs().amax(0)
    assert (error_E / texts.y[name].std(0)).max().item() < 2e-5


@pytest.mark.parametrize("metric", ["gradients", "plain"])
def test_a_rank_as_large_as_the_targets_is_full_regression(texts: Texts, metric: Metric) -> None:
    start = solve(texts.moments(), sum(ENTRIES.values()), ridge=RIDGE, metric=metric)
    for name in ENTRIES:
        fit_NE = texts.fit(name)
        assert_reads(start, texts, name, texts.in_own_units(name, fit_NE))
        left = (texts.standardised(name) - fit_NE).square().mean().item()
        assert start.unexplained[name] == pytest.approx(left, rel=1e-5)


def test_the_plain_metric_is_the_data_cut_to_its_singular_vectors(texts: Texts) -> None:
    alone = texts.only("llama")
    start = solve(alone.moments(), 2, ridge=RIDGE, metric="plain")
    left_NE, size_E, right_EE = torch.linalg.svd(texts.fit("llama"), full_matrices=False)
    cut_NE = left_NE[:, :2] * size_E[:2] @ right_EE[:2]
    assert_reads(start, alone, "llama", texts.in_own_units("llama", cut_NE))
    share_E = size_E.square() / size_E.square().sum()
    torch.testing.assert_close(start.energy_D.double(), share_E, rtol=1e-4, atol=1e-6)


def test_two_receivers_share_the_leading_directions_of_both(texts: Texts) -> None:
    weights = {"qwen": 3.0}
    start = solve(texts.moments(), 3, ridge=RIDGE, weights=weights)
    fits, inverses = [], []
    for name in ENTRIES:
        value_E, vector_EE = torch.linalg.eigh(texts.metric(name))
        half_EE = vector_EE * value_E.sqrt() @ vector_EE.T
        fit_NE = texts.fit(name) @ half_EE
        scale = (weights.get(name, 1.0) / fit_NE.square().sum(1).mean()).sqrt()
        fits.append(fit_NE * scale)
        inverses.append(torch.linalg.inv(half_EE) / scale)
    left_ND, size_D, right_DD = torch.linalg.svd(torch.cat(fits, 1), full_matrices=False)
    cut_ND = left_ND[:, :3] * size_D[:3] @ right_DD[:3]
    parts = cut_ND.split(list(ENTRIES.values()), 1)
    for name, part_NE, inverse_EE in zip(ENTRIES, parts, inverses, strict=True):
        assert_reads(start, texts, name, texts.in_own_units(name, part_NE @ inverse_EE))
    share_D = size_D.square() / size_D.square().sum()
    torch.testing.assert_close(start.energy_D.double(), share_D, rtol=1e-4, atol=1e-6)
    expected = [0.0, share_D[0].item(), share_D[:3].sum().item(), 1.0, 1.0]
    assert energy_up_to(start, [0, 1, 3, 10, 99]) == pytest.approx(expected, rel=1e-5)


def test_no_map_nearby_has_a_smaller_error_in_the_metric(texts: Texts) -> None:
    alone = texts.only("llama")
    moments = alone.moments()
    start = solve(moments, 2, ridge=1e-9)
    least = alone.error("llama", start)
    decoder = start.decoders["llama"]
    std_E = texts.y["llama"].std(0).float()
    draw = torch.Generator().manual_seed(1)
    for number in range(300):
        size = 10.0 ** -(1 + number % 3)
        step_MK = size * start.encoder_MK.std() * torch.randn(WIDTH, 2, generator=draw)
        step_KE = size * std_E * torch.randn(2, len(std_E), generator=draw)
        # Codes keep their mean of 0, so that only the map changes.
        bias_K = start.encoder_bias_K - texts.x_NM.mean(0).float() @ step_MK
        moved = replace(
            start,
            encoder_MK=start.encoder_MK + step_MK,
            encoder_bias_K=bias_K,
            decoders={"llama": replace(decoder, decoder_KE=decoder.decoder_KE + step_KE)},
        )
        assert alone.error("llama", moved) > least
    assert least < 0.9 * alone.error("llama", solve(moments, 2, ridge=1e-9, metric="plain"))


def test_a_receiver_that_counts_more_is_read_better(texts: Texts) -> None:
    moments = texts.moments()
    light, heavy = (solve(moments, 2, weights={"qwen": weight}) for weight in (0.1, 10.0))
    assert texts.error("qwen", heavy) < texts.error("qwen", light)
    assert texts.error("llama", heavy) > texts.error("llama", light)


def test_a_gradients_unit_does_not_matter(texts: Texts) -> None:
    louder = Texts(texts.x_NM, texts.y, {name: 1e-6 * g for name, g in texts.g.items()})
    start, other = solve(texts.moments(), 3), solve(louder.moments(), 3)
    torch.testing.assert_close(start.encoder_MK, other.encoder_MK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["gradients", "plain"])
def test_codes_have_mean_zero_and_variance_one_and_share_nothing(
    texts: Texts, metric: Metric
) -> None:
    start = solve(texts.moments(), 5, metric=metric)
    code_NK = codes_of(start, texts)
    torch.testing.assert_close(code_NK.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        code_NK.T.cov(correction=0), torch.eye(5).double(), rtol=1e-4, atol=1e-4
    )
    assert start.encoder_MK.dtype == start.decoders["qwen"].decoder_KE.dtype == torch.float32


def test_more_codes_begin_with_the_same_ones(texts: Texts) -> None:
    moments = texts.moments()
    few, many = solve(moments, 2), solve(moments, 6)
    torch.testing.assert_close(few.encoder_MK, many.encoder_MK[:, :2])
    torch.testing.assert_close(few.energy_D, many.energy_D)
    assert few.energy_D.diff().max() <= 0


def test_the_order_of_receivers_changes_no_code_nor_its_sign(texts: Texts) -> None:
    swapped = Texts(texts.x_NM, dict(reversed(texts.y.items())), dict(reversed(texts.g.items())))
    start, other = solve(texts.moments(), 6), solve(swapped.moments(), 6)
    torch.testing.assert_close(start.encoder_MK, other.encoder_MK, rtol=1e-4, atol=1e-5)
    for name, decoder in start.decoders.items():
        swapped_KE = other.decoders[name].decoder_KE
        torch.testing.assert_close(decoder.decoder_KE, swapped_KE, rtol=1e-4, atol=1e-5)


def test_entries_that_never_change_are_read_as_they_are(texts: Texts) -> None:
    y_NE = texts.y["llama"].clone()
    y_NE[:, 2] = 7
    still = Texts(texts.x_NM, {"llama": y_NE}, {"llama": texts.g["llama"]})
    start = solve(still.moments(), 5)
    torch.testing.assert_close(read(start, still, "llama")[:, 2], y_NE[:, 2], rtol=1e-5, atol=1e-5)
    # All six codes: one of them has nothing to say, and says it in finite numbers.
    start = solve(still.moments(), 6)
    assert read(start, still, "llama").isfinite().all()
    assert codes_of(start, still).var(0).max() < 1.01


def test_what_cannot_be_solved_is_said(texts: Texts) -> None:
    moments = texts.moments()
    with pytest.raises(ClosedFormError, match=r"from 1 to the 10 .*, got 11"):
        solve(moments, 11)
    with pytest.raises(ClosedFormError, match=r"as many tokens as codes \(4\), got 3"):
        solve(replace(moments, count=3), 4)
    with pytest.raises(ClosedFormError, match="not 0 for qwen, got 0 rows"):
        solve(Texts(texts.x_NM, texts.y, {"llama": texts.g["llama"]}).moments(), 2)
    with pytest.raises(ClosedFormError, match=r"weights must be above 0.*got 1.0 for gemma"):
        solve(moments, 2, weights={"gemma": 1.0})
    with pytest.raises(ClosedFormError, match=r"got 0\.0 for qwen"):
        solve(moments, 2, weights={"qwen": 0.0})
    with pytest.raises(ClosedFormError, match="ridge must be 0 or more"):
        solve(moments, 2, ridge=-1.0)
    with pytest.raises(ClosedFormError, match="floor must be above 0"):
        solve(moments, 2, floor=0.0)
    with pytest.raises(ClosedFormError, match="metric must be gradients or plain, got fisher"):
        solve(moments, 2, metric="fisher")  # type: ignore[arg-type]


def test_degenerate_texts_are_said(texts: Texts) -> None:
    still = {name: torch.ones_like(y_NE) for name, y_NE in texts.y.items()}
    with pytest.raises(ClosedFormError, match="must tell something of the targets of llama"):
        solve(Texts(texts.x_NM, still, texts.g).moments(), 2)
    with pytest.raises(ClosedFormError, match="ridge must make a matrix of 12 rows"):
        solve(Texts(0 * texts.x_NM, texts.y, texts.g).moments(), 2)
    x_NM = texts.x_NM.clone()
    x_NM[5, 3] = torch.inf
    with pytest.raises(ClosedFormError, match="moments must be finite"):
        solve(Texts(x_NM, texts.y, texts.g).moments(), 2)


def test_one_that_joins_reads_given_codes_as_least_squares_do(texts: Texts) -> None:
    moments = texts.moments()
    only = {"qwen": texts.y["qwen"]}, {"qwen": texts.g["qwen"]}
    start = solve(Texts(texts.x_NM, *only).moments(), 3, ridge=1e-9)
    decoder = decoder_for(moments, "llama", start.encoder_MK, start.encoder_bias_K, ridge=1e-9)
    code_NK = codes_of(start, texts)
    design = torch.cat((code_NK, torch.ones(len(code_NK), 1)), 1).double()
    expected = design @ torch.linalg.lstsq(design, texts.y["llama"].double()).solution
    found = code_NK @ decoder.decoder_KE.double() + decoder.bias_E
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # Of a receiver that was there, it is what it had.
    own = decoder_for(moments, "qwen", start.encoder_MK, start.encoder_bias_K, ridge=1e-9)
    had = start.decoders["qwen"]
    there = code_NK @ had.decoder_KE.double() + had.bias_E
    again = code_NK @ own.decoder_KE.double() + own.bias_E
    torch.testing.assert_close(again, there, atol=1e-3, rtol=1e-3)


def test_codes_of_a_wire_on_a_gpu_are_regressed_where_the_sums_are() -> None:
    """Sums lie on the CPU. Tensors without numbers stand for a GPU's: products of two devices fail."""
    with FakeTensorMode():
        moments = Moments.empty(WIDTH, ENTRIES)
        moments.count = 1
        encoder_MK, bias_K = torch.zeros(WIDTH, 3, device="cuda"), torch.zeros(3, device="cuda")
        # The ridge is a number of the codes' products: what was multiplied lay on one device.
        with pytest.raises(DataDependentOutputException):
            decoder_for(moments, "llama", encoder_MK, bias_K)
