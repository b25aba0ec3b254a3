"""Capture: text behind a captured context computes what it computes behind the context itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from prefixkit import capture, load, load_backbone, save
from prefixkit.data.readers import read_examples
from prefixkit.errors import ConfigError
from prefixkit.export.onnx import export_onnx
from prefixkit.injections import key_value_prefix
from prefixkit.prefix import Prefix
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.serving.prefix_table import served
from prefixkit.serving.report import read_report
from prefixkit.serving.runtime import Runtime
from prefixkit.serving.session import Session
from prefixkit.task import encode_prompt, load_tokenizer
from tests.architectures import WINDOW, tiny
from tests.exported import root
from tests.ragged import padded, prompts
from tests.small_tokenizer import CHAT_TEMPLATE, END, small_backend, write_folder

Folder = Callable[..., Path]
TOLERANCE = 1e-5
EFFECT = 0.1
CONTEXT = "name : blue spice | area : river\nblue spice is near the river .\n" * 7
"""225 tokens with a BOS: the window ends a little later, within the text that follows."""
EDGE = {"sliding_window": 230}
LONGER = {"max_position_embeddings": 512}
FAMILIES = {
    "gpt2": LONGER,
    "llama": LONGER,
    "mistral_window": {**LONGER, **EDGE},
    "gemma3": {**LONGER, **EDGE},
    "falcon": LONGER,
    "gpt_neox": LONGER,
    "bloom": {},
}


@cache
def roomy(family: str) -> Path:
    """A tiny model whose context, and window, hold `CONTEXT`; its tokenizer puts a BOS before a text, as Llama's."""
    folder = root() / f"roomy-{family}"
    tiny(family, **FAMILIES[family]).save_pretrained(folder)
    names = {"bos_token": "<s>", "eos_token": END}
    return write_folder(
        folder, small_backend(adds_bos=True), tokenizer_config={**names, "chat_template": CHAT_TEMPLATE}
    )


@cache
def captured(family: str) -> Prefix:
    return save(capture(roomy(family), CONTEXT), root() / f"captured-{family}")


def unmodified(family: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(roomy(family)).eval()


@torch.no_grad()
def behind(model: PreTrainedModel, context: list[int], row: Tensor) -> Tensor:
    """Logits [seq, vocab] of `row` with the context in the prompt."""
    logits: Tensor = model(input_ids=torch.tensor([context + row.tolist()])).logits[0, len(context) :]
    return logits


def as_transformers_reads(family: str) -> list[int]:
    """`CONTEXT` and the BOS before it, by a tokenizer that is not ours."""
    ids: list[int] = PreTrainedTokenizerFast.from_pretrained(roomy(family))(CONTEXT)["input_ids"]
    assert len(ids) == 225
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_behind_the_context(family: str) -> None:
    context, rows, model = as_transformers_reads(family), prompts(), unmodified(family)
    prefix = key_value_prefix(captured(family))
    ids, mask = padded(rows).values()
    with torch.no_grad():
        logits = load_backbone(roomy(family)).logits(ids, mask, prefix)
    for index, row in enumerate(rows):
        found = logits[index][mask[index].bool()]
        assert (found - behind(model, context, row)).abs().max() <= TOLERANCE
        assert (found - behind(model, context[:1], row)).abs().max() > EFFECT
    assert prefix.length == len(context)
    assert captured(family).manifest.provenance.metrics == {"tokens": len(context)}


@torch.no_grad()
def test_two_hundred_tokens_of_a_real_model_are_exact() -> None:
    """In float64: at logits of 18, float32 itself is off by 2e-5."""
    backbone = load_backbone(BACKBONE)
    backbone.model.double()
    tokenizer = load_tokenizer(backbone.folder)
    text = " ".join(f"{one.fields['input']} => {one.target}" for one in read_examples(E2E / "test.jsonl")[:8])
    context, after = tokenizer.encode_text(text)[:200], tokenizer.encode_text(" city\neagle is near the city .")
    expected = backbone.release()(input_ids=torch.tensor([context + after])).logits[0, 200:]
    bare = backbone.model(input_ids=torch.tensor([after])).logits[0]
    found = backbone.logits(torch.tensor([after]), None, backbone.key_values_of(context))[0]
    assert (found - expected).abs().max() <= 1e-10
    assert (found - bare).abs().max() > 1.0


def greedy(model: PreTrainedModel, text: list[int], steps: int) -> list[int]:
    ids = torch.tensor([text])
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(text) :].tolist()
    return written


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mistral_window"])
def test_what_is_written_is_what_follows_the_context(family: str) -> None:
    context, rows, model = as_transformers_reads(family), [row.tolist() for row in prompts()], unmodified(family)
    prefix = key_value_prefix(captured(family))
    found = load_backbone(roomy(family)).generate(rows, prefix, stop=[], max_new_tokens=12)
    assert found == [greedy(model, context + row, 12) for row in rows]
    assert found != [greedy(model, context[:1] + row, 12) for row in rows]


