"""A byte-level BPE made on the spot, and the folder that a model would keep it in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from prefixkit.task import ModelTokenizer

END = "<|endoftext|>"
CHAT_TOKENS = ("<s>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

TEXT = [
    "name : Blue Spice | Type : pub | area : riverside",
    "Blue Spice is a pub by the riverside .",
    "The Eagle is a coffee shop near Burger King .",
]


def small_backend(*, adds_bos: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (END, *CHAT_TOKENS)],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def small_tokenizer(*, adds_bos: bool = False, **facts: Any) -> ModelTokenizer:
    """GPT-2's habits (one token is BOS and EOS), or Llama's with `adds_bos`."""
    bos = "<s>" if adds_bos else END
    named = {"bos": bos, "eos": END, "stop": (END,), "special_tokens": {"bos_token": bos, "eos_token": END}}
    return ModelTokenizer(small_backend(adds_bos=adds_bos), **{**named, **facts})


def write_folder(folder: Path, backend: Tokenizer | None = None, **files: Any) -> Path:
    """A model folder with a tokenizer and JSON files: `tokenizer_config={...}` becomes tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (backend or small_backend()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
