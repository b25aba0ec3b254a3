"""A prefix trained in one's own loop, on any decoder of transformers: `attach` adds it, everything else is yours."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixkit
from prefixkit.methods.initialization import from_text
from prefixkit.quickstart import BACKBONE


def main(steps: int = 20) -> None:
    model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    words = tokenizer("Blue Spice is a pub by the river .").input_ids
    start = from_text(prefixkit.load_backbone(BACKBONE), words, length=8)

    prefixkit.attach(model, prefixkit.PrefixTuning(start))
    optimizer = torch.optim.AdamW(model.prefixkit.parameters(), lr=0.05)
    batch = tokenizer(["The Eagle is a cheap coffee shop ."], return_tensors="pt")
    for _ in range(steps):
        loss = model(**batch, labels=batch.input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
    written = model.generate(**tokenizer("The Eagle", return_tensors="pt"), max_new_tokens=12, pad_token_id=0)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
