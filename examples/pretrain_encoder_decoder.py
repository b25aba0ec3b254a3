"""Pretrain a small T5 by denoising, for the comparison in encoder_decoder_prefixes.md.

    python examples/pretrain_encoder_decoder.py TEXT TOKENIZER RECORDS OUT [--minutes 30] [--vectors DIR]

TEXT holds one paragraph a line (.xz or plain), TOKENIZER is a byte-level BPE's `tokenizer.json`, RECORDS a Python file
whose `record()` makes a synthetic record and a sentence that states it: without these a model this small does not learn
to copy a name. Examples are damaged in one of three ways: they lose spans, which are the target (Raffel et al. 2020,
arXiv 1910.10683), or the target is the whole text (Lewis et al. 2020, arXiv 1910.13461), or they lose their end (Tay et
al. 2022, arXiv 2205.05131). DIR is a causal model with the same tokenizer, whose token vectors are the start of this
one's; everything else starts at random. OUT becomes a folder as the hub has them. Minutes are of processor time.
Without arguments, or with a number of steps, a minute one is pretrained on the text of this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from prefixkit.quickstart import BACKBONE

WINDOW, BATCH = 64, 32
POOL = 32
"""Batches whose examples are drawn together, so that those of like length share one: less padding."""
RECORDS = 0.5
"""The share of synthetic records among the examples."""
BREAK = "<|endoftext|>"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = [f"<extra_id_{number}>" for number in range(16)]
SHAPE = {"d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 3}
Example = tuple[list[int], list[int]]


def main() -> None:
    options = parse(sys.argv[1:])
    for path in (options.text, options.tokenizer):
        if not Path(path).is_file():
            sys.exit(f"{path}: expected a file; found none; next: name the text and the tokenizer, see --help")
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(options.tokenizer)
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, feed_forward_proj="gated-silu", **SHAPE, **ids)
    # Written out, attention costs less than the fused kernel on a CPU.
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    if options.vectors:
        start_from(model, tokenizer, options.vectors)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    examples = stream(options.text, options.records, tokenizer)
    pretrain(model, examples, seconds=60 * options.minutes, steps=options.steps)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"written: {options.out}")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(words) < 2:
        words = [__file__, str(BACKBONE / "tokenizer.json"), "", mkdtemp(), "--steps", *(words or ["2"])]
    for name in ("text", "tokenizer", "records", "out"):
        parser.add_argument(name)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--vectors")
    return parser.parse_args(words)


def t5_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The byte-level BPE of `path` with T5's special tokens at T5's places; an end is put behind every text."""
    read = json.loads(Path(path).read_text(encoding="utf-8"))
    special = {token["content"] for token in read["added_tokens"]}
    ordinary = [token for token, _ in sorted(read["model"]["vocab"].items(), key=lambda each: each[1])]
    vocabulary = [PAD, END, UNKNOWN, *(token for token in ordinary if token not in special), *SENTINELS]
    read["model"]["vocab"] = {token: number for number, token in enumerate(vocabulary)}
    read["added_tokens"], read["post_processor"] = [], None
    tokenizer = Tokenizer.from_str(json.dumps(read))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN, *SENTINELS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=SENTINELS,
    )


