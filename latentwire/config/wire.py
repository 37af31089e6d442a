"""The models: receivers, the text around the message, encoder and adapters."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from latentwire.config.section import Model, Section, knob

TemplateOptions = dict[str, bool | int | float | str]

TEMPLATE_ARGUMENTS = frozenset(
    "conversation conversations messages chat_template tokenize tools documents add_generation_prompt "
    "continue_final_message padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""Arguments of ``apply_chat_template`` besides the template's own variables."""


class ReceiverConfig(Section):
    """One frozen causal LM that reads the soft prompt."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Short name used in metrics, columns and file names, e.g. ``llama``."""
    model: Model = knob(shards="content", teachers="value", may_change=("resumed run",))
    """Hub id, local directory (safetensors, or one holding a ``.gguf`` file; where it holds both, the
    safetensors are read), a ``.gguf`` file, or an embedded one: ``toy-llama``, ``toy-qwen``,
    ``toy-phi``."""
    revision: str | None = knob(None, teachers="value", may_change=("resumed run",))
    """Hub revision (branch, tag or commit). ``None``: the default branch."""
    template: Literal["auto", "chat", "plain"] = knob("auto", shards="value")
    """The form of the prompt: the tokenizer's chat template, a plain ``Passage/Question`` text, or ``auto``:
    chat where the tokenizer brings a template."""
    bos: Literal["auto", "yes", "no"] = knob("auto", shards="value")
    """BOS at position 0. ``auto``: where the chat template, or in plain the tokenizer itself, puts it."""
    instruction: str = knob("", shards="value")
    """Text put before the passage (in chat: at the start of the user's turn). Empty: none."""
    template_options: TemplateOptions = knob(default_factory=dict, shards="content")
    """Variables of the chat template, such as ``{enable_thinking: false}`` or
    ``{date_string: 1 May 2026}``. A template that asks for today's date is told 26 July 2024, so that a
    prompt stays the same."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", teachers="value")
    """Weights' type. ``auto``: bfloat16 on CUDA, float32 elsewhere."""
    device: str = knob("auto", may_change=("resumed run",))
    """``auto`` (CUDA, then MPS, then CPU), or a torch device such as ``cuda:0``."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = knob(
        "sdpa", may_change=("resumed run",)
    )
    """Attention kernel that transformers uses, in an encoder that borrows this receiver's layers too (which has no
    ``flash_attention_2``). On a CPU ``eager`` trains faster while prompts are short, and needs memory for every pair of positions."""
    quantization: Literal["none", "int8", "nf4"] = knob("none", teachers="value")
    """Weights' storage: ``int8`` by torchao, ``nf4`` by bitsandbytes (both in the extra ``quantization``)."""
    device_map: Literal["none", "auto", "balanced", "sequential"] = knob(
        "none", may_change=("resumed run",)
    )
    """Spread a receiver that is larger than one GPU over all of them, by accelerate. ``none``: all on ``device``."""
    trust_remote_code: bool = knob(False, may_change=("resumed run",))
    """Run code that comes with the weights. Off unless asked for, per receiver."""

    def __hash__(self) -> int:
        """Hash all values; pydantic's own hash takes no mapping."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))

    @field_validator("template_options")
    @classmethod
    def _no_arguments(cls, options: TemplateOptions) -> TemplateOptions:
        if taken := options.keys() & TEMPLATE_ARGUMENTS:
            raise ValueError(
                f"template_options must be variables of the template, got "
                f"{', '.join(sorted(taken))}, which the prompt sets itself; leave it out"
            )
        return options


def default_receivers() -> tuple[ReceiverConfig, ...]:
    """Return the embedded pair, which reads the toy task and needs no network."""
    return (
        ReceiverConfig(name="llama", model="toy-llama", bos="yes"),
        ReceiverConfig(name="qwen", model="toy-qwen"),
    )


class PromptConfig(Section):
    """The literal text around the message."""

    anchor: str = knob("Answer: ", shards="value")
    """Text between prompt and answer. Its trailing white space is tokenised with the answer, as the LLM learned it."""
    reads: Literal["message", "text", "truncated", "window", "closed_book"] = "message"
    """Content of the context's place. ``message``: a wire's. The others make a *text reader* of the run, which has no
    encoder and trains ``prefix`` alone: the whole ``text``; as many of its first tokens as the message of ``encoder`` would
    have positions (``truncated``), or as many from anywhere (``window``); or nothing."""


class PrefixConfig(Section):
    """Constant vectors before the message or text, trained for each receiver (arXiv 2104.08691)."""

    tokens: int = knob(16, ge=1, le=1024, calibrates=True)
    """Vectors, each one position of the prompt."""
    layers: bool = knob(False, calibrates=True)
    """Add trained vectors to their keys and values in every layer too (arXiv 2110.07602). Needs the receivers' weights in
    the process that trains."""
    text: str = knob(
        "Answer each question with a short span copied from the passage. Be brief and exact.\n",
        min_length=1,
        calibrates=True,
    )
    """The vectors begin as the embeddings of its tokens, repeated or cut to ``tokens``."""
    begin: Literal["text", "reader"] = knob("text", calibrates=True)
    """Start of the vectors. ``reader``: the prefix of the receiver's tuned text reader, which is trained first
    (``evaluation.tuned_text``, with the same ``tokens`` and ``layers``)."""


class ClosedFormConfig(Section):
    """A start in closed form for ``adapter.kind: heads``: reduced-rank regression from the senders' states.

    Encoder and adapters begin as the linear maps that lose least of what the answers hang on (docs/guides/heads.md).
    """

    texts: int = knob(480, ge=1, calibrates=True)
    """Training texts whose states, keys and values are regressed."""
    gradient_texts: int = knob(120, ge=1, calibrates=True)
    """Further texts whose answers' gradients by those keys and values make the metric."""
    metric: Literal["gradients", "plain"] = "gradients"
    """``plain``: every key and value counts alike."""
    ridge: float = Field(1e-3, gt=0, le=10)
    """Ridge of the regression, as a share of the states' mean variance."""
    floor: float = Field(0.02, gt=0, le=10)
    """Part of the metric in which every direction counts alike, as a share of the mean gradient's."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Receiver → its weight in the joint regression. Left out: 1."""