def test_onnxruntime_goes_on_where_the_context_ends(tmp_path: Path) -> None:
    folder, rows, model = roomy("llama"), prompts(), unmodified("llama")
    context, prefix = as_transformers_reads("llama"), captured("llama")
    export_onnx(prefix, folder, tmp_path / "served")
    runtime = Runtime(read_report(tmp_path / "served"), device="cpu")
    logits = runtime.start([served(prefix, runtime.dtype)] * len(rows)).feed([row.tolist() for row in rows])
    for index, row in enumerate(rows):
        found = torch.from_numpy(logits[index, -len(row) :])
        assert (found - behind(model, context, row)).abs().max() <= TOLERANCE
        assert (found - behind(model, context[:1], row)).abs().max() > EFFECT
    session, text = Session(tmp_path / "served", device="cpu"), "eagle is"
    written = list(session.generate([text], max_new_tokens=8)[0].token_ids)
    asked = load_tokenizer(folder).encode_text(text)
    assert written == greedy(model, context + asked, 8)
    assert written != list(session.generate([text], None, max_new_tokens=8)[0].token_ids)


def test_a_chat_behind_its_system_message_is_the_whole_chat() -> None:
    backbone, tokenizer = load_backbone(roomy("llama")), load_tokenizer(roomy("llama"))
    prefix = capture(backbone, "Be brief.", task="chat")
    task, messages = prefix.manifest.task, [{"role": "user", "content": "Hi"}]
    assert task is not None
    after = torch.tensor(encode_prompt(task, tokenizer, {"messages": messages}))
    whole = [{"role": "system", "content": "Be brief."}, *messages]
    tokenized = PreTrainedTokenizerFast.from_pretrained(roomy("llama"))
    theirs = tokenized.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        found = backbone.logits(after[None], None, key_value_prefix(prefix))[0]
    expected = behind(unmodified("llama"), theirs[: -len(after)], after)
    assert theirs[-len(after) :] == after.tolist()
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("bos", "kept", "more"), [("none", "none", 0), ("after", "before", 1), ("before", "before", 1)]
)
def test_a_promised_bos_is_in_the_prefix_once(bos: str, kept: str, more: int, tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text(f'bos = "{bos}"\n')
    prefix, tokenizer = capture(roomy("llama"), CONTEXT, task=path), load_tokenizer(roomy("llama"))
    assert prefix.manifest.task is not None
    assert prefix.manifest.task.bos == kept
    assert prefix.manifest.injections[0].length == len(tokenizer.encode_text(CONTEXT)) + more
    assert tokenizer.bos_id not in encode_prompt(prefix.manifest.task, tokenizer, {"input": "eagle"})


def test_the_same_context_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(capture(roomy("gpt2"), CONTEXT), tmp_path / name)
    save(capture(roomy("gpt2"), CONTEXT + "."), tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    kept, other = (load(tmp_path / name).manifest.provenance for name in ("one", "other"))
    assert (kept.method, kept.seed, dict(kept.config)) == ("capture", None, {})
    assert kept.data_hash != other.data_hash


@pytest.mark.parametrize(
    ("family", "most", "why"),
    [("gpt2", 126, "a context of 128, 2 left for what follows"), ("gemma3", WINDOW - 1, "a sliding window of 16")],
)
def test_the_longest_context_works_and_one_token_more_is_refused(
    backbone_folder: Folder, family: str, most: int, why: str
) -> None:
    backbone = load_backbone(backbone_folder(family))
    letters = "qz" * 100
    assert len(load_tokenizer(backbone.folder).encode_text(letters)) == len(letters)
    prefix = capture(backbone, letters[:most])
    assert prefix.manifest.task is not None
    assert prefix.manifest.task.max_length == 128 - most
    written = backbone.generate([[5]], key_value_prefix(prefix), stop=[], max_new_tokens=1)
    assert len(written[0]) == 1
    with pytest.raises(ConfigError, match=rf"context: expected at most {most} tokens \({why}\); found {most + 1}; "):
        capture(backbone, letters[: most + 1])


def test_nothing_is_captured_of_no_text(backbone_folder: Folder) -> None:
    with pytest.raises(ConfigError, match="context: expected at least one token; found none"):
        capture(backbone_folder("gpt2"), "")


def test_half_precision_is_kept_as_it_is(backbone_folder: Folder) -> None:
    prefix = capture(load_backbone(backbone_folder("gpt2"), dtype="float16"), "blue spice")
    assert {array.dtype for array in prefix.tensors.values()} == {np.dtype("float16")}
