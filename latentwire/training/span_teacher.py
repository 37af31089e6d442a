"""Keys and values of the text, averaged over each latent's span: targets for the latent's own.

A latent stands in a receiver's cache for a span of the text. Here the teacher reads the text and the
latent's keys and values are compared with the means of the span's, in every layer. Keys are those
before rotary positions, so that neither side's place in its prompt matters.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.nn.utils.rnn import pad_sequence

from latentwire import loading
from latentwire.config import PrefixConfig
from latentwire.data.readers import teaching_reader, tuned_text
from latentwire.model import LatentWire
from latentwire.models.pooling import overlap_means
from latentwire.models.prefix import Prefix
from latentwire.models.slots import recorded
from latentwire.prompts.batch import collate
from latentwire.storage import Place, local


class SpanTeacher:
    """Reads texts by the receivers of a wire, as they are or behind their tuned readers' prefixes."""

    def __init__(self, wire: LatentWire, train: Place | None) -> None:
        """Load the prefixes of tuned readers, where those teach.

        ``train``: the run's training shards, beside which tuned readers lie.
        """
        self.wire = wire
        self.prefixes: dict[str, Prefix] = {}
        if wire.run.losses.kd_teacher == "untuned":
            return
        assert train is not None, "tuned readers lie beside the training shards"
        tuned = tuned_text(wire.run)
        config = PrefixConfig(tokens=tuned.tokens, layers=tuned.layers)
        for lm in wire.local_receivers():
            skeleton = lm.skeleton() if tuned.layers else None
            prefix = Prefix(config, lm.width, lm.embed_rms, skeleton).to(lm.device)
            with local(teaching_reader(wire.run, lm.config, train)) as folder:
                loading.fill(folder / f"prefixes/{lm.name}.safetensors", prefix)
            self.prefixes[lm.name] = prefix

    @torch.no_grad()
    def targets(
        self, receiver: str, ids: list[list[int]], span_BL2: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the means over spans of the text's keys and values.

        Args:
            receiver: the one that reads. Call it where no feature is attached.
            ids: its tokens of each text.
            span_BL2: start and end of each latent's span, as shares of the text.

        Returns:
            ``[B, L, E]`` for keys and for values of every layer, in order.
        """
        lm, builder = self.wire.local_receiver(receiver), self.wire.builders[receiver]
        prefix = self.prefixes.get(receiver)
        tokens = 0 if prefix is None else len(prefix.unit_PD)
        batch = collate([builder.text_alone(row, tokens) for row in ids]).to(lm.device)
        rows, width = batch.ids_BS.shape
        length_B = torch.tensor([len(row) for row in ids], device=lm.device)
        start = len(builder.head_ids) + tokens
        # True at the text's own tokens, after the template's head and the prefix: [B, S].
        place_S = torch.arange(width, device=lm.device)
        text_BS = (place_S >= start) & (place_S < start + length_B[:, None])
        with ExitStack() as stack:
            soft_ND = None
            if prefix is not None:
                # [P, D] → [B · P, D]: each row has the same prefix.
                soft_ND = prefix().repeat(rows, 1)
                stack.enter_context(prefix.attached(lm, batch))
            entries = stack.enter_context(recorded(lm.lm, text_BS))
            # For its side effect: ``recorded`` takes keys and values as the layers make them.
            lm.supervised_states(batch, soft_ND)
        # Bytes behind each token say which part of the text, and so which latents' spans, it is in.
        bytes_BT = pad_sequence([lm.token_bytes[row] for row in ids], batch_first=True)
        means = []
        for entry_NE in entries:
            # [N, E], text after text → [B, T, E].
            e_BTE = pad_sequence(entry_NE.to(lm.device).split(length_B.tolist()), batch_first=True)
            spans = overlap_means(e_BTE.float(), bytes_BT.to(lm.device), span_BL2.to(lm.device))
            means.append(spans)
        return means


def slot_distance(own: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Return the squared distance ``[N]`` of each latent's keys and values to its targets.

    It is relative to the target's own mean square and averaged over keys, values and layers: 1 is
    the distance of zeros.

    Args:
        own: ``[N, E]`` for keys and for values of every layer.
        targets: the same of the text.
    """
    distances = []
    for own_NE, target_NE in zip(own, targets, strict=True):
        target_NE = target_NE.to(own_NE.device).float()
        square_N = (own_NE.float() - target_NE).square().mean(-1)
        # ‖own − target‖² / ‖target‖². Layers may be on several devices.
        target_square_N = target_NE.square().mean(-1).clamp(min=1e-12)
        distances.append((square_N / target_square_N).to(own[0].device))
    return torch.stack(distances).mean(0)