LENT = "receiver:"
"""Begins the name of a model that is a receiver's own: ``receiver:<name>``."""


def _lender(model: str) -> str | None:
    """Return the receiver that ``receiver:<name>`` names; ``None`` for other models."""
    return model.removeprefix(LENT) if model.startswith(LENT) else None


class EncoderConfig(Section):
    """Text to latents."""

    kind: Literal["byte", "st", "lm", "senders"] = knob("byte", shards="value")
    """Encoder family. ``byte``: from scratch, on UTF-8 bytes; ``st``: token states of a pretrained sentence encoder;
    ``lm``: those of a pretrained causal LM whose attention is made bidirectional (arXiv 2404.05961, 2510.20535), unless
    ``attention`` says otherwise; ``senders``: states of several depths of frozen causal LMs that read the text as they were
    trained (causally)."""
    model: Model | None = knob(None, shards="value", may_change=("resumed run",))
    """Backbone of ``st`` and ``lm``: Hub id, local directory, an embedded toy, or ``receiver:<name>`` for a copy of that
    receiver's weights."""
    senders: tuple[Model, ...] = knob((), shards="value", may_change=("resumed run",))
    """LMs of kind ``senders``, whose states stand side by side: Hub ids, local directories, embedded toys, or
    ``receiver:<name>`` for that receiver's weights in its type. Empty: all receivers' models, in order. The first is the
    *ruler*: there is a state for each of its tokens, and the others' states are read at the ends of those."""
    depths: tuple[float, ...] = knob((0.0, 0.2, 0.4, 0.6, 0.8), min_length=1, calibrates=True)
    """Depths of the senders' states as shares of their layers; 0 is the embeddings. Layers above the deepest are not run."""
    sender_heads: bool = knob(False, calibrates=True)
    """Take from every sender, beside its states, the keys (before rotary positions) and values of the heads in which the receiver
    of the same name reads the message: what that receiver is to be given is almost a linear map of them. They reach the
    linear codes of ``pooling: tokens``, not the blocks. Needs ``senders`` that are receivers, and ``closed_form``. All layers
    are run then."""
    lead: str = knob("Passage:\n", calibrates=True)
    """Text that ``senders`` read before each text: the first token of all has states like no other's, so it should be none of the
    text's. Empty: nothing."""
    model_layers: int | None = Field(None, ge=1)
    """Keep the backbone's first layers only. ``None``: all."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Tokens that a state of an ``lm`` backbone sees: the whole text, or what comes before it, as the LM was trained."""
    tune: Literal["frozen", "lora", "full"] = "full"
    """The part of the backbone that is trained: nothing, low-rank updates of its attention (arXiv 2106.09685), or everything.
    ``senders`` are never trained."""
    lora_rank: int = Field(8, ge=1, le=512)
    """Rank of those updates."""
    latent_len: int = Field(16, ge=1, le=4096)
    """Latent vectors in one message, unless ``tokens_per_latent`` says otherwise."""
    tokens_per_latent: int | None = knob(
        None, ge=1, le=1024, smaller_costs_more=True, calibrates=True
    )
    """The message grows with the text: one latent for so many encoder tokens (``byte``: patches)."""
    pooling: Literal["queries", "spans", "memory", "memory_kv", "tokens"] = "queries"
    """Token states to latents. ``queries``: by ``latent_len`` learned queries, interpolated where a message has another length;
    ``spans``: means over contiguous, evenly spaced spans (arXiv 2510.20535). Two more append ``latent_len`` learned memory
    tokens to the text in an ``lm`` backbone, interpolated likewise: ``memory`` takes their last states (arXiv 2307.06945),
    ``memory_kv`` their keys and values in all layers, without rotary positions (arXiv 2408.03094). The latter needs
    ``model: receiver:<name>``, ``projection: false`` and ``adapter.kind: keys_values``. ``tokens``: a latent is the codes of
    ``tokens_per_latent`` tokens side by side, ``d_z`` ÷ that many numbers each; what a last latent lacks is zero."""
    code_blocks: int = Field(2, ge=0, le=64)
    """Blocks of attention over the tokens whose output, zero at first, is added to the linear codes of ``pooling: tokens``."""
    code_width: int = Field(512, ge=8, le=8192)
    """Width inside those blocks; a multiple of 2 × ``heads``."""
    code_mixing: bool = True
    """Mix the codes of a latent by a square map, which every receiver undoes by one of its own; both add nothing at first. Each has
    ``d_z``² weights: at several hundred numbers a token they are most of a wire. Blocks see neighbouring tokens without them."""
    projection: bool = True
    """Normalise what is pooled and map it to ``d_z`` by a linear layer. Off: it is sent as it is, and ``d_z`` is its width, for
    ``memory_kv`` keys and values of all layers together."""
    span_ends: Literal["even", "sentences"] = "even"
    """The ends of spans. ``even``: as many states in each; ``sentences``: in a message with no more latents than its text has
    sentences, each span holds whole ones, since a fact that is cut in two between two coarse latents is hard to read
    (docs/experiments/findings.md). Needs ``pooling: spans``."""
    span_parts: int = Field(1, ge=1, le=64)
    """A latent is so many parts side by side, each from an equal stretch of its span: what stands first and what stands last
    in it are then told apart. Needs ``pooling: spans``, and ``d_z`` as a multiple."""
    split: Literal["none", "lines"] = knob("none", shards="value")
    """``lines``: every line of the text (in HotpotQA, every paragraph) is encoded alone and the messages are joined, so
    that a paragraph's message is the same wherever it stands. Lines that are empty are left out."""
    private_len: int = Field(0, ge=0, le=1024)
    """Further latents for each receiver that only it reads. Needs ``pooling: queries`` and ``latent_len`` latents."""
    d_z: int = Field(128, ge=1, le=131072)
    """Width of one latent vector."""
    d_model: int = Field(192, ge=8, le=8192)
    """Width inside the ``byte`` encoder and of the queries; a multiple of ``heads``."""
    layers: int = Field(3, ge=1, le=64)
    """Self-attention layers over the bytes."""
    heads: int = Field(4, ge=1, le=128)
    """Attention heads; ``d_model / heads`` must be even (rotary positions), and ``code_width / heads`` where it is used."""
    bytes_per_patch: int = Field(8, ge=1, le=64)
    """Longest patch in bytes; a patch also ends after white space."""
    latent_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of latents' entries zeroed in training."""

    @property
    def pretrained(self) -> bool:
        """True with a backbone, which has a tokenizer of its own; the other kinds read the text itself."""
        return self.kind != "byte"

    @property
    def has_memory(self) -> bool:
        """True where memory tokens stand behind the text, in the backbone's own pass."""
        return self.pooling in ("memory", "memory_kv")

    @property
    def lender(self) -> str | None:
        """The receiver of whose model it is a copy, where ``model`` says ``receiver:<name>``."""
        return _lender(self.model or "")

    @property
    def lenders(self) -> tuple[str, ...]:
        """The receivers whose models ``senders`` says by ``receiver:<name>``, in order."""
        named = map(_lender, self.senders)
        return tuple(name for name in named if name is not None)

    @model_validator(mode="after")
    def _parts_fit(self) -> EncoderConfig:
        # Rotary positions turn pairs of a head's numbers, so that heads have an even width.
        if self.d_model % (2 * self.heads):
            raise ValueError(
                f"d_model must be a multiple of 2 × heads, got d_model {self.d_model}, heads {self.heads}"
            )
        self._check_senders()
        if self.kind in ("st", "lm") and self.model is None:
            raise ValueError(
                f"encoder kind {self.kind} needs a backbone, got model null; name one in encoder.model"
            )
        if self.attention == "causal" and self.kind != "lm":
            raise ValueError(
                f"attention causal needs kind lm, got {self.kind}; choose that, or attention bidirectional"
            )
        self._check_memory()
        self._check_codes()
        if self.span_ends == "sentences" and self.pooling != "spans":
            raise ValueError(
                f"span_ends sentences needs pooling spans, got {self.pooling}; choose that, or span_ends even"
            )
        if self.span_parts > 1 and (self.pooling != "spans" or self.d_z % self.span_parts):
            raise ValueError(
                f"span_parts {self.span_parts} needs pooling spans and d_z as its multiple, got {self.pooling} and {self.d_z}; "
                f"set them, or span_parts 1"
            )
        if self.private_len and (
            self.pooling != "queries" or self.split != "none" or self.tokens_per_latent
        ):
            raise ValueError(
                f"private_len needs pooling queries, split none and tokens_per_latent null, got {self.pooling}, "
                f"{self.split} and {self.tokens_per_latent}"
            )
        return self

    def _check_senders(self) -> None:
        if strange := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ValueError(
                f"depths must lie in [0, 1], got {', '.join(map(str, strange))}; give shares of the senders' layers"
            )
        if self.kind != "senders" and self.senders:
            raise ValueError(
                f"senders need kind senders, got {self.kind} and {', '.join(self.senders)}; choose that, or leave them out"
            )
        if self.sender_heads and (self.kind != "senders" or self.pooling != "tokens"):
            raise ValueError(
                f"sender_heads needs kind senders and pooling tokens, got {self.kind} and {self.pooling}; choose those, or leave "
                f"sender_heads out"
            )
        if self.sender_heads and len(self.lenders) < len(self.senders):
            strangers = [sender for sender in self.senders if _lender(sender) is None]
            raise ValueError(
                f"sender_heads needs senders that are receivers ({LENT}<name>), which have chosen heads, got "
                f"{', '.join(strangers)}; leave that out, or sender_heads"
            )
        # senders and depths say what model and model_layers say of other kinds.
        if self.kind == "senders" and (self.model, self.model_layers) != (None, None):
            raise ValueError(
                f"kind senders takes its models from senders and their layers from depths, so model and model_layers must be "
                f"null, got {self.model} and {self.model_layers}; leave them out"
            )

    def _check_codes(self) -> None:
        if self.pooling != "tokens":
            return
        # A latent is the codes of `stride` tokens side by side, d_z / stride numbers each.
        stride = self.tokens_per_latent
        others = (self.split, self.private_len, self.projection, self.latent_dropout)
        if stride is None or self.d_z % stride or others != ("none", 0, True, 0):
            raise ValueError(
                f"pooling tokens needs tokens_per_latent and d_z as its multiple, split none, private_len 0, projection true and "
                f"latent_dropout 0, got {stride}, {self.d_z}, {self.split}, {self.private_len}, "
                f"{str(self.projection).lower()} and {self.latent_dropout:g}; set them, or pooling spans"
            )
        if self.code_blocks and self.code_width % (2 * self.heads):
            raise ValueError(
                f"code_width must be a multiple of 2 × heads, got code_width {self.code_width}, heads {self.heads}; change one, "
                f"or set code_blocks 0"
            )

    def _check_memory(self) -> None:
        if self.has_memory and self.kind != "lm":
            raise ValueError(
                f"pooling {self.pooling} needs kind lm, in whose pass memory tokens stand, got {self.kind}; choose that, or "
                f"pooling queries"
            )
        if self.pooling == "memory_kv" and (
            self.lender is None or self.model_layers is not None or self.projection
        ):
            raise ValueError(
                f"pooling memory_kv hands a receiver keys and values of its own layers, so it needs model receiver:<name>, "
                f"model_layers null and projection false, got {self.model}, {self.model_layers} and "
                f"{str(self.projection).lower()}; set them, or pooling memory"
            )


