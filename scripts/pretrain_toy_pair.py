"""Make the embedded toys: tiny causal LMs that can really read. Two are the pair; the third joins a trained wire.

    python scripts/pretrain_toy_pair.py --model all

Tiny models learn at once which kind of value a question wants and then stand at chance among the candidates: binding a
name to its fact is the hard part. What moves them is copying: part of every batch is a random token sequence that is
repeated, with loss on the repeat, and part is a context of which one fact is begun again. Once copying has formed,
binding follows, and then the curriculum adds people and kinds.

Training state is kept beside the weights and removed at the end; the same command continues from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from latentwire.config import PromptConfig, ReceiverConfig
from latentwire.dataset.toy import context_of, facts, toy_rows
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import PromptBuilder

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES: dict[str, dict[str, int]] = {
    "toy-llama": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "toy-qwen": {
        "hidden_size": 112,
        "intermediate_size": 336,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "toy-phi": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
VOCABULARY = {"toy-llama": 704, "toy-qwen": 640, "toy-phi": 576}
SPECIAL = {
    "toy-llama": ["<pad>", "<s>", "</s>"],
    "toy-qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "toy-phi": ["<|endoftext|>", "<|pad|>"],
}
NAMES = {
    "toy-llama": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
    "toy-qwen": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    "toy-phi": {"pad_token": "<|pad|>", "eos_token": "<|endoftext|>"},
}
RECEIVERS = {
    "toy-llama": ReceiverConfig(name="llama", model="toy-llama", bos="yes"),
    "toy-qwen": ReceiverConfig(name="qwen", model="toy-qwen"),
    "toy-phi": ReceiverConfig(name="phi", model="toy-phi"),
}
ANCHORS = {"Answer: ": 0.7, "A: ": 0.15, "": 0.15}
STEPS = {"toy-llama": 9400, "toy-qwen": 2500, "toy-phi": 3300}
LEARNING_RATE = {"toy-llama": 1.2e-3, "toy-qwen": 2e-3, "toy-phi": 2e-3}
LEVELS = ((2, 1), (2, 2), (3, 2), (4, 2), (4, 3), (4, 4))
"""(people, kinds) of the curriculum."""
JUDGED = (3, 2)
EMPTY = 0.06
"""Share of contexts left out, so that the closed book is a prompt like any other."""
EVERY = 100
"""Steps between measurements."""
HELD_OUT_SEED = 2_000_000
"""Of the rows that progress and the record are measured on."""


def make_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the task's own text: any text tokenises, frequent words are one token."""
    bpe = Tokenizer(models.BPE())
    # A newline ends plain answers: it is a token of its own, whatever stands beside it.
    newline = pre_tokenizers.Split("\n", "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [newline, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size, special = VOCABULARY[model], SPECIAL[model]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    corpus = (
        f"Passage:\n{row['context']}\nQuestion: {row['question']}\nAnswer: {row['answers'][0]}\nA: user\nassistant"
        for row in toy_rows(5_000, seed=1_000_000, people=4, kinds=4)
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, **NAMES[model])
    if model == "toy-qwen":
        tokenizer.chat_template = CHATML
    return tokenizer


