"""PEFT as an oracle on encoders, where it is right: a prefix under a head, and the states behind a soft prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from prefixkit.backbones.encoder import Encoder
from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt, KeyValuePrefix
from tests.encoders import CLS, TYPED, rows, spelled_out, together

# PEFT 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH = 4
TOLERANCE = 1e-5
EFFECT = 0.01


def wrapped(folder: Path, kind: Any) -> Any:
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    return get_peft_model(model, kind(task_type="SEQ_CLS", num_virtual_tokens=LENGTH)).eval()


def batch_of(family: str) -> dict[str, Tensor]:
    inputs = [{**row, "token_type_ids": spelled_out(family, row)["token_type_ids"]} for row in rows(family)]
    batch = together(inputs)
    # The tests' [CLS] is what RoBERTa pads with, and would give no position.
    batch["input_ids"].masked_fill_(batch["input_ids"] == CLS, 9)
    return batch


def key_values(flat: Tensor, layers: int, heads: int) -> KeyValuePrefix:
    """PEFT's [slot, layer, key or value, head, dim] in one row a slot."""
    each = flat.detach().view(LENGTH, 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return KeyValuePrefix(
        keys=tuple(each[0::2]), values=tuple(each[1::2]), positions=Positions(text_start=LENGTH), stack="encoder"
    )


@torch.no_grad()
@pytest.mark.parametrize("family", TYPED)
def test_prefix_tuning_under_a_classifier(
    encoder: Callable[..., Encoder], encoder_at: Callable[[str], Path], family: str
) -> None:
    """Ragged, with token types: PEFT's own head, put on our states, says what PEFT says."""
    theirs, batch, backbone = wrapped(encoder_at(family), PrefixTuningConfig), batch_of(family), encoder(family)
    prefix = key_values(theirs.prompt_encoder["default"].embedding.weight, 2, 4)
    expected = theirs(**batch).logits

    def classified(states: Tensor) -> Tensor:
        base = theirs.base_model
        answer: Tensor = base.classifier(base.bert.pooler(states) if family == "bert" else states)
        return answer

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert (classified(backbone.states(inputs, prefix)) - expected).abs().max() <= TOLERANCE
    assert (classified(backbone.states(inputs)) - expected).abs().max() > EFFECT


@torch.no_grad()
def test_prompt_tuning_where_a_head_reads_the_text(
    encoder: Callable[..., Encoder], encoder_at: Callable[[str], Path]
) -> None:
    """PEFT's own classifier reads the first vector of the prompt in the place of [CLS]; the states behind are right."""
    theirs, batch, backbone = wrapped(encoder_at("bert"), PromptTuningConfig), batch_of("bert"), encoder("bert")
    vectors = theirs.prompt_encoder["default"].embedding.weight
    prompt = EmbeddingPrompt(embeddings=vectors, positions=Positions(text_start=LENGTH), stack="encoder")
    expected = theirs(**batch, output_hidden_states=True).hidden_states[-1][:, LENGTH:]
    inputs, real = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    assert (backbone.states(inputs, prompt) - expected)[real].abs().max() <= TOLERANCE
    assert (backbone.states(inputs) - expected)[real].abs().max() > EFFECT