class AdapterConfig(Section):
    """Latents to the soft prompt of one receiver, then the scale."""

    kind: Literal["mlp", "linear", "none", "keys_values", "heads"] = "mlp"
    """``mlp``: a normalisation, a 2-layer MLP and a linear skip; ``linear``: the skip alone behind the normalisation (with
    ``encoder.projection`` the two linear maps of arXiv 2510.20535); ``none``: the latents are the prompt, and ``d_z`` is the
    receiver's width; ``keys_values``: a slot has no vector, its keys and values in all layers are those of its latent (arXiv
    2408.03094), which needs ``encoder.pooling: memory_kv``; ``heads``: a latent becomes a key and a value for each of its
    tokens in the few heads that fetch from a context (docs/guides/heads.md), which needs ``encoder.pooling: tokens``."""
    cache_share: float | None = knob(None, gt=0, le=1, calibrates=True)
    """Share of a receiver's key-value heads that ``heads`` fills, and so of the cache that the text would take. ``None``: 1 ÷
    ``encoder.tokens_per_latent``."""
    ranking_texts: int = knob(96, ge=1, le=100_000, calibrates=True)
    """Training texts that each receiver recites to rank its heads."""
    unfold_blocks: int = Field(2, ge=0, le=64)
    """Attention blocks over a message's tokens in ``heads``, beside its linear map; what they add begins at zero."""
    unfold_width: int = Field(512, ge=8, le=8192)
    """Width inside those blocks; a multiple of 2 × ``encoder.heads``."""
    hidden_multiple: float = Field(2.0, gt=0, le=64)
    """Hidden width of the MLP as a multiple of ``d_z``."""
    calibration: Literal["learned", "embed_rms", "none"] = "learned"
    """Scale of the soft prompt. ``learned``: a gain that starts at the receiver's embedding RMS and is then free
    (clamping it hurts: 2026.acl-long.1717); ``embed_rms``: each example is held at that RMS; ``none``: as it comes."""
    slot_positions: bool = False
    """Add a learned vector per slot. Needs a fixed number of slots (``tokens_per_latent`` null)."""

    def share_at(self, tokens: int) -> float:
        """Return the share of the cache that ``heads`` takes, at so many tokens a latent."""
        return 1 / tokens if self.cache_share is None else self.cache_share
