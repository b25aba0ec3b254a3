"""Label search (Shin et al. 2020, section 3.3): which words a masked language model would say for each label.

A linear layer learns to tell the labels from the frozen states at the mask; a word's score for a label is what that
layer makes of the word's own output vector, as a share among the labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefixkit.backbones.encoder import Encoder
from prefixkit.data.answered import encode_answered
from prefixkit.data.labelled import LabelledExample
from prefixkit.data.labelled_batches import LabelledRow, collate_labels
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, answer_ids, slots_of

BATCH = 32


def label_words(
    backbone: Encoder,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    examples: Sequence[LabelledExample],
    *,
    words: int = 10,
    steps: int = 500,
    lr: float = 3e-4,
    seed: int = 0,
) -> dict[str, list[str]]:
    """The `words` best words for each label of `task`, best first.

    Raises:
        ConfigError: a task without a mask, or with slots, for which there is no prompt yet, or whose targets are more
            than a word.
        BackboneError: a model without a masked language model's head.
    """
    backbone.refuse_wordless()
    if slots_of(task):
        raise ConfigError(f"task {task.name}", expected="a template without slots", found=str(slots_of(task)))
    states, labels = states_at_mask(backbone, task, tokenizer, examples)
    layer = _fitted(states, labels, len(task.labels or ()), steps, lr, seed)
    head = backbone.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    vectors: Tensor = head.get_parameter("weight").detach().float().cpu()
    with torch.no_grad():
        shares = torch.softmax(layer(vectors), dim=1)
    shares[sorted(tokenizer.special_ids.values())] = 0
    best = shares.argsort(dim=0, descending=True)
    found = {
        label: list(islice(_spellable(task, tokenizer, best[:, index].tolist()), words))
        for index, label in enumerate(task.labels or ())
    }
    if not all(found.values()):
        expected = "a target_template that writes a word alone"
        raise ConfigError(f"task {task.name}", expected=expected, found=repr(task.target_template))
    return found


def _spellable(task: TaskRecord, tokenizer: ModelTokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """Those of the tokens, as words, that a verbalizer of `task` can name: not halves of letters, nor ends of words."""
    for id_ in token_ids:
        word = tokenizer.decode([id_]).strip()
        if word and answer_ids(task, tokenizer, word) == [id_]:
            yield word


@torch.no_grad()
def states_at_mask(
    backbone: Encoder, task: TaskRecord, tokenizer: ModelTokenizer, examples: Sequence[LabelledExample]
) -> tuple[Tensor, Tensor]:
    """[examples, hidden], the final states where each text is masked, and [examples], the numbers of the labels.

    Raises:
        ConfigError: a task whose texts have no mask, or several.
    """
    rows: list[LabelledRow] = encode_answered(task, tokenizer, examples)
    mask, states = tokenizer.named_id("mask_token"), []
    if mask is None:
        raise ConfigError(tokenizer.folder, expected="a mask token", found="none")
    for start in range(0, len(rows), BATCH):
        batch = collate_labels(rows[start : start + BATCH])
        places = batch.inputs["input_ids"] == mask
        if (places.sum(dim=1) != 1).any():
            step = 'write {mask} once into its input_template, such as "{cls}{text}{mask}"'
            raise ConfigError(
                f"task {task.name}", expected="one mask in a text", found="another number", next_step=step
            )
        inputs = {name: tensor.to(backbone.device) for name, tensor in batch.inputs.items()}
        states.append(backbone.states(inputs)[places.to(backbone.device)].float().cpu())
    return torch.cat(states), torch.tensor([row.labels[0] for row in rows])


def _fitted(states: Tensor, labels: Tensor, outputs: int, steps: int, lr: float, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(states.shape[1], outputs)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    for _ in range(steps):
        chosen = torch.randint(len(states), (min(BATCH, len(states)),))
        F.cross_entropy(layer(states[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return layer