def make_model(model: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A fresh model of the shape in ``SHAPES``, four layers deep."""
    common = SHAPES[model] | {
        "vocab_size": len(tokenizer), "num_hidden_layers": 4, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    if model == "toy-llama":
        # A bias on queries and keys lets a head look one token back whatever stands there, which copying is made of.
        return LlamaForCausalLM(LlamaConfig(**common, attention_bias=True, initializer_range=0.02))
    # Attention and MLP side by side, LayerNorm, half of each head rotary, no gate in the MLP.
    if model == "toy-phi":
        return PhiForCausalLM(PhiConfig(**common, initializer_range=0.05))
    return Qwen2ForCausalLM(Qwen2Config(**common, initializer_range=0.05))


Row = tuple[list[int], range]
"""Token ids, and the positions among them that carry loss."""


class Task:
    """Draws training batches; all randomness is in ``rng``."""

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(f"pretrain {model} {seed}")
        self.tokenizer = tokenizer
        self.builders = [
            PromptBuilder(tokenizer, RECEIVERS[model], PromptConfig(anchor=anchor), "context")
            for anchor in ANCHORS
        ]
        special = set(tokenizer.all_special_ids)
        self.ids = [token for token in range(len(tokenizer)) if token not in special]

    def copy(self) -> Row:
        """A random sequence twice, after one other token; loss on the repeat."""
        # [one, *once, *once]: the first token of the repeat cannot be known, all after it can.
        once = self.rng.choices(self.ids, k=self.rng.randint(6, 24))
        return [self.rng.choice(self.ids), *once, *once], range(len(once) + 2, 2 * len(once) + 1)

    def cloze(self, level: int) -> Row:
        """A context, then one of its facts again; loss on what follows the name."""
        drawn = facts(self.rng, *self.shape(level))
        first = self.plain(context_of(drawn) + "\n")
        again = self.plain(context_of([self.rng.choice(drawn)]))
        return first + again, range(len(first) + 1, len(first) + len(again))

    def question(self, level: int) -> Row:
        """A prompt of the layout with its answer, sometimes without its context; loss on answer and stop."""
        drawn = facts(self.rng, *self.shape(level))
        name, kind, value = self.rng.choice(drawn)
        builder = self.rng.choices(self.builders, weights=list(ANCHORS.values()))[0]
        context = "" if self.rng.random() < EMPTY else context_of(drawn)
        pieces = builder.tokenize([context], [kind.question.format(name=name)], [value])
        built = builder.text(*(column[0] for column in pieces.values()))
        return built.ids, range(built.answer.start, len(built.ids))

    def plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def shape(self, level: int) -> tuple[int, int]:
        """People and kinds: mostly the current level's, sometimes an earlier one's."""
        return LEVELS[level if self.rng.random() < 0.6 else self.rng.randint(0, level)]

    def batch(
        self, size: int, level: int, copies: float, clozes: float
    ) -> tuple[torch.Tensor, ...]:
        """Ids and attention mask ``[B, S]``; flat positions that predict, their targets, and whether they are copies."""
        draws = [self.copy] * round(copies * size)
        draws += [lambda: self.cloze(level)] * round(clozes * size)
        rows = [draw() for draw in draws] + [self.question(level) for _ in range(size - len(draws))]
        width = max(len(ids) for ids, _ in rows)
        ids_BS = torch.zeros(size, width, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        predict, target, copy = [], [], []
        for index, (ids, supervised) in enumerate(rows):
            ids_BS[index, : len(ids)], mask_BS[index, : len(ids)] = torch.tensor(ids), 1
            # Flat index into [B · S] of the position before each target, which predicts it.
            predict += [index * width + position - 1 for position in supervised]
            target += [ids[position] for position in supervised]
            copy += [index < round(copies * size)] * len(supervised)
        return ids_BS, mask_BS, torch.tensor(predict), torch.tensor(target), torch.tensor(copy)


def losses(net: Any, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, float, float]:
    """Mean loss over all supervised tokens; and, to be shown, over copies and over the rest."""
    ids_BS, mask_BS, predict_N, target_N, copy_N = batch
    hidden_BSD = net.model(
        input_ids=ids_BS, attention_mask=mask_BS, use_cache=False
    ).last_hidden_state
    loss_N = functional.cross_entropy(
        net.lm_head(hidden_BSD.flatten(0, 1)[predict_N]), target_N, reduction="none"
    )
    seen_N = loss_N.detach()
    return loss_N.mean(), float(seen_N[copy_N].mean()), float(seen_N[~copy_N].mean())


@torch.no_grad()
def exact_match(
    net: Any,
    model: str,
    tokenizer: Any,
    shape: tuple[int, int],
    count: int,
    *,
    closed: bool = False,
    anchor: str = "Answer: ",
) -> float:
    """Exact match of answer and stop on fresh contexts.

    Greedy decoding gives the whole answer exactly when every token of it is the likeliest after the gold ones before
    it, so one forward is enough.
    """
    builder = PromptBuilder(tokenizer, RECEIVERS[model], PromptConfig(anchor=anchor), "context")
    rows = list(toy_rows(count, seed=HELD_OUT_SEED, people=shape[0], kinds=shape[1]))
    contexts, questions = [row["context"] for row in rows], [row["question"] for row in rows]
    ids = builder.tokenize(contexts, questions, [row["answers"][0] for row in rows])
    columns = (ids["context_ids"], ids["question_ids"], ids["answer_ids"])
    built = []
    for context, question, answer in zip(*columns, strict=True):
        built.append(builder.text([] if closed else context, question, answer))
    wrong: set[int] = set()
    for start in range(0, count, 128):
        batch = collate(built[start : start + 128])
        logits_BSV = net(input_ids=batch.ids_BS, attention_mask=batch.attention_BS).logits
        logits_NV = logits_BSV.flatten(0, 1)[batch.predict_N]
        # One wrong token makes its row wrong.
        wrong_rows = batch.row_N[logits_NV.argmax(-1) != batch.target_N]
        wrong |= {start + int(row) for row in wrong_rows}
    return 1 - len(wrong) / count


def save(out: Path, net: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Weights, tokenizer and record, written aside and renamed."""
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    net.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "model.safetensors").chmod(0o644)
    (aside / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    os.rename(aside, out)


def pretrain(model: str, options: argparse.Namespace) -> None:
    """Train one model until its steps are done or the time is up, then write it with its record."""
    torch.set_num_threads(1)  # one core per model: they train side by side
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer(model)
    net = make_model(model, tokenizer)
    task = Task(model, tokenizer, options.seed)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    state = {"step": 0, "level": 0, "copies": 0.3, "clozes": 0.3, "seconds": 0.0}
    state_file = options.out / f".{model}.state.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        task.rng.setstate(saved["rng"])
        state = saved["state"]
    print(
        f"{model}: {net.num_parameters():,} parameters, vocabulary {len(tokenizer)}, step {state['step']}",
        flush=True,
    )
    began, sums = time.monotonic() - state["seconds"], [0.0, 0.0]
    done = 0.0
    while done < 1:
        # Up over 50 steps; the last 30 % of steps or time bring it down to 2 %.
        rate = min(1.0, (state["step"] + 1) / 50, (1 - done) / 0.3 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        loss, copying, reading = losses(
            net, task.batch(options.batch_size, state["level"], state["copies"], state["clozes"])
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums = [sums[0] + reading, sums[1] + copying]
        state["step"] += 1
        state["seconds"] = time.monotonic() - began
        done = max(state["step"] / options.steps, state["seconds"] / (60 * options.minutes))
        if state["step"] % EVERY:
            continue
        here = exact_match(net, model, tokenizer, LEVELS[state["level"]], 256)
        print(
            f"{model} step {state['step']} {state['seconds']:.0f} s, level {LEVELS[state['level']]}, copies "
            f"{state['copies']:.2f}: loss {sums[0] / EVERY:.3f}, copying {sums[1] / EVERY:.3f}, exact match {here:.3f}",
            flush=True,
        )
        # Copying has formed: what remains is binding.
        if sums[1] / EVERY < 0.3:
            state["copies"], state["clozes"] = 0.1, 0.4
        sums = [0.0, 0.0]
        if here >= 0.95:
            state["level"] = min(state["level"] + 1, len(LEVELS) - 1)
        state_file.parent.mkdir(parents=True, exist_ok=True)
        saved = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": task.rng.getstate(),
            "state": state,
        }
        torch.save(saved, state_file.with_suffix(".part"))
        os.replace(state_file.with_suffix(".part"), state_file)
    by_shape = {}
    for people, kinds in itertools.product(range(1, 5), repeat=2):
        score = exact_match(net, model, tokenizer, (people, kinds), 512)
        by_shape[f"{people} people, {kinds} kinds"] = score
    record = {
        "command": f"python scripts/pretrain_toy_pair.py --model {model} --seed {options.seed} --steps {options.steps} "
        f"--minutes {options.minutes:g} --batch_size {options.batch_size} --lr {options.lr:g}",
        "seed": options.seed,
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "exact_match_text": exact_match(net, model, tokenizer, JUDGED, 1024),
        "exact_match_closed_book": exact_match(net, model, tokenizer, JUDGED, 1024, closed=True),
        "exact_match_by_anchor": {
            a: exact_match(net, model, tokenizer, JUDGED, 512, anchor=a) for a in ANCHORS
        },
        "exact_match_by_shape": by_shape,
    }
    print(model, json.dumps(record), flush=True)
    save(options.out / model, net, tokenizer, record)
    state_file.unlink(missing_ok=True)


def main() -> None:
    """Train one model here, or all in a process each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("latentwire/toy_pair"), help="parent directory"
    )
    parser.add_argument(
        "--steps", type=int, help=f"training stops after so many steps; default: {STEPS}"
    )
    parser.add_argument(
        "--minutes", type=float, default=90, help="or after so long, whichever comes first"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, help=f"peak learning rate; default: {LEARNING_RATE}")
    options = parser.parse_args()
    if options.model != "all":
        options.steps = options.steps or STEPS[options.model]
        options.lr = options.lr or LEARNING_RATE[options.model]
        pretrain(options.model, options)
        return
    command = [sys.executable, __file__, *sys.argv[1:]]  # the later --model wins
    running = [subprocess.Popen([*command, "--model", model]) for model in SHAPES]
    # Every one is waited for, whatever the first says.
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(
            f"pretraining must end with exit code 0 for each model, got {dict(zip(SHAPES, codes, strict=True))}"
        )


if __name__ == "__main__":
    main()
