"""A frozen causal LM that reads soft prompts."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import ReceiverConfig
from latentwire.models import head_slots
from latentwire.models.decoded import Decoded, Sampling, Watch
from latentwire.models.head_slots import HeadEntries, Heads
from latentwire.models.key_heads import check_rotary
from latentwire.models.pooling import overlap_means
from latentwire.models.receiver_attention import speed_up
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
from latentwire.prompts.batch import Batch

if TYPE_CHECKING:  # at run time where a model is loaded: see models/weights.py
    from transformers import Cache
    from transformers.modeling_layers import GradientCheckpointingLayer


def quantization_config(config: ReceiverConfig) -> Any:
    """Return transformers' settings for int8 (torchao) or NF4 (bitsandbytes).

    Raises :class:`ReceiverError` where the package is not installed.
    """
    package = "torchao" if config.quantization == "int8" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise ReceiverError(
            f"receiver {config.name}: quantization {config.quantization} needs {package}, which "
            f"is not installed; pip install 'latentwire[quantization]', or set quantization: none"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def keep_layout(lm: nn.Module) -> None:
    """Keep the memory layout of 4-bit weights.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 arranges them anew in the first forward pass, and
    undoes only half of that when their state is read (for a fingerprint, say): the next pass gives
    other answers.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class Stopwatch:
    """A streamer for transformers that notes the times of the prompt and of each step's tokens."""

    def __init__(self, watch: Watch | None = None) -> None:
        """``watch``: is told each step's tokens."""
        self.times = [time.perf_counter()]
        self.watch = watch

    def put(self, value: torch.Tensor) -> None:
        """Note the time; transformers calls it with the prompt, and after each step."""
        self.times.append(time.perf_counter())
        if self.watch is not None and len(self.times) > 2:
            self.watch(value.tolist())

    def end(self) -> None:
        """Do nothing; transformers calls it once at the end."""


