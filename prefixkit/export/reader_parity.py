"""Parity of one batch of a model that reads: what onnxruntime computes against PyTorch.

Texts of different lengths are read in one batch, padded on the right. The reference is each row alone, without padding,
by the backbone itself with what its file injects as it is stored: not folded, deltas added for the forward pass. What
differences are accepted, `prefixkit.export.parity` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.heads import read
from prefixkit.backbones.slots import in_slots
from prefixkit.backbones.vision import VisionEncoder
from prefixkit.export.parity import SEED, CaseResult, largest, largest_distance, texts, tolerance
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.injections import (
    EmbeddingPrompt,
    HiddenPrompt,
    Injection,
    TaskHead,
    part_of,
    parts_of,
)
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.reader import Read, Reader
from prefixkit.serving.reader_rows import ServedReading
from prefixkit.task import SLOT_ID


@dataclass(frozen=True)
class Given:
    """What one row receives, in PyTorch and in serving."""

    torch: Injection | None
    served: ServedReading


Row = list[int] | Array
"""Token ids, or an image [channels, height, width]."""


def compare(name: str, reader: Reader, backbone: ReadingBackbone, given: Sequence[Given], room: int) -> CaseResult:
    """Run one batch in both and compare every state and every logit; `room` is the longest text that fits."""
    head = next((part_of(one.torch, TaskHead) for one in given if part_of(one.torch, TaskHead)), None)
    rows, images = _rows(backbone, given, room), isinstance(backbone, VisionEncoder)
    batch: Any = np.stack(rows) if images else rows
    found = reader.read(batch, [one.served for one in given])
    wanted = [_alone(backbone, row, one.torch, head) for row, one in zip(rows, given, strict=True)]
    bare = [_alone(backbone, row, _without(one.torch), head) for row, one in zip(rows, given, strict=True)]
    changes = any(_effective(one.torch) for one in given)
    return CaseResult(
        name=name,
        rows=(1,) * len(rows) if images else tuple(map(len, rows)),
        max_abs_difference=max(largest_distance(*pair) for pair in _compared(found, wanted, reader)),
        pytorch_difference=None,
        effect=largest_distance(_flat(wanted), _flat(bare)) if changes else None,
        tolerance=tolerance("float32", largest(_flat(wanted)), None),
    )


def _rows(backbone: ReadingBackbone, given: Sequence[Given], room: int) -> list[Row]:
    if isinstance(backbone, VisionEncoder):
        config, random = backbone.model.config, np.random.default_rng(SEED)
        size = config.image_size if not isinstance(config.image_size, int) else (config.image_size,) * 2
        return list(random.standard_normal((len(given), config.num_channels, *size)).astype(np.float32))
    drawn = texts(len(given), room, 0, backbone.identity.vocab_size)
    return [_fitting(row, one.torch, room) for row, one in zip(drawn, given, strict=True)]


def _fitting(row: list[int], received: Injection | None, room: int) -> list[int]:
    """`row` with the slots of a prompt, or at least as long as what is added to its tokens."""
    for part in parts_of(received):
        if isinstance(part, (EmbeddingPrompt, HiddenPrompt)) and part.placement == "slots":
            if SLOT_ID not in row:
                row = [row[0], *[SLOT_ID] * part.length, *row[1 : room - part.length]]
        elif isinstance(part, HiddenPrompt) and part.mode == "add":
            row = (row * (2 + part.length))[: max(len(row), 1 + part.length)]
    return row


def _effective(received: Injection | None) -> bool:
    return any(not isinstance(part, TaskHead) for part in parts_of(received))


def _without(received: Injection | None) -> Injection | None:
    """What a row of the bare model receives: nothing, or in slots of the text, which are something, zeros."""
    prompt = in_slots(received)
    return None if prompt is None else replace(prompt, embeddings=torch.zeros_like(prompt.embeddings))


@torch.no_grad()
def _alone(backbone: ReadingBackbone, row: Row, received: Injection | None, head: TaskHead | None) -> Read:
    """The states [seq, hidden] of one row, and its logits."""
    if isinstance(row, np.ndarray):
        inputs = {"pixel_values": torch.from_numpy(row)[None].to(backbone.device)}
    else:
        ids = torch.tensor([row], device=backbone.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = backbone.states(inputs, received)
    logits = None
    if head is not None:
        logits = read(head, states, inputs.get("attention_mask"))[0]
    elif isinstance(backbone, Encoder) and backbone.writes:
        everything = torch.zeros_like(inputs["input_ids"])
        logits = backbone.target_logits(inputs["input_ids"], inputs["attention_mask"], everything, received)
    return Read(states[0].float().cpu().numpy(), None if logits is None else logits.float().cpu().numpy())


def _compared(found: Read, wanted: Sequence[Read], reader: Reader) -> list[tuple[list[Array], list[Array]]]:
    """What was found and what was wanted, row by row, without padding: of the states, and of the logits."""
    states = [found.states[index, : len(row.states)] for index, row in enumerate(wanted)]
    pairs = [(states, [row.states for row in wanted])]
    if found.logits is not None:
        logits = list(found.logits)
        if reader.parts.head in (None, "each"):
            logits = [found.logits[index, : len(row.states)] for index, row in enumerate(wanted)]
        pairs.append((logits, [row.logits for row in wanted if row.logits is not None]))
    return pairs


def _flat(rows: Sequence[Read]) -> list[Array]:
    return [row.states for row in rows] + [row.logits for row in rows if row.logits is not None]
