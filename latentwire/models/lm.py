"""A frozen causal LM that reads soft prompts."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import ReceiverConfig
from latentwire.models.decoded import Decoded
from latentwire.models.pooling import overlap_means
from latentwire.models.slots import added_to_slots
from latentwire.models.tokens import token_bytes
from latentwire.models.weights import (
    ReceiverError,
    fingerprint,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    receiver_shape,
)
from latentwire.prompts.sequences import Batch

if TYPE_CHECKING:  # at run time where a model is loaded: see models/weights.py
    from transformers import Cache
    from transformers.modeling_layers import GradientCheckpointingLayer


def quantization_config(config: ReceiverConfig) -> Any:
    """transformers' settings for int8 (torchao) or NF4 (bitsandbytes). Raises :class:`ReceiverError` without the package."""
    package = "torchao" if config.quantization == "int8" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise ReceiverError(
            f"receiver {config.name}: quantization {config.quantization} needs {package}, which is not installed; "
            f"pip install 'latentwire[quantization]', or set quantization: none"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if config.quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def keep_layout(lm: nn.Module) -> None:
    """Keep 4-bit weights as they were made.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 arranges them anew in the first forward pass, and undoes only half of that when
    their state is read (for a fingerprint, say): the next pass gives other answers.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class Stopwatch:
    """A streamer for transformers that notes when generation hands out tokens: first the prompt, then those of each step."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, and after each step."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called once at the end."""


class LMWrapper(nn.Module):
    """One receiver: soft prompt and targets in, logits at the supervised positions out; and generation.

    Differentiable in the soft prompt, never in its own weights: they do not require grad, and :meth:`fingerprint`
    proves that they do not change.
    """

    def __init__(self, config: ReceiverConfig) -> None:
        """Load weights and tokenizer. Raises :class:`ReceiverError` with the cause and the next move."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        super().__init__()
        self.config, self.name = config, config.name
        receiver_shape(config)  # refuses what cannot be one, before its weights are read
        self.tokenizer = load_tokenizer(config)
        device = pick_device(config.device)
        options: dict[str, Any] = (
            {"quantization_config": quantization_config(config)} if config.quantization != "none" else {}
        )
        if config.device_map != "none":
            options["device_map"] = config.device_map
        elif options:
            options["device_map"] = {"": device}  # quantised weights are made on their device and stay there
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
        # What generate is not told it takes from here, and some models come with a penalty on repetition: no greedy decoding.
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
        self._head: tuple[list[int], Cache] | None = None
        self._recomputed: list[GradientCheckpointingLayer] = []
        self._check_model()

    # -------------------------------------------------------------------------------------------------- properties

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and where states and logits come back to; with ``device_map`` layers may be elsewhere."""
        return self.embed_tokens.weight.device

    @property
    def width(self) -> int:
        """D, the width of one soft-prompt vector."""
        return self.embed_tokens.embedding_dim

    @property
    def embed_rms(self) -> float:
        """Root mean square of the entries of the embeddings as the model reads them (Gemma scales its table)."""
        vocabulary = self.embed_tokens.num_embeddings
        ids = torch.arange(0, vocabulary, max(1, vocabulary // 4096), device=self.device)
        return self.embed_tokens(ids).float().square().mean().sqrt().item()

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, types and bytes of all weights and buffers."""
        return fingerprint(self.lm)

    # ----------------------------------------------------------------------------------------------------- forward

    def train(self, mode: bool = True) -> LMWrapper:
        """Stays in evaluation mode: a frozen receiver has no dropout to switch on."""
        return super().train(False)

    def embed(self, batch: Batch, soft_ND: torch.Tensor | None) -> torch.Tensor:
        """Input embeddings ``[B, S, D]``: token embeddings with the soft vectors laid over the batch's slots.

        Row by row, the slots take ``soft_ND`` in order (leading dimensions are flattened); ``None`` for text prompts. Raises
        :class:`ReceiverError` for a prompt that is longer than the model can read.
        """
        self._check_length(batch.attention_BS.shape[1])
        e_BSD = self.embed_tokens(batch.ids_BS.to(self.device))
        if soft_ND is None:
            return e_BSD
        slots_BS = batch.slots_BS.to(self.device)
        if (slots := int(slots_BS.sum())) != soft_ND.shape[:-1].numel():
            raise ValueError(f"a soft prompt must fill its slots, got {tuple(soft_ND.shape)} for {slots} slots")
        return e_BSD.masked_scatter(slots_BS[..., None], soft_ND.to(self.device, e_BSD.dtype))

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[…, D]`` of token ids."""
        return self.embed_tokens(ids.to(self.device))

    def added_to_slots(self, added_NE: torch.Tensor, latents_RS: torch.Tensor) -> AbstractContextManager[None]:
        """Add to keys and values where latents stand, while it reads (:func:`~latentwire.models.slots.added_to_slots`)."""
        return added_to_slots(self.lm, added_NE, latents_RS)

    def text_embeddings(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token embeddings ``[B, T, D]`` of rows of ids, and the bytes ``[B, T]`` that each stands for, 0 after their end."""
        rows = [torch.tensor(row, dtype=torch.long) for row in ids]
        ids_BT = pad_sequence(rows, batch_first=True).to(self.device)
        bytes_BT = pad_sequence([self.token_bytes[row] for row in rows], batch_first=True)
        return self.embed_tokens(ids_BT), bytes_BT.to(self.device)

    @torch.no_grad()
    def span_embeddings(self, ids: list[list[int]], span_BL2: torch.Tensor) -> torch.Tensor:
        """Means ``[B, L, D]`` of the texts' token embeddings over spans of their bytes (:func:`overlap_means`)."""
        e_BTD, bytes_BT = self.text_embeddings(ids)
        return overlap_means(e_BTD, bytes_BT, span_BL2.to(e_BTD.device))

    def supervised_logits(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[N, V]`` that predict ``batch.target_N``; no other position meets the head."""
        return self.logits(self.supervised_states(batch, soft_ND)[0])

    def supervised_states(
        self, batch: Batch, soft_ND: torch.Tensor | None = None, depths: Sequence[float] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Last states ``[N, D]`` where ``batch.target_N`` is predicted, for :meth:`logits`; and those at fractions of the depth.

        A batch without its head (:meth:`read_head`) finds the head's keys and values ready.
        """
        cache = self._head_cache(batch)
        for layer in self._recomputed:  # the layer's own flag switches it on; no dropout inside follows
            layer.training = torch.is_grad_enabled() and cache is None
        output = self.lm.base_model(
            inputs_embeds=self.embed(batch, soft_ND),
            attention_mask=batch.attention_BS.to(self.device),
            past_key_values=cache,
            use_cache=False,
            output_hidden_states=bool(depths),
        )

        def at_targets(state_BSD: torch.Tensor) -> torch.Tensor:
            return state_BSD.flatten(0, 1).index_select(0, batch.predict_N.to(state_BSD.device)).to(self.device)

        layers = [output.hidden_states[round(depth * (len(output.hidden_states) - 1))] for depth in depths]
        return at_targets(output.last_hidden_state), [at_targets(layer) for layer in layers]

    def recompute_activations(self) -> None:
        """Keep one state per layer for the backward pass and compute the others again (arXiv 1604.06174).

        Features must stay attached until then.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.lm.activation_checkpointing_enable({"use_reentrant": False})
        self._recomputed = [module for module in self.lm.modules() if isinstance(module, GradientCheckpointingLayer)]

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let ``torch.compile`` compile_layers the receiver's layers; the first steps take minutes."""
        self.lm.base_model.compile(dynamic=True, backend=backend)

    @torch.no_grad()
    def read_head(self, batch: Batch) -> Batch:
        """The batch without its head, whose keys and values are computed where they are not known yet.

        Call it where no feature is attached: the head is read as plain text, once for as long as it stays the same.
        """
        batch = batch.after_head()
        assert batch.head_H is not None
        ids = batch.head_H.tolist()
        if ids and (self._head is None or self._head[0] != ids):
            self._head = ids, self.lm.base_model(input_ids=batch.head_H[None], use_cache=True).past_key_values
        return batch

    def _head_cache(self, batch: Batch) -> Cache | None:
        """The keys and values that :meth:`read_head` left, for every row."""
        if batch.head_H is None or not len(batch.head_H):
            return None
        if self._head is None or self._head[0] != batch.head_H.tolist():
            raise ValueError(f"receiver {self.name} has not read this batch's head; take it off with read_head")
        cache = copy.deepcopy(self._head[1])  # a forward appends to the cache that it is given
        cache.batch_repeat_interleave(len(batch.ids_BS))
        return cache

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Last states ``[N, D]`` → logits ``[N, V]``, on the same device wherever the head is."""
        logits_NV = self.head(hidden_ND.to(self.head.weight.device)).to(hidden_ND.device)
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    @torch.no_grad()
    def generate(
        self, batch: Batch, stop_ids: tuple[int, ...], max_new_tokens: int, soft_ND: torch.Tensor | None = None
    ) -> Decoded:
        """Greedy continuations of left-padded prompts."""
        from transformers import GenerationConfig

        self._check_length(batch.attention_BS.shape[1] + max_new_tokens)
        for layer in self._recomputed:
            layer.training = False  # decoding needs its cache
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
        )
        watch = Stopwatch()
        output_BK = self.lm.generate(
            inputs_embeds=self.embed(batch, soft_ND),
            attention_mask=batch.attention_BS.to(self.device),
            generation_config=settings,
            streamer=watch,
        )
        rows = [_until(row, stop_ids) for row in output_BK.tolist()]
        start, _, first, *_ = watch.times
        return Decoded(rows, 1000 * (first - start), 1000 * (watch.times[-1] - first))

    def _check_length(self, positions: int) -> None:
        if self.most_positions is not None and positions > self.most_positions:
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} reads at most {self.most_positions:,} positions, a prompt and its answer "
                f"take {positions:,}; lower data.max_context_bytes, or name another receiver"
            )

    @torch.no_grad()
    def _check_model(self) -> None:
        """Our head (hidden states, output embedding, soft cap) must give the model's own logits, and reading must leave a cache."""
        if (size := len(self.tokenizer)) > self.embed_tokens.num_embeddings:
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} must have an embedding for each token, its tokenizer has {size:,} and it "
                f"{self.embed_tokens.num_embeddings:,}; give it its own tokenizer"
            )
        ids_BS = torch.arange(1, 9, device=self.device)[None]
        own = self.lm(input_ids=ids_BS).logits[0].float()
        output = self.lm.base_model(inputs_embeds=self.embed_tokens(ids_BS), use_cache=True)
        if getattr(output, "past_key_values", None) is None:
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} keeps no keys and values to go on from; name a causal LM with "
                f"attention, no encoder"
            )
        ours = self.logits(output.last_hidden_state[0]).float()
        atol = 1e-2 * float(own.abs().max())
        if not torch.allclose(own, ours, atol=atol):
            by_ids = self.logits(self.lm.base_model(input_ids=ids_BS).last_hidden_state[0]).float()
            if torch.allclose(own, by_ids, atol=atol):
                raise ReceiverError(
                    f"receiver {self.name}: {self.config.model} must read embeddings as it reads their token "
                    f"ids, and does not; name a model that looks nothing else up by them"
                )
            raise ReceiverError(
                f"receiver {self.name}: {self.config.model} scales its logits in a way LMWrapper does not know "
                f"(largest difference {float((own - ours).abs().max()):.3g}); its architecture needs a case in logits"
            )


def _packed(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The head's input side by side in memory.

    transformers hands it a slice of the prompt's states, for which a CPU copies the head's weight once per row.
    """
    return (inputs[0].contiguous(), *inputs[1:])


def _until(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids
