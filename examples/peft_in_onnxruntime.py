"""An adapter that PEFT trained, imported, and served by onnxruntime: the same text. Run it from anywhere."""

import gzip
import json
import sys
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from warnings import filterwarnings

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefixkit import Session, export_onnx, save
from prefixkit.bridges.peft import import_peft
from prefixkit.quickstart import BACKBONE, E2E

filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def main(steps: int = 100) -> None:
    folder, tokenizer = Path(mkdtemp()), AutoTokenizer.from_pretrained(BACKBONE)
    adapted = trained_by_peft(steps, tokenizer)
    adapted.save_pretrained(folder / "peft")
    asked = json.loads((E2E / "test.jsonl").read_text().splitlines()[0])["input"] + " =>"

    prefix = save(import_peft(folder / "peft", backbone=BACKBONE), folder / "prefix.safetensors")
    export_onnx(prefix, BACKBONE, folder / "served")
    ours = Session(folder / "served").generate([asked], max_new_tokens=30)[0].text
    theirs = written(adapted, tokenizer, asked)
    print("PEFT        ", theirs)
    print("onnxruntime ", ours)
    print("the same" if ours.strip() == theirs.strip() else "not the same")


def trained_by_peft(steps: int, tokenizer: AutoTokenizer) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BACKBONE)
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    optimizer = torch.optim.AdamW((weight for weight in adapted.parameters() if weight.requires_grad), lr=0.03)
    with gzip.open(E2E / "train.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in islice(lines, steps)]
    for row in rows:
        text = f"{row['input']} => {row['target']}{tokenizer.eos_token}"
        ids = tokenizer(text, return_tensors="pt").input_ids
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def written(adapted: PeftModel, tokenizer: AutoTokenizer, prompt: str) -> str:
    batch = tokenizer(prompt, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    made = adapted.generate(**batch, max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
