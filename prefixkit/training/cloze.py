"""What a masked language model writes at the mask: of all words, or of those that stand for labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import IGNORED
from prefixkit.data.masked import collate_masked, encode_masked
from prefixkit.data.readers import Example
from prefixkit.errors import DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection
from prefixkit.task import ModelTokenizer


@torch.no_grad()
def word_scores(
    backbone: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    examples: Sequence[Example],
    received: Injection | None,
    *,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """[examples, vocab]: the log-probability in nats of each word at the mask.

    Raises:
        DataError: an input that cannot be made to fit, or a target of several tokens.
    """
    rows = encode_masked(task, tokenizer, examples)
    received = backbone.fold(received) if received is not None else None
    scores: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = collate_masked(rows[start : start + batch_size]).to(backbone.device)
        if batch.target_tokens > batch.examples:
            where, found = examples[start].where, "several"
            raise DataError(where, expected="targets of one token, which can be ranked", found=found)
        logits = backbone.target_logits(batch.input_ids, batch.attention_mask, batch.labels, received).float()
        scores.append(torch.log_softmax(logits, dim=-1).cpu())
        done(start + batch.examples)
    return torch.cat(scores)


def ranks(task: TaskRecord, tokenizer: ModelTokenizer, examples: Sequence[Example], scores: Tensor) -> list[int]:
    """The rank of each example's target in `scores` [examples, vocab], from 1."""
    targets = [
        next(label for label in row.labels if label != IGNORED) for row in encode_masked(task, tokenizer, examples)
    ]
    wanted = scores[range(len(targets)), targets]
    found: list[int] = (1 + (scores > wanted[:, None]).sum(dim=1)).tolist()
    return found


def mixed(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The logarithm of the weighted sum of the probabilities in `scores`, one [examples, words] a pattern."""
    shares = torch.tensor(weights).log()[:, None, None]
    return torch.logsumexp(torch.stack(list(scores)) + shares, dim=0)
