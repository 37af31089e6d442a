"""A frozen causal LM: its weights, its tokenizer, its embeddings and its output head."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import ReceiverConfig
from latentwire.models.pooling import overlap_means
from latentwire.models.receiver_attention import speed_up
from latentwire.pretrained.quantization import keep_layout, quantization_config
from latentwire.pretrained.weights import (
    ReceiverError,
    fingerprint,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    receiver_shape,
)
from latentwire.prompts.batch import Batch
from latentwire.tokens import token_bytes


class FrozenLM(nn.Module):
    """One receiver's model as it is loaded, checked and never changed.

    Its weights do not require grad, and :meth:`fingerprint` proves that they do not change.
    """

    def __init__(self, config: ReceiverConfig) -> None:
        """Load weights and tokenizer. Raises :class:`ReceiverError` with cause and next move."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        super().__init__()
        self.config, self.name = config, config.name
        receiver_shape(config)  # refuses what cannot be one, before its weights are read
        self.tokenizer = load_tokenizer(config)
        device = pick_device(config.device)
        options: dict[str, Any] = {}
        if config.quantization != "none":
            options["quantization_config"] = quantization_config(config)
        if config.device_map != "none":
            options["device_map"] = config.device_map
        elif options:  # quantised weights are made on their device and stay there
            options["device_map"] = {"": device}
        self.lm = load_model(
            AutoModelForCausalLM,
            config,
            dtype=pick_dtype(config.dtype, device),
            attn_implementation=config.attn_implementation,
            **options,
        )
        if not options:
            self.lm.to(device)
        self.lm.eval().requires_grad_(False)
        if self.lm.device.type == "cpu" and self.lm.dtype == torch.bfloat16:
            speed_up(self.lm)
        # generate takes its defaults from here, and some models come with a penalty on repetition:
        # no greedy decoding.
        self.lm.generation_config = GenerationConfig()
        if config.quantization == "nf4":
            keep_layout(self.lm)
        self.token_bytes = token_bytes(self.tokenizer)
        self.embed_tokens = self.lm.get_input_embeddings()
        self.head = self.lm.get_output_embeddings()
        self.head.register_forward_pre_hook(_packed)
        text_config = self.lm.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        self.most_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        # A config that names no types of layers means its window for all of them.
        kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
        window = getattr(text_config, "sliding_window", None)
        self.window: int | None = window if "sliding_attention" in kinds else None
        """Positions that the layers with the shortest sight see; ``None``: all."""
        self._check_model()

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, and of the states and logits that are returned.

        With ``device_map`` layers may be elsewhere.
        """
        return self.embed_tokens.weight.device

    @property
    def width(self) -> int:
        """D, the width of one soft-prompt vector."""
        return self.embed_tokens.embedding_dim

    @property
    def embed_rms(self) -> float:
        """Root mean square of the embeddings as layers read them (Gemma scales its table)."""
        # About 4096 ids, evenly spread over the vocabulary, stand for all of it.
        vocabulary = self.embed_tokens.num_embeddings
        ids = torch.arange(0, vocabulary, max(1, vocabulary // 4096), device=self.device)
        return self.embed_tokens(ids).float().square().mean().sqrt().item()

    def fingerprint(self) -> str:
        """Return the SHA-256 over names, shapes, types and bytes of all weights and buffers."""
        return fingerprint(self.lm)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a frozen receiver has no dropout to switch on."""
        return super().train(False)

    def embed(self, batch: Batch, soft_ND: torch.Tensor | None) -> torch.Tensor:
        """Return input embeddings ``[B, S, D]``, with soft vectors in the batch's slots.

        Row by row, the slots take ``soft_ND`` in order (leading dimensions are flattened); ``None``
        for text prompts. Raises :class:`ReceiverError` for a prompt that is longer than the model
        can read.
        """
        self.check_length(batch.attention_BS.shape[1])
        e_BSD = self.embed_tokens(batch.ids_BS.to(self.device))
        if soft_ND is None:
            return e_BSD
        slots_BS = batch.slots_BS.to(self.device)
        if (slots := int(slots_BS.sum())) != soft_ND.shape[:-1].numel():
            raise ValueError(
                f"a soft prompt must fill its slots, got {tuple(soft_ND.shape)} for {slots} slots"
            )
        # Slots are filled in the order of their places: row by row, and from left to right.
        return e_BSD.masked_scatter(slots_BS[..., None], soft_ND.to(self.device, e_BSD.dtype))

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the embeddings ``[…, D]`` of token ids."""
        return self.embed_tokens(ids.to(self.device))

    def text_embeddings(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token embeddings ``[B, T, D]`` of rows of ids, and each token's bytes ``[B, T]``.

        Bytes are 0 after a row's end.
        """
        rows = [torch.tensor(row, dtype=torch.long) for row in ids]
        ids_BT = pad_sequence(rows, batch_first=True).to(self.device)
        bytes_BT = pad_sequence([self.token_bytes[row] for row in rows], batch_first=True)
        return self.embed_tokens(ids_BT), bytes_BT.to(self.device)

    @torch.no_grad()
    def span_embeddings(self, ids: list[list[int]], span_BL2: torch.Tensor) -> torch.Tensor:
        """Average the texts' token embeddings over spans of their bytes, ``[B, L, D]``.

        See :func:`~latentwire.models.pooling.overlap_means`.
        """
        e_BTD, bytes_BT = self.text_embeddings(ids)
        return overlap_means(e_BTD, bytes_BT, span_BL2.to(e_BTD.device))

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Map last states ``[N, D]`` to logits ``[N, V]``, on the device of the states."""
        logits_NV = self.head(hidden_ND.to(self.head.weight.device)).to(hidden_ND.device)
        if self.softcap is None:
            return logits_NV
        # c · tanh(x / c) keeps logits between −c and c (Gemma 2).
        return self.softcap * torch.tanh(logits_NV / self.softcap)

    def check_length(self, positions: int) -> None:
        """Raise :class:`ReceiverError` for more positions than the model reads."""
        if self.most_positions is not None and positions > self.most_positions:
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} reads at most {self.most_positions:,} "
                f"positions, a prompt and its answer take {positions:,}; lower "
                f"data.max_context_bytes, or name another receiver"
            )

    @torch.no_grad()
    def _check_model(self) -> None:
        """Raise :class:`ReceiverError` where :meth:`logits` are not the model's own.

        So too for a vocabulary without embeddings, and a model that keeps no cache.
        """
        if (size := len(self.tokenizer)) > self.embed_tokens.num_embeddings:
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} must have an embedding for each "
                f"token, its tokenizer has {size:,} and it {self.embed_tokens.num_embeddings:,}; "
                f"give it its own tokenizer"
            )
        ids_BS = torch.arange(1, 9, device=self.device)[None]
        expected_SV = self.lm(input_ids=ids_BS).logits[0].float()
        output = self.lm.base_model(inputs_embeds=self.embed_tokens(ids_BS), use_cache=True)
        if getattr(output, "past_key_values", None) is None:
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} keeps no keys and values to go on "
                f"from; name a causal LM with attention, no encoder"
            )
        by_embeds_SV = self.logits(output.last_hidden_state[0]).float()
        atol = 1e-2 * float(expected_SV.abs().max())
        if not torch.allclose(expected_SV, by_embeds_SV, atol=atol):
            # Wrong from embeddings: is it right from ids, or are its logits scaled?
            output = self.lm.base_model(input_ids=ids_BS)
            by_ids_SV = self.logits(output.last_hidden_state[0]).float()
            if torch.allclose(expected_SV, by_ids_SV, atol=atol):
                raise ReceiverError(
                    f"receiver {self.name}: {self.config.model} must read embeddings as it reads "
                    f"their token ids, and does not; name a model that looks nothing else up by "
                    f"them"
                )
            largest = float((expected_SV - by_embeds_SV).abs().max())
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} scales its logits in a way LMWrapper "
                f"does not know (largest difference {largest:.3g}); its architecture needs a case "
                f"in logits"
            )


def _packed(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Lay the head's input side by side in memory.

    transformers hands it a slice of the prompt's states, for which a CPU copies the head's weight
    once per row.
    """
    return (inputs[0].contiguous(), *inputs[1:])