@torch.no_grad()
def start_from(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Give the tokens that both have the vectors of the model in `folder`, in the spread that T5 begins with."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight
    numbers = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    mine = model.get_input_embeddings().weight
    for token, number in tokenizer.get_vocab().items():
        if token in numbers:
            mine[number] = theirs[numbers[token]] / theirs.std()


def stream(text: str, records: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Damaged examples without end, in turn of records, where there are some, and of text."""
    stored = Path(text).read_bytes()
    lines = (lzma.decompress(stored) if text.endswith(".xz") else stored).decode("utf-8").splitlines()
    paragraphs = [line.strip() for line in lines if len(line.strip()) > 20]
    make, chance = record_maker(records, paragraphs), random.Random(0)
    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
    while True:
        if make is not None and chance.random() < RECORDS:
            record, _, sentence = make().replace("\n\n", "\n").partition(BREAK)
            begin, rest = (tokenizer(part, add_special_tokens=False).input_ids for part in (record, sentence))
            ids, cut = [*begin, *rest], len(begin) if rest else None
        else:
            ids, cut = tokenizer(chance.choice(paragraphs), add_special_tokens=False).input_ids, None
            first = chance.randrange(max(1, len(ids) - WINDOW))
            ids = ids[first : first + WINDOW]
        if len(ids) > 8:
            source, target = damaged(ids, sentinels, chance, cut)
            yield [*source, 1], [*target, 1]


def record_maker(path: str, paragraphs: list[str]) -> Callable[[], str] | None:
    """The `record()` of the file at `path`, with names from the text; a mark between a record and its sentence."""
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("records", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = Path(mkdtemp()) / "names.txt"
    names.write_text("\n".join(paragraphs[::8]), encoding="utf-8")
    module.load(str(names))
    made: Callable[[], str] = module.record
    return made


def damaged(ids: list[int], sentinels: list[int], chance: random.Random, cut: int | None) -> Example:
    """`ids` without their end behind `cut`, or without spans, in one of the three ways above."""
    way = chance.random()
    if cut is not None and way < 0.8:
        return [*ids[:cut], sentinels[0]], ids[cut:]
    if way < 0.25:
        cut = chance.randrange(len(ids) // 4, len(ids) - 3)
        return [*ids[:cut], sentinels[0]], ids[cut:]
    source, spans = without_spans(ids, sentinels[1:], chance)
    return (source, spans) if way < 0.55 else (source, ids)


def without_spans(ids: list[int], sentinels: list[int], chance: random.Random) -> Example:
    """The text with sentinels in the place of about a sixth of it, and the spans behind their sentinels."""
    source: list[int] = []
    spans: list[int] = []
    position, number = 0, 0
    while position < len(ids):
        if number < len(sentinels) and chance.random() < 0.06:
            length = chance.choice((1, 2, 3, 4, 5))
            source.append(sentinels[number])
            spans += [sentinels[number], *ids[position : position + length]]
            position, number = position + length, number + 1
        else:
            source.append(ids[position])
            position += 1
    return source, spans


def batches(examples: Iterator[Example]) -> Iterator[tuple[Tensor, Tensor]]:
    chance = random.Random(0)
    while True:
        drawn = sorted((next(examples) for _ in range(POOL * BATCH)), key=lambda one: (len(one[1]) // 8, len(one[0])))
        for begin in chance.sample(range(0, len(drawn), BATCH), POOL):
            sources, targets = zip(*drawn[begin : begin + BATCH], strict=True)
            yield padded(sources, 0), padded(targets, -100)


def padded(rows: tuple[list[int], ...], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def pretrain(
    model: T5ForConditionalGeneration,
    examples: Iterator[Example],
    *,
    seconds: float,
    steps: int | None,
    peak: float = 1e-2,
) -> None:
    """AdamW for so many seconds or steps: a short warm-up, then a cosine to a twentieth of the peak.

    T5's parameters begin a hundred times apart in size; as in Adafactor, with which T5 was trained, the rate is a share
    of the parameter's own size.
    """
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    smooth, began, done, prepared = float("nan"), time.process_time(), 0, batches(examples)
    while (share := done / steps if steps else (time.process_time() - began) / seconds) < 1:
        if done % 50 == 0:
            sizes = [
                parameter.detach().square().mean().sqrt().clamp(min=1e-3).item() for parameter in model.parameters()
            ]
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = size * peak * min(1, (done + 1) / 200) * (0.525 + 0.475 * math.cos(math.pi * share))
        loss = denoising_loss(model, *next(prepared))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        done += 1
        if done % 200 == 0 or done == steps:
            print(f"step {done}, {time.process_time() - began:.0f} s: {smooth:.3f} nats a token", flush=True)


def denoising_loss(model: T5ForConditionalGeneration, source: Tensor, target: Tensor) -> Tensor:
    """Nats a token of the target."""
    # bfloat16 where the machine multiplies it natively; elsewhere it costs time and changes little.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=source, attention_mask=(source != 0).long(), labels=target).logits
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


if __name__ == "__main__":
    main()