@dataclass(frozen=True)
class Past:
    """What a receiver keeps of the beginnings of sequences: their keys and values."""

    cache: Cache
    attention_MS: torch.Tensor
    """1 at real positions."""
    entries: HeadEntries | None = None
    """What some heads see besides, where messages stand in those alone."""

    def of_rows(self, batch: Batch) -> tuple[Cache, torch.Tensor]:
        """Return keys and values for rows that go on from these beginnings, and all their attention."""
        assert batch.past_R is not None, "these rows go on from nothing"
        past_R = batch.past_R.to(self.attention_MS.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:  # each may be on a device of its own
            layer.batch_select_indices(past_R.to(layer.device))  # a copy, with its gradient
        rest_BS = batch.attention_BS.to(self.attention_MS.device)
        return cache, torch.cat((self.attention_MS[past_R], rest_BS), 1)

    def entries_of(self, batch: Batch) -> HeadEntries | None:
        """Return what some heads see besides, for rows that go on from these beginnings."""
        if self.entries is None:
            return None
        assert batch.past_R is not None, "these rows go on from nothing"
        return self.entries.rows(batch.past_R.to(self.attention_MS.device))


class LMWrapper(nn.Module):
    """One receiver: logits at the supervised positions of a soft prompt, and generation.

    Differentiable in the soft prompt, never in its own weights: they do not require grad, and
    :meth:`fingerprint` proves that they do not change.
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
        kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
        window = getattr(text_config, "sliding_window", None)
        self.window: int | None = window if "sliding_attention" in kinds else None
        """Positions that the layers with the shortest sight see; ``None``: all."""
        self._head: tuple[list[int], Cache] | None = None
        self._at_slots: tuple[torch.Tensor, Heads] | None = None
        self._heads_checked = False
        self._recomputed: list[GradientCheckpointingLayer] = []
        self._check_model()

    # ----------------------------------------------------------------------------------- properties

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
        vocabulary = self.embed_tokens.num_embeddings
        ids = torch.arange(0, vocabulary, max(1, vocabulary // 4096), device=self.device)
        return self.embed_tokens(ids).float().square().mean().sqrt().item()

    def fingerprint(self) -> str:
        """Return the SHA-256 over names, shapes, types and bytes of all weights and buffers."""
        return fingerprint(self.lm)

    # -------------------------------------------------------------------------------------- forward

    def train(self, mode: bool = True) -> LMWrapper:
        """Stay in evaluation mode: a frozen receiver has no dropout to switch on."""
        return super().train(False)

    def embed(self, batch: Batch, soft_ND: torch.Tensor | None) -> torch.Tensor:
        """Return input embeddings ``[B, S, D]``, with soft vectors in the batch's slots.

        Row by row, the slots take ``soft_ND`` in order (leading dimensions are flattened); ``None``
        for text prompts. Raises :class:`ReceiverError` for a prompt that is longer than the model
        can read.
        """
        self._check_length(batch.attention_BS.shape[1])
        e_BSD = self.embed_tokens(batch.ids_BS.to(self.device))
        if soft_ND is None:
            return e_BSD
        slots_BS = batch.slots_BS.to(self.device)
        if (slots := int(slots_BS.sum())) != soft_ND.shape[:-1].numel():
            raise ValueError(
                f"a soft prompt must fill its slots, got {tuple(soft_ND.shape)} for {slots} slots"
            )
        return e_BSD.masked_scatter(slots_BS[..., None], soft_ND.to(self.device, e_BSD.dtype))

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the embeddings ``[…, D]`` of token ids."""
        return self.embed_tokens(ids.to(self.device))

    def added_to_slots(
        self, added_NE: torch.Tensor, latents_RS: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Add ``added_NE`` to keys and values at the latents, until this context ends.

        See :func:`latentwire.models.slots.added_to_slots`.
        """
        return added_to_slots(self.lm, added_NE, latents_RS)

    @contextmanager
    def heads_at_slots(self, kv_NE: torch.Tensor, heads: Heads) -> Iterator[None]:
        """Let messages stand in these heads alone, until this context ends.

        Sequences with latents are then read without their places, and ``soft_ND`` has no vectors
        for them.

        Args:
            kv_NE: keys before rotary positions and values, for each latent of each message; see
                :func:`latentwire.models.head_slots.entries_of`.
            heads: the heads.
        """
        self.check_heads()
        assert self._at_slots is None, "messages stand in the heads already"
        self._at_slots = kv_NE, heads
        try:
            yield
        finally:
            self._at_slots = None

    def check_heads(self) -> None:
        """Raise :class:`ReceiverError` where keys in some heads alone would be turned wrongly."""
        if not self._heads_checked:
            check_rotary(self.lm, self.name)
            self._heads_checked = True

    def _beside(self, batch: Batch) -> tuple[Batch, HeadEntries | None]:
        """Take latents that stand in some heads alone out of a batch."""
        if self._at_slots is None or not bool(batch.latents_BS.any()):
            return batch, None
        kv_NE, heads = self._at_slots
        longest = int(batch.attention_BS.sum(1).max())
        self._check_length(longest)
        self._check_sight(longest)
        entries = head_slots.entries_of(
            self.lm, heads, kv_NE.to(self.device), batch, self.embed_tokens.weight.dtype
        )
        return batch.without_latents(), entries

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

    def supervised_logits(
        self, batch: Batch, soft_ND: torch.Tensor | None = None, past: Past | None = None
    ) -> torch.Tensor:
        """Return logits ``[N, V]`` for ``batch.target_N``; no other position meets the head."""
        return self.logits(self.supervised_states(batch, soft_ND, past=past)[0])

    def supervised_states(
        self,
        batch: Batch,
        soft_ND: torch.Tensor | None = None,
        depths: Sequence[float] = (),
        past: Past | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the states ``[N, D]`` that predict ``batch.target_N``.

        First those of the last layer, for :meth:`logits`; then those at each of ``depths``,
        fractions of all layers. A batch without its head (:meth:`read_head`) finds the head's keys
        and values ready, one that goes on from others (:meth:`Batch.parted`) those in ``past``.
        """
        batch, entries = self._beside(batch)
        cache, attention_BS = self._head_cache(batch), batch.attention_BS.to(self.device)
        position_BS = batch.position_BS  # None: counted from the beginning
        if past is not None:
            cache, attention_BS = past.of_rows(batch)
            entries = past.entries_of(batch)
            assert batch.end_R is not None
            # Padding stands between what was read and this: positions go on as if it did not.
            width = batch.ids_BS.shape[1]
            position_BS = batch.end_R.to(self.device)[:, None] + torch.arange(
                width, device=self.device
            )
        for layer in self._recomputed:
            # The layer's own flag switches recomputing on; no dropout inside follows it.
            layer.training = torch.is_grad_enabled() and cache is None
        with head_slots.seen(self.lm, entries):
            output = self.lm.base_model(
                inputs_embeds=self.embed(batch, soft_ND),
                attention_mask=attention_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=False,
                output_hidden_states=bool(depths),
            )

        def at_targets(state_BSD: torch.Tensor) -> torch.Tensor:
            predict_N = batch.predict_N.to(state_BSD.device)  # flat indices into B × S
            return state_BSD.flatten(0, 1).index_select(0, predict_N).to(self.device)

        # hidden_states holds the embeddings, then each layer's output.
        layers = [
            output.hidden_states[round(depth * (len(output.hidden_states) - 1))] for depth in depths
        ]
        return at_targets(output.last_hidden_state), [at_targets(layer) for layer in layers]

    def prefill(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> Past:
        """Read the beginnings of sequences, and keep their keys and values, with their gradient.

        ``batch``: the first of :meth:`Batch.parted`, with or without its head.
        """
        for layer in self._recomputed:
            layer.training = False  # what is computed again leaves no cache
        messages = len(batch.ids_BS)
        batch, entries = self._beside(batch)
        if entries is not None and messages > 1:  # what is left is the same before every message
            batch = batch.row(0)
            soft_ND = None if soft_ND is None else soft_ND[: len(soft_ND) // messages]
        cache, attention_MS = self._head_cache(batch), batch.attention_BS.to(self.device)
        if batch.ids_BS.shape[1]:  # else there is nothing after the head, as in a closed book
            output = self.lm.base_model(
                inputs_embeds=self.embed(batch, soft_ND),
                attention_mask=attention_MS,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
        assert cache is not None, "these sequences begin with nothing"
        if entries is not None and messages > 1:
            cache.batch_repeat_interleave(messages)
            attention_MS = attention_MS.expand(messages, -1)
        return Past(cache, attention_MS, entries)

    def _check_sight(self, positions: int) -> None:
        if not self.may_part(positions):
            raise ReceiverError(
                f"receiver {self.name} has layers that see {self.window} positions, a message in some heads alone needs all of "
                f"its prompt's {positions:,} to be seen; lower data.max_context_bytes, or choose adapter.kind mlp"
            )

    def may_part(self, positions: int) -> bool:
        """Return whether sequences of so many positions, padding included, may be read in two passes.

        A layer with a window counts padding between the passes as positions: it must see all of them.
        """
        return self.window is None or positions < self.window

    def recompute_activations(self) -> None:
        """Keep one state per layer for the backward pass and compute the others again.

        Features must stay attached until then (arXiv 1604.06174).
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.lm.activation_checkpointing_enable({"use_reentrant": False})
        self._recomputed = [
            module for module in self.lm.modules() if isinstance(module, GradientCheckpointingLayer)
        ]

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the receiver's layers by ``torch.compile``; the first steps take minutes."""
        self.lm.base_model.compile(dynamic=True, backend=backend)

    @torch.no_grad()
    def read_head(self, batch: Batch) -> Batch:
        """Return the batch without its head, after computing the head's keys and values.

        Call it where no feature is attached: the head is read as plain text, once for as long as it
        stays the same.
        """
        batch = batch.after_head()
        assert batch.head_H is not None
        ids = batch.head_H.tolist()
        if ids and (self._head is None or self._head[0] != ids):
            output = self.lm.base_model(input_ids=batch.head_H[None], use_cache=True)
            self._head = ids, output.past_key_values
        return batch

    def _head_cache(self, batch: Batch) -> Cache | None:
        """Return the keys and values that :meth:`read_head` left, repeated for every row."""
        if batch.head_H is None or not len(batch.head_H):
            return None
        if self._head is None or self._head[0] != batch.head_H.tolist():
            raise ValueError(
                f"receiver {self.name} has not read this batch's head; take it off with read_head"
            )
        cache = copy.deepcopy(self._head[1])  # a forward appends to the cache that it is given
        cache.batch_repeat_interleave(len(batch.ids_BS))
        return cache

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Map last states ``[N, D]`` to logits ``[N, V]``, on the device of the states."""
        logits_NV = self.head(hidden_ND.to(self.head.weight.device)).to(hidden_ND.device)
        if self.softcap is None:
            return logits_NV
        return self.softcap * torch.tanh(logits_NV / self.softcap)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
        soft_ND: torch.Tensor | None = None,
        past: Past | None = None,
        sampling: Sampling | None = None,
        watch: Watch | None = None,
    ) -> Decoded:
        """Decode continuations of left-padded prompts, or of what follows ``past``.

        ``sampling``: how tokens are drawn; ``None``: the likeliest. ``watch``: is told each step's
        tokens.
        """
        from transformers import GenerationConfig

        batch, entries = self._beside(batch)
        e_BSD, attention_BS = self.embed(batch, soft_ND), batch.attention_BS.to(self.device)
        cache, position_BS = None, batch.position_BS
        if past is not None:
            cache, attention_BS = past.of_rows(batch)
            entries = past.entries_of(batch)
            missing = attention_BS.shape[1] - e_BSD.shape[1]
            # transformers wants embeddings of the whole, and cuts off what is in the cache.
            e_BSD = F.pad(e_BSD, (0, 0, missing, 0))
            if entries is not None:  # stand between the cache and these rows
                assert batch.end_R is not None
                end_R1 = batch.end_R.to(self.device)[:, None]
                position_BS = F.pad(end_R1 + batch.positions(), (missing, 0))
        positions: dict[str, Any] = {}  # None: counted from the beginning
        if position_BS is not None:
            positions["position_ids"] = position_BS.to(self.device)
        longest = attention_BS.shape[1] + max_new_tokens
        if entries is not None:
            longest += entries.longest
            self._check_sight(longest)
        self._check_length(longest)
        for layer in self._recomputed:
            layer.training = False  # decoding needs its cache
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling is not None:
            drawn = {"do_sample": True, "temperature": sampling.temperature}
            drawn |= {"top_p": sampling.top_p, "top_k": sampling.top_k or 0}
        settings = GenerationConfig(
            **drawn,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        )
        stopwatch = Stopwatch(watch)
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices, enabled=sampling is not None),
            head_slots.seen(self.lm, entries),
        ):
            if sampling is not None:
                torch.manual_seed(sampling.seed)
            output_BK = self.lm.generate(
                inputs_embeds=e_BSD,
                attention_mask=attention_BS,
                **positions,
                past_key_values=cache,
                generation_config=settings,
                streamer=stopwatch,
            )
        rows = [_until(row, stop_ids) for row in output_BK.tolist()]
        start, _, first, *_ = stopwatch.times
        return Decoded(rows, 1000 * (first - start), 1000 * (stopwatch.times[-1] - first))

    def _check_length(self, positions: int) -> None:
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


def _until(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids
