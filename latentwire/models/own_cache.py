"""A receiver's own keys and values of a text, cut to the entries that matter most.

This is KVzip (arXiv 2505.23416): the receiver reads the text and recites it, not knowing any
question. An entry is one position of one key-value head. It scores the most attention that any
position of the recital pays to it, and the best entries of all heads and layers together are kept.
The softmax of that attention runs over all that the recital sees; the paper's code leaves out most
of what stands before the text, and parts of a long text that are not being recited.

Nothing is taken out of memory. Whatever stands after the text sees no entry that was cut, which
gives the same numbers as a cache without it: those weights are exactly zero. So prompts, padding and
decoding are those of any text, and times are those of reading the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from latentwire.models.lm import LMWrapper
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import PromptBuilder, PromptSequence

PART = 2000
"""Tokens of a text that are recited at once, as in the paper."""
MOST_WEIGHTS = 2**26
"""Attention weights of one layer that scoring holds at once; a longer row is read alone."""

Reading = Callable[[Batch], AbstractContextManager[torch.Tensor | None]]
"""Attaches what stands before a batch's texts, and gives the soft vectors of its slots."""


def check(name: str, lm: nn.Module) -> None:
    """Raise :class:`ReceiverError` for a receiver whose cache cannot be cut here.

    ``lm`` may be on the meta device. Layers that see a window of the text can be cut: entries that
    the question does not see are not counted.
    """
    config: Any = lm.config
    text_config = config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    reason = ""
    if other:
        reason = f"layers of {', '.join(other)}"
    elif getattr(text_config, "num_kv_shared_layers", 0):
        reason = "layers that share one cache"
    elif not _attentions(lm):
        reason = "no self_attn with the same num_key_value_groups and head_dim in every layer"
    if reason:
        raise ReceiverError(
            f"mode own_cache needs keys and values of every position in every layer, receiver "
            f"{name} ({type(lm).__name__}) has {reason}; leave own_cache out"
        )


def _attentions(lm: nn.Module) -> list[Any]:
    """Return the attention of every layer; none where they are of other or different kinds."""
    base: Any = lm.base_model
    modules = [getattr(layer, "self_attn", None) for layer in getattr(base, "layers", ())]
    names = "num_key_value_groups", "head_dim"
    shapes = set()
    for module in modules:
        shapes.add(tuple(getattr(module, name, None) for name in names))
    return modules if len(shapes) == 1 and None not in shapes.pop() else []


def entry_bytes(lm: LMWrapper) -> int:
    """Return the bytes of one entry as fp16: a key and a value of one head."""
    # Key and value, 2 bytes a number.
    return 2 * 2 * _attentions(lm.lm)[0].head_dim


