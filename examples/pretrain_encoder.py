"""Pretrain a small RoBERTa by masked language modelling on plain text, for the comparison in tagging_with_prefixes.md.

    python examples/pretrain_encoder.py TEXT DECODER OUT [--minutes 12]

TEXT holds one paragraph a line (.xz or plain). DECODER is the folder of a language model with a byte-level BPE and
vectors of 192 numbers: the tokenizer and the start of the token vectors are its own. From random vectors the loss stays
at the frequencies of words (6.2 nats) for more than 3,000 steps of this size; from these it leaves them after 500. OUT
becomes a folder as the hub has them. Without arguments, or with a number of steps, the text is this file.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from prefixkit.quickstart import BACKBONE

WINDOW = 128
BATCH = 32
CLS, PAD, SEP, MASK = "<s>", "<pad>", "</s>", "<mask>"
SHAPE = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768}
SPREAD = 0.04
"""The standard deviation of vectors at the start."""
SPARE = 160
"""Positions beyond the window, for longer texts and a prefix; what they start from is all that is known of them."""


def main() -> None:
    options = parse(sys.argv[1:])
    for path in (Path(options.text), Path(options.decoder, "config.json")):
        if not path.is_file():
            sys.exit(f"{path}: expected a file; found none; next: name the text and a model's folder, see --help")
    torch.manual_seed(0)
    tokenizer = roberta_tokenizer(Path(options.decoder))
    training, held_out = windows(options.text, tokenizer)
    # Written out, attention takes a quarter of the time of the fused kernel's backward pass on a CPU.
    model = RobertaForMaskedLM._from_config(config_of(tokenizer), attn_implementation="eager")
    start(model, options.decoder, training)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {training.numel():,} tokens of text", flush=True)
    pretrain(model, tokenizer, training, held_out, seconds=60 * options.minutes, steps=options.steps)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"written: {options.out}")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(words) < 2:
        words = [__file__, str(BACKBONE), mkdtemp(), "--steps", *(words or ["2"])]
    parser.add_argument("text")
    parser.add_argument("decoder")
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--steps", type=int)
    return parser.parse_args(words)


def roberta_tokenizer(decoder: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of `decoder` with RoBERTa's special tokens in their places, and a space before every word."""
    read = json.loads((decoder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in read["added_tokens"]}
    ordinary = [token for token, _ in sorted(read["model"]["vocab"].items(), key=lambda each: each[1])]
    # RoBERTa counts positions from the id of <pad>, which therefore has to be a small one.
    vocabulary = [CLS, PAD, SEP, *(token for token in ordinary if token not in special), MASK]
    read["model"]["vocab"] = {token: number for number, token in enumerate(vocabulary)}
    read["added_tokens"], read["post_processor"] = [], None
    read["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = Tokenizer.from_str(json.dumps(read))
    tokenizer.add_special_tokens([CLS, PAD, SEP, AddedToken(MASK, lstrip=True)])
    ends = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} {SEP} $B {SEP}", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=CLS,
        bos_token=CLS,
        sep_token=SEP,
        eos_token=SEP,
        pad_token=PAD,
        mask_token=MASK,
        model_max_length=WINDOW + SPARE,
    )


def config_of(tokenizer: PreTrainedTokenizerFast) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=WINDOW + SPARE + tokenizer.pad_token_id + 1,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        hidden_dropout_prob=0.0,  # a few passes over the text: nothing to regularise
        attention_probs_dropout_prob=0.0,
        **SHAPE,
    )


def windows(path: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The text as [windows, WINDOW], each within the two ends; paragraphs are packed. Every hundredth is held out."""
    stored = Path(path).read_bytes()
    text = (lzma.decompress(stored) if path.endswith(".xz") else stored).decode("utf-8")
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    stream = np.fromiter(_tokens(paragraphs, tokenizer), dtype=np.int32)
    inner = WINDOW - 2
    count = max(2, len(stream) // inner)
    rows = np.resize(stream, (count, inner))
    ends = [np.full((count, 1), token, np.int32) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    packed = torch.from_numpy(np.concatenate([ends[0], rows, ends[1]], axis=1)).long()
    held = torch.arange(count) % 100 == 0
    return packed[~held], packed[held][:256]


def _tokens(paragraphs: list[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    for start in range(0, len(paragraphs), 4096):
        for each in tokenizer(paragraphs[start : start + 4096], add_special_tokens=False).input_ids:
            yield from each
            yield tokenizer.sep_token_id


@torch.no_grad()
def start(model: RobertaForMaskedLM, decoder: str, training: Tensor) -> None:
    """The decoder's vectors for tokens, sinusoids for positions, the tokens' frequencies for the last bias."""
    positions, words = (getattr(model.roberta.embeddings, f"{name}_embeddings").weight for name in ("position", "word"))
    angles = torch.arange(len(positions))[:, None] * torch.exp(torch.arange(0, 192, 2) * (-math.log(1000.0) / 192))
    positions.copy_(torch.cat([angles.sin(), angles.cos()], dim=1) * SPREAD * math.sqrt(2))
    theirs = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).get_input_embeddings().weight
    if theirs.shape[1] == words.shape[1]:
        words[3:-1] = theirs[1:] / theirs.std() * SPREAD
    else:
        print(f"{decoder}: its vectors have {theirs.shape[1]} numbers; those of tokens start at random")
    counts = torch.bincount(training.flatten(), minlength=len(words)) + 1.0
    model.lm_head.bias.copy_((counts / counts.sum()).log())


def pretrain(
    model: RobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    training: Tensor,
    held_out: Tensor,
    *,
    seconds: float,
    steps: int | None,
    peak: float = 1e-3,
) -> None:
    """AdamW for so many seconds or steps: a short warm-up, then a cosine to a twentieth of the peak."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    generator, began, done = torch.Generator().manual_seed(0), time.monotonic(), 0
    while True:
        share = done / steps if steps else (time.monotonic() - began) / seconds
        if done % 500 == 0 or share >= 1:
            loss = validation_loss(model, tokenizer, held_out)
            print(f"step {done}, {time.monotonic() - began:.0f} s: validation loss {loss:.3f} nats", flush=True)
        if share >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (done + 1) / 200) * (0.525 + 0.475 * math.cos(math.pi * share))
        rows = training[torch.randint(len(training), (BATCH,), generator=generator)]
        masked_loss(model, tokenizer, rows, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1


@torch.no_grad()
def validation_loss(model: RobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, rows: Tensor) -> float:
    return masked_loss(model, tokenizer, rows, torch.Generator().manual_seed(1)).item()


def masked_loss(
    model: RobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Nats a chosen token: 15 %, of which 80 % are masked, 10 % replaced and 10 % kept (Devlin et al. 2019)."""
    ends = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
    chosen = (torch.rand(rows.shape, generator=generator) < 0.15) & ~torch.isin(rows, ends)
    fate = torch.rand(rows.shape, generator=generator)
    random = torch.randint(len(ends) + 1, tokenizer.mask_token_id, rows.shape, generator=generator)
    inputs = rows.masked_fill(chosen & (fate < 0.8), tokenizer.mask_token_id)
    inputs = torch.where(chosen & (fate >= 0.9), random, inputs)
    # bfloat16 where the machine multiplies it natively; elsewhere it costs time and changes little.
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.roberta(input_ids=inputs).last_hidden_state
        logits = model.lm_head(hidden[chosen])
    return F.cross_entropy(logits.float(), rows[chosen])


if __name__ == "__main__":
    main()
