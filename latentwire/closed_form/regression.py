"""A start of a wire from moments: reduced-rank regression in the metric of answers' gradients.

Each token's states x of the sender become a code of K numbers, from which every receiver's targets
y are read by a linear map of its own. When K is small, what is kept of y is what the answers' loss
feels most: an error e costs about eᵀ G e, where G is the second moment of the loss's gradients by
y.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latentwire.closed_form.moments import ClosedFormError, Moments, ReceiverMoments
from latentwire.storage import Place, local, write

FORMAT = "latentwire-solution-2"
"""Marks a file of this kind."""

STD_FLOOR = 1e-3
"""The least standard deviation that an entry of targets or states is divided by."""
LEAST_SPREAD = 1e-6
"""The least standard deviation that a code is divided by, as a share of the first code's."""

Metric = Literal["gradients", "plain"]
"""How errors of targets are weighed: by the answers' gradients, or all alike."""


@dataclass(frozen=True)
class Decoder:
    """The linear map from codes to one receiver's targets, in the targets' own units, fp32."""

    decoder_KE: torch.Tensor
    """y ≈ code @ decoder_KE + bias_E."""
    bias_E: torch.Tensor
    """Mean of the targets."""


@dataclass(frozen=True)
class Start:
    """A wire in closed form, fp32: how codes are computed, and how they are read."""

    encoder_MK: torch.Tensor
    """code = x @ encoder_MK + encoder_bias_K; over the texts each code has mean 0, variance 1."""
    encoder_bias_K: torch.Tensor
    """Makes the mean of each code 0."""
    mean_M: torch.Tensor
    """Mean of x over the texts."""
    std_M: torch.Tensor
    """Its standard deviation, ``STD_FLOOR`` at least."""
    decoders: dict[str, Decoder]
    """One for each receiver."""
    energy_D: torch.Tensor
    """Share of the energy that each of all D directions has, descending.

    The energy is the variance of what the states tell of all targets, in the metric. Codes are the
    first K directions.
    """
    unexplained: dict[str, float]
    """Share of the standardised targets' variance that regression of full rank leaves."""

    def save(self, path: Place) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {
            "encoder": self.encoder_MK,
            "encoder_bias": self.encoder_bias_K,
            "mean": self.mean_M,
            "std": self.std_M,
            "energy": self.energy_D,
        }
        for name, decoder in self.decoders.items():
            tensors |= {f"{name}.decoder": decoder.decoder_KE, f"{name}.bias": decoder.bias_E}
        metadata = {"format": FORMAT, "unexplained": json.dumps(self.unexplained)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write(path, functools.partial(save_file, tensors, metadata=metadata))

    @classmethod
    def load(cls, path: Place) -> Start:
        """Read a file of :meth:`save`.

        Raises:
            ClosedFormError: no such file, or one of another kind.
        """
        try:
            with local(path) as file, safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ClosedFormError(
                        f"a solution must be a {FORMAT} file, got {metadata.get('format')} at {path}; delete it"
                    )
                unexplained = json.loads(metadata["unexplained"])
                decoders = {}
                for name in unexplained:
                    decoder_KE = opened.get_tensor(f"{name}.decoder")
                    decoders[name] = Decoder(decoder_KE, opened.get_tensor(f"{name}.bias"))
                return cls(
                    encoder_MK=opened.get_tensor("encoder"),
                    encoder_bias_K=opened.get_tensor("encoder_bias"),
                    mean_M=opened.get_tensor("mean"),
                    std_M=opened.get_tensor("std"),
                    decoders=decoders,
                    energy_D=opened.get_tensor("energy"),
                    unexplained=unexplained,
                )
        except (OSError, SafetensorError) as error:
            raise ClosedFormError(
                f"a solution must be a file of Start.save, got {path} ({error}); delete it"
            ) from error


@dataclass(frozen=True)
class _Targets:
    """One receiver's targets and the metric of their errors, in standardised units."""

    part: slice
    """Where its entries stand among those of all receivers."""
    mean_E: torch.Tensor
    std_E: torch.Tensor
    variance_E: torch.Tensor
    """Variance in standardised units: 1, or less where ``STD_FLOOR`` is divided by."""
    root_EE: torch.Tensor | None
    """C, lower triangular, with C Cᵀ the metric: an error e costs |e C|². None: the identity."""


@torch.no_grad()
def solve(
    moments: Moments,
    codes: int,
    *,
    ridge: float = 1e-3,
    floor: float = 0.02,
    weights: Mapping[str, float] | None = None,
    metric: Metric = "gradients",
) -> Start:
    """Return the best linear wire of a few numbers a token, for all receivers at once.

    Args:
        moments: sums over texts.
        codes: numbers a token, K.
        ridge: penalty of the regression, as a share of the mean variance of the sender's states.
        floor: what the metric has in every direction, as a share of its mean.
        weights: what the energy of each receiver counts; 1 for those that are not named.
        metric: how errors of targets are weighed.

    Raises:
        ClosedFormError: more codes than the moments can tell, a receiver without gradients, or
            values out of range.
    """
    weights = weights or {}
    _check(moments, codes, ridge, floor, weights, metric)
    targets, cross_MD = _standardised(moments, floor, metric)

    # Ridge regression of all targets: (S + λ) B = Cov(x, y), with S the covariance of x.
    mean_M = moments.x_M / moments.count
    # S = E[x xᵀ] − E[x] E[x]ᵀ. Matrices are large: they change in place, and go as soon as possible.
    covariance_MM = (moments.xx_MM / moments.count).addr_(mean_M, mean_M, alpha=-1)
    std_M = covariance_MM.diagonal().clamp(min=0).sqrt().clamp(min=STD_FLOOR)
    penalty = ridge * covariance_MM.diagonal().mean().item()
    covariance_MM.diagonal().add_(penalty)
    root_MM = _cholesky(covariance_MM, "ridge", ridge)
    del covariance_MM
    full_MD = torch.cholesky_solve(cross_MD, root_MM)
    del root_MM
    # Bᵀ Cov(x, y) is what fit and targets share; Bᵀ S B = Bᵀ (Cov(x, y) − λ B) is the fit's own.
    shared_D = (full_MD * cross_MD).sum(0)
    fit_DD = full_MD.T @ cross_MD.sub_(full_MD, alpha=penalty)
    del cross_MD
    # Var(y − fit) = Var(y) − 2 Cov(y, fit) + Var(fit), here less Var(y).
    left_D = fit_DD.diagonal() - 2 * shared_D
    unexplained = {}
    for name, one in targets.items():
        share = left_D[one.part].sum() / one.variance_E.sum() + 1
        unexplained[name] = share.clamp(min=0).item()

    # Z = the receivers' fits side by side, each as x B C · scale. Errors of it are plain squares.
    fit_DD, scales = _in_metric(fit_DD, targets, weights)
    # Its K leading directions W are the best K for all receivers: Z ≈ Z W Wᵀ.
    # Rounding leaves the matrix not quite symmetric. eigh sorts ascending: the last come first.
    energy_D, direction_DD = torch.linalg.eigh(fit_DD.add_(fit_DD.T.clone()).div_(2))
    energy_D = energy_D.flip(0).clamp(min=0)
    direction_DK = direction_DD[:, -codes:].flip(1)
    del fit_DD, direction_DD

    # code = (x − mean) B C W · scale, divided by its standard deviation; y ≈ code Wᵀ C⁻¹ / scale.
    # A code's variance is its direction's energy; one of almost none is not blown up.
    spread_K = energy_D[:codes].sqrt()
    spread_K = spread_K.clamp(min=LEAST_SPREAD * spread_K[0].item())
    reading_DK = torch.empty_like(direction_DK)
    for name, one in targets.items():
        part_EK = direction_DK[one.part] * scales[name]
        reading_DK[one.part] = part_EK if one.root_EE is None else one.root_EE @ part_EK
    # An eigenvector's sign is any solver's choice: the largest entry of what it reads is positive.
    largest_1K = reading_DK.abs().argmax(0, keepdim=True)
    spread_K = spread_K * reading_DK.gather(0, largest_1K)[0].sign()
    encoder_MK = full_MD @ (reading_DK / spread_K)
    decoders = {}
    for name, one in targets.items():
        decoder_KE = (direction_DK[one.part] * spread_K).T / scales[name]
        if one.root_EE is not None:
            # X C = decoder: out of the metric again, without an inverse of C.
            decoder_KE = torch.linalg.solve_triangular(
                one.root_EE, decoder_KE, upper=False, left=False
            )
        decoders[name] = Decoder((decoder_KE * one.std_E).float(), one.mean_E.float())
    return Start(
        encoder_MK=encoder_MK.float(),
        encoder_bias_K=-(mean_M @ encoder_MK).float(),
        mean_M=mean_M.float(),
        std_M=std_M.float(),
        decoders=decoders,
        energy_D=(energy_D / energy_D.sum()).float(),
        unexplained=unexplained,
    )


@torch.no_grad()
def decoder_for(
    moments: Moments,
    receiver: str,
    encoder_MK: torch.Tensor,
    encoder_bias_K: torch.Tensor,
    ridge: float = 1e-3,
) -> Decoder:
    """Return the best linear map from given codes to one receiver's targets: one that joins later.

    Args:
        moments: sums over texts.
        receiver: its name.
        encoder_MK: code = x @ encoder_MK + encoder_bias_K.
        encoder_bias_K: see there.
        ridge: penalty of the regression, as a share of the codes' mean variance.
    """
    # The sums are float64 on the CPU, the wire may be on a GPU.
    one, encoder_MK = moments.receivers[receiver], encoder_MK.to(moments.x_M)
    mean_M, mean_E = moments.x_M / moments.count, one.y_E / moments.count
    # Cov(code) = Aᵀ Cov(x) A, and Cov(code, y) = Aᵀ Cov(x, y).
    covariance_MM = (moments.xx_MM / moments.count).addr_(mean_M, mean_M, alpha=-1)
    codes_KK = encoder_MK.T @ covariance_MM @ encoder_MK
    del covariance_MM
    cross_KE = encoder_MK.T @ (one.xy_ME / moments.count).addr_(mean_M, mean_E, alpha=-1)
    codes_KK.diagonal().add_(ridge * codes_KK.diagonal().mean().item())
    decoder_KE = torch.cholesky_solve(cross_KE, _cholesky(codes_KK, "ridge", ridge))
    # y ≈ mean y + (code − mean code) B, so the bias is mean y − (mean code) B.
    mean_K = mean_M @ encoder_MK + encoder_bias_K.to(mean_M)
    return Decoder(decoder_KE.float(), (mean_E - mean_K @ decoder_KE).float())


def energy_up_to(start: Start, codes: Sequence[int]) -> list[float]:
    """Return the share of the energy that each number of codes holds, of all directions'."""
    upto_D = start.energy_D.double().cumsum(0)
    shares = []
    for count in codes:
        # More codes than there are directions hold all of it, and no code holds none.
        last = min(count, len(upto_D)) - 1
        shares.append(upto_D[last].item() if count > 0 else 0.0)
    return shares


def _standardised(
    moments: Moments, floor: float, metric: Metric
) -> tuple[dict[str, _Targets], torch.Tensor]:
    """Standardise the targets; return them with their covariance with x, of all side by side."""
    entries = sum(len(receiver.y_E) for receiver in moments.receivers.values())
    cross_MD = moments.x_M.new_empty(len(moments.x_M), entries)
    targets, start = {}, 0
    for name, receiver in moments.receivers.items():
        part = slice(start, start + len(receiver.y_E))
        start = part.stop
        mean_E = receiver.y_E / moments.count
        variance_E = (receiver.yy_E / moments.count - mean_E.square()).clamp(min=0)
        std_E = variance_E.sqrt().clamp(min=STD_FLOOR)
        # A view: what is computed in it lands in the matrix of all receivers.
        cross_ME = cross_MD[:, part]
        torch.div(receiver.xy_ME, moments.count, out=cross_ME)
        # Cov(x, y) / std = (E[x yᵀ] − E[x] E[y]ᵀ) / std
        cross_ME.addr_(moments.x_M, mean_E, alpha=-1 / moments.count).div_(std_E)
        root_EE = None
        if metric == "gradients":
            root_EE = _root(name, receiver, std_E, floor)
        targets[name] = _Targets(part, mean_E, std_E, variance_E / std_E.square(), root_EE)
    return targets, cross_MD


def _root(name: str, receiver: ReceiverMoments, std_E: torch.Tensor, floor: float) -> torch.Tensor:
    """Return the lower triangular root of the metric of one receiver's standardised targets."""
    # A standardised target is y / std, so the gradient by it is g · std.
    metric_EE = receiver.gradient_EE * std_E * std_E[:, None]
    mean = metric_EE.diagonal().mean().item()
    if not mean > 0:
        raise ClosedFormError(
            f"the metric of gradients needs gradients that are not 0 for {name}, got "
            f"{receiver.gradients} rows with a mean square of {mean:.3g}; add some by "
            f"Moments.add_gradients, or use metric plain"
        )
    # The mean of its diagonal is 1, to which the floor is a share.
    metric_EE.div_(mean).diagonal().add_(floor)
    return _cholesky(metric_EE, "floor", floor)


def _in_metric(
    fit_DD: torch.Tensor, targets: Mapping[str, _Targets], weights: Mapping[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Turn the fits' covariance, in place, into that of the fits in their metrics, scaled.

    Scales are returned, too: each receiver's energy, the trace of its block, is its weight.
    """
    scales = {}
    for name, one in targets.items():
        # Fits f become f C: their covariance F becomes Cᵀ F C, and each receiver has its own C.
        if one.root_EE is not None:
            fit_DD[one.part] = one.root_EE.T @ fit_DD[one.part]
            fit_DD[:, one.part] = fit_DD[:, one.part] @ one.root_EE
        energy = fit_DD.diagonal()[one.part].sum().item()
        if not energy > 1e-12:
            raise ClosedFormError(
                f"the sender's states must tell something of the targets of {name}, got an energy "
                f"of {energy:.3g}; check that targets differ from token to token"
            )
        # Rows and columns are both scaled, so the trace of the block becomes the weight.
        scales[name] = math.sqrt(weights.get(name, 1.0) / energy)
        fit_DD[one.part] *= scales[name]
        fit_DD[:, one.part] *= scales[name]
    return fit_DD, scales


def _cholesky(matrix: torch.Tensor, knob: str, value: float) -> torch.Tensor:
    """Return the lower Cholesky factor; ``knob`` is what makes the matrix positive definite."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ClosedFormError(
            f"{knob} must make a matrix of {len(matrix)} rows positive definite, got {value:g}; "
            f"use a larger one"
        )
    return root


def _check(
    moments: Moments,
    codes: int,
    ridge: float,
    floor: float,
    weights: Mapping[str, float],
    metric: Metric,
) -> None:
    """Raise :class:`ClosedFormError` for what cannot be solved."""
    entries = sum(len(receiver.y_E) for receiver in moments.receivers.values())
    most = min(entries, len(moments.x_M))
    if not 1 <= codes <= most:
        raise ClosedFormError(
            f"codes must lie from 1 to the {most} directions that {len(moments.x_M)} entries of "
            f"the states tell of {entries} entries of targets, got {codes}"
        )
    if moments.count < codes:
        raise ClosedFormError(
            f"there must be as many tokens as codes ({codes}), got {moments.count}; gather moments "
            f"of more texts"
        )
    if metric not in ("gradients", "plain"):
        raise ClosedFormError(f"metric must be gradients or plain, got {metric}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ClosedFormError(f"ridge must be 0 or more, got {ridge}; 1e-3 is usual")
    if not (math.isfinite(floor) and floor > 0):
        raise ClosedFormError(f"floor must be above 0, got {floor}; 0.02 is usual")
    for name, weight in weights.items():
        if name not in moments.receivers or not (math.isfinite(weight) and weight > 0):
            raise ClosedFormError(
                f"weights must be above 0, for receivers of the moments "
                f"({', '.join(moments.receivers)}), got {weight} for {name}"
            )
    for name, total in moments.tensors().items():
        if not math.isfinite(total.sum().item()):
            raise ClosedFormError(
                f"moments must be finite, got {total.sum().item()} in {name}; look for a text "
                f"that overflows a model's number format"
            )