@torch.no_grad()
def scores(
    lm: LMWrapper,
    builder: PromptBuilder,
    texts: Sequence[list[int]],
    reading: Reading,
    prefix: int = 0,
) -> list[torch.Tensor]:
    """Return each text's scores ``[layers, heads, T]``, by reading and reciting it.

    An entry that the next position does not see, in a layer with a window, scores −1.

    Args:
        lm: the receiver.
        builder: builds its prompts.
        texts: tokens where a message would stand.
        reading: attaches what stands before them.
        prefix: constant soft positions before each text.
    """
    recitals: list[tuple[int, range, PromptSequence]] = []
    for row, ids in enumerate(texts):
        for part in parts(len(ids)):
            recitals.append((row, part, builder.recital(ids, part, prefix)))
    heads = lm.lm.config.get_text_config().num_attention_heads
    longest = max((len(prompt.ids) for _, _, prompt in recitals), default=1)
    # A layer has heads × longest² weights a row.
    size = max(1, MOST_WEIGHTS // (heads * longest**2))
    by_text: list[list[torch.Tensor]] = [[] for _ in texts]
    for start in range(0, len(recitals), size):
        together = recitals[start : start + size]
        prompts = [prompt for _, _, prompt in together]
        for (row, part, _), score_LHT in zip(together, _recite(lm, prompts, reading), strict=True):
            # Each recital scores the whole text: only its own part is taken from it.
            by_text[row].append(score_LHT[..., part.start : part.stop])
    return [torch.cat(of_parts, -1) for of_parts in by_text]


def parts(tokens: int) -> list[range]:
    """Return the stretches of a text that are recited one after the other."""
    return [range(start, min(start + PART, tokens)) for start in range(0, tokens, PART)]


def _recite(
    lm: LMWrapper, prompts: Sequence[PromptSequence], reading: Reading
) -> list[torch.Tensor]:
    """Return the scores ``[layers, heads, T]`` of each prompt's whole text."""
    batch = collate(prompts).to(lm.device)
    by_layer: list[list[torch.Tensor]] = []

    def note(module: Any, _: tuple, kwargs: dict[str, Any], output: Any) -> None:
        weights_BASS, mask_B1SS = output[1], kwargs.get("attention_mask")
        if weights_BASS is None or mask_B1SS is None:
            raise ReceiverError(_unseen(lm, "shows no attention weights"))
        rows = []
        # Of each row [heads, queries, keys], and a mask that is 0 where a query sees a key.
        of_rows = zip(prompts, weights_BASS, mask_B1SS[:, 0], strict=True)
        for prompt, weights_ASS, mask_SS in of_rows:
            text = slice(prompt.message.start, prompt.message.stop)
            # R positions come after the text, up to the recital's end; padding is not among them.
            paid_ART = weights_ASS[:, text.stop : len(prompt.ids), text].float()
            # Query heads of one key-value head stand side by side.
            score_HT = paid_ART.unflatten(0, (-1, module.num_key_value_groups)).amax((1, 2))
            seen_T = mask_SS[text.stop, text] == 0
            rows.append(score_HT.masked_fill(~seen_T, -1.0).to(lm.device))
        by_layer.append(rows)

    with ExitStack() as stack:
        stack.enter_context(_eager(lm))
        soft_ND = stack.enter_context(reading(batch))
        for attention in _attentions(lm.lm):
            handle = attention.register_forward_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        lm.supervised_states(batch, soft_ND)
    return [torch.stack(of_row) for of_row in zip(*by_layer, strict=True)]


def choose(score_LHT: torch.Tensor, positions: int) -> torch.Tensor:
    """Return True for the entries that are kept, ``[layers, heads, T]``.

    They are the share ``positions`` ÷ T of all entries that the next position sees: as many as that
    many positions have in all heads and layers.
    """
    tokens = score_LHT.shape[-1]
    seen = int((score_LHT >= 0).sum())
    # ⌊seen · positions / T⌋
    count = min(positions, tokens) * seen // max(1, tokens)
    best = torch.zeros(score_LHT.numel(), dtype=torch.bool, device=score_LHT.device)
    best[score_LHT.flatten().topk(count).indices] = True
    return best.view_as(score_LHT)


@contextmanager
def cut(
    lm: LMWrapper,
    prompts: Sequence[PromptSequence],
    kept: Sequence[torch.Tensor],
    side: Literal["right", "left"],
) -> Iterator[None]:
    """Hide every entry that is not kept from what stands after the texts, until this context ends.

    ``prompts``: rows of the batch that is read, and gone on from; ``kept``: each one's entries, by
    :func:`choose`; ``side``: where the batch is padded.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    gone_BLHS = torch.zeros(len(prompts), *kept[0].shape[:2], width, dtype=torch.bool)
    after_B = torch.zeros(len(prompts), dtype=torch.long)
    for row, (prompt, kept_LHT) in enumerate(zip(prompts, kept, strict=True)):
        shift = 0 if side == "right" else width - len(prompt.ids)
        after_B[row] = shift + prompt.message.stop
        gone_BLHS[row, ..., shift + prompt.message.start : after_B[row]] = ~kept_LHT
    gone_BLHS, after_B = gone_BLHS.to(lm.device), after_B.to(lm.device)

    def hide(layer: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        mask_B1QK, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask_B1QK is None:
            raise ReceiverError(_unseen(lm, "takes no attention mask"))
        queries, keys = mask_B1QK.shape[-2:]
        # A window's cache has lost its first positions: both count from the end.
        read = 0 if past is None else past.get_seq_length(layer)
        end = read + queries
        gone_BHK = F.pad(gone_BLHS[:, layer], (0, max(0, end - width)))[..., end - keys : end]
        late_BQ = torch.arange(end - queries, end, device=lm.device) >= after_B[:, None]
        # [B, H, 1, K] and [B, 1, Q, 1]: entries that are gone, for queries after the text.
        hidden_BHQK = gone_BHK[:, :, None] & late_BQ[:, None, :, None]
        hidden_BAQK = hidden_BHQK.repeat_interleave(module.num_key_value_groups, 1)
        lowest = torch.finfo(mask_B1QK.dtype).min
        mask_BAQK = mask_B1QK.masked_fill(hidden_BAQK.to(mask_B1QK.device), lowest)
        return args, kwargs | {"attention_mask": mask_BAQK}

    with ExitStack() as stack:
        stack.enter_context(_eager(lm))
        for layer, attention in enumerate(_attentions(lm.lm)):
            # By its default value each hook keeps its own layer, not the loop's last.
            def hook(module: Any, args: tuple, kwargs: dict, layer: int = layer) -> tuple:
                return hide(layer, module, args, kwargs)

            handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _eager(lm: LMWrapper) -> Iterator[None]:
    """Compute attention step by step, which shows its weights and takes a mask for each head."""
    model: Any = lm.lm
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _unseen(lm: LMWrapper, what: str) -> str:
    return (
        f"mode own_cache needs attention that transformers computes step by step, that of receiver "
        f"{lm.name} ({type(lm.lm).__name__}) {what}; leave own_cache out"
    )
