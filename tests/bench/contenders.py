"""The loops that are compared: ours, PEFT as people run it, PEFT at its best, and a bare loop.

All of them take a step by its number, on a batch that is collated then and never comes back, with AdamW at the same
constant rate and gradients clipped to 1, from the same prefix and in eval mode (no dropout).
"""

from __future__ import annotations

import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import Batch, EncodedExample, TrainingBatches, collate
from prefixkit.training import loop
from prefixkit.training.checkpoint import State
from prefixkit.training.config import from_mapping
from prefixkit.training.examples import Data
from prefixkit.training.preparation import prepare
from prefixkit.training.progress import Silence
from prefixkit.training.warm_up import warm_up
from tests.bench.shapes import Setting


class Done(NamedTuple):
    """A step: its loss in nats a target token, on the device still, and the real tokens it read."""

    loss: Any
    tokens: int


class Shuffled:
    """Batches in random order, whatever their lengths: a DataLoader with `shuffle=True` and a padding collator."""

    def __init__(self, examples: Sequence[EncodedExample], *, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed

    def indices(self, step: int) -> list[int]:
        """Which examples the batch of `step` holds; the last few of an epoch are dropped."""
        epoch, position = divmod(step, len(self.examples) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()

    def batch(self, step: int) -> Batch:
        """The batch of `step`."""
        return collate([self.examples[i] for i in self.indices(step)])


class Told(Silence):
    """Puts beside the table what a run says."""

    def on_message(self, message: str) -> None:
        """A line."""
        print(f"ours: {message}", file=sys.stderr, flush=True)


class Ours:
    """What `prefixkit train` does between two validations."""

    def __init__(
        self,
        setting: Setting,
        examples: Sequence[EncodedExample] | None,
        backbone: Backbone | None = None,
        data: Data | None = None,
    ) -> None:
        output = Path(tempfile.gettempdir()) / "training-bench.safetensors"
        self.prepared = prepare(from_mapping(setting.config(output)), backbone, data)
        own = self.prepared.batches
        rows = examples or own.examples
        how: Any = {"batch_size": setting.batch_size, "seed": setting.seed, "order": own.order}
        self.prepared.batches = TrainingBatches(rows, collate=own.collate, **how)
        # The same for the others, who read padded rows, as long as losses are compared.
        self.plan: TrainingBatches | Shuffled = TrainingBatches(rows, **how)
        self.optimizer, self.state = loop.make_optimizer(self.prepared), State()
        warm_up(self.prepared, self.prepared.total_steps, Told())

    @property
    def prefix(self) -> Tensor:
        """[prefix, width]: per slot layer 0's key, its value, layer 1's key, …, the order of PEFT as well."""
        (only,) = self.prepared.method.parameters()
        return only.detach().clone()

    def step(self, number: int) -> Done:
        """Train on the batch of `number`."""
        self.state.step = number
        done = loop.advance(self.prepared, self.optimizer, self.state)
        return Done(done.loss, done.tokens)


class Peer(ABC):
    """What the others share.

    Attributes:
        buckets: whether its own order is that of our padded rows, by length; otherwise at random.

    Args:
        start: [prefix, width], as `Ours.prefix`; None leaves their own.
    """

    buckets = True

    def __init__(
        self, setting: Setting, model: nn.Module, plan: TrainingBatches | Shuffled, start: Tensor | None
    ) -> None:
        self.plan, self.device = plan, torch.device(setting.device)
        self.trained = self.begin(setting, model)
        if start is not None:
            self.trained.data.copy_(start)
        self.optimizer = torch.optim.AdamW([self.trained], lr=setting.lr, weight_decay=0.0)

    @classmethod
    def own_plan(cls, setting: Setting, rows: Sequence[EncodedExample]) -> TrainingBatches | Shuffled:
        """The batches that it would have by itself."""
        kind = TrainingBatches if cls.buckets else Shuffled
        return kind(rows, batch_size=setting.batch_size, seed=setting.seed)

    @abstractmethod
    def begin(self, setting: Setting, model: Any) -> nn.Parameter:
        """Put a prefix before `model`; gives what is trained."""

    @abstractmethod
    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""

    def step(self, number: int) -> Done:
        """Train on the batch of `number`."""
        batch = self.plan.batch(number)
        on_device = (one.to(self.device) for one in (batch.input_ids, batch.attention_mask, batch.labels))
        loss = self.loss(*on_device)
        loss.backward()
        nn.utils.clip_grad_norm_([self.trained], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Done(loss.detach(), batch.tokens)


class PeftPlain(Peer):
    """PEFT as its documentation shows it: padded to the longest, labels -100, the model's own loss."""

    buckets = False

    def begin(self, setting: Setting, model: Any) -> nn.Parameter:
        """A PeftModel around `model`."""
        self.model: Any = get_peft_model(
            model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=setting.length)
        )
        self.model.eval()
        (only,) = (one for one in self.model.parameters() if one.requires_grad)
        return only

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """What the model says."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss


def loss_at_labels(decoder: Any, head: nn.Module, past: Any, slots: int, batch: Sequence[Tensor]) -> Tensor:
    """The mean loss, the output layer applied to what predicts a label and to nothing else."""
    input_ids, attention_mask, labels = batch
    mask = torch.cat([attention_mask.new_ones(len(input_ids), slots), attention_mask], dim=1)
    states = decoder(input_ids=input_ids, attention_mask=mask, past_key_values=past).last_hidden_state
    learnt = labels[:, 1:] != -100
    return F.cross_entropy(head(states[:, :-1][learnt]).float(), labels[:, 1:][learnt])


class PeftBest(PeftPlain):
    """PEFT's own prefix in the hands of somebody who counts: our length buckets, logits at labels alone."""

    buckets, compiled = True, False

    def begin(self, setting: Setting, model: Any) -> nn.Parameter:
        """A PeftModel, its decoder compiled where that is wanted."""
        only, self.slots = super().begin(setting, model), setting.length
        decoder = self.model.get_base_model().get_decoder()
        self.decoder = torch.compile(decoder, dynamic=True) if self.compiled else decoder
        return only

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Through `get_prompt`, past the model's own forward."""
        head, past = self.model.get_base_model().get_output_embeddings(), self.model.get_prompt(len(input_ids))
        return loss_at_labels(self.decoder, head, past, self.slots, (input_ids, attention_mask, labels))


class PeftCompiled(PeftBest):
    """The same with torch.compile, lengths left free so that it compiles once or twice."""

    compiled = True


class Bare(Peer):
    """A parameter, a DynamicCache, and our length buckets."""

    def begin(self, setting: Setting, model: Any) -> nn.Parameter:
        """A free prefix before `model`."""
        self.model, config = model, model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = (setting.length, config.num_hidden_layers, 2, heads, width)
        return nn.Parameter(
            torch.randn(setting.length, 2 * config.num_hidden_layers * heads * width, device=self.device)
        )

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean loss at labels."""
        layers = self.trained.to(self.model.dtype).view(self.shape).permute(1, 2, 3, 0, 4)
        rows = layers.unsqueeze(2).expand(-1, -1, len(input_ids), -1, -1, -1)
        past = DynamicCache(config=self.model.config)
        for index, (key, value) in enumerate(rows):
            past.update(key, value, index)
        batch = (input_ids, attention_mask, labels)
        return loss_at_labels(self.model.get_decoder(), self.model.get_output_embeddings(), past, self.shape[0], batch)


OURS_COMPILED = "ours, compiled"
"""Beside the peers where `--compile auto` leaves ours uncompiled: on a CPU."""
PEERS: dict[str, type[Peer]] = {
    "PEFT": PeftPlain,
    "PEFT at its best": PeftBest,
    "PEFT at its best, compiled": PeftCompiled,
    "bare loop": Bare,
}


def plain_model(setting: Setting) -> Any:
    """The frozen backbone as `transformers` loads it."""
    model = AutoModelForCausalLM.from_pretrained(setting.backbone, dtype=setting.torch_dtype)
    return model.to(setting.device).eval().requires_grad_(False)
