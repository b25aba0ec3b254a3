"""The manifest: what a prefix file says of itself, as plain frozen records.

These records do no I/O. `validate` judges a JSON document, `parse` turns a valid one into records, `document` turns
records back into the JSON that is stored. The specification is schemas/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Bos = Literal["none", "before", "after"]
Answer = Literal["label", "tags", "choice", "span"]


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """The shape that one attention layer gives its keys and values."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    """Sliding-window length in tokens, or None for full attention."""


@dataclass(frozen=True, kw_only=True)
class BackboneIdentity:
    """Which frozen model a prefix was made for.

    Hashes are tagged hex strings: `b3t-v1:…` for a tensor tree, `b3-v1:…` for a file or a canonical document.
    `weights_hash` is None only where the maker of the file could not know it (imported prefixes).
    """

    name: str
    family: str
    """The `model_type` of its configuration, such as `gpt2` or `llama`."""
    hidden_size: int
    vocab_size: int
    context_length: int | None
    dtype: str
    """The dtype that most weights are stored in."""
    config_hash: str | None
    weights_hash: str | None
    tokenizer_hash: str | None
    revision: str | None = None
    stacks: Mapping[str, tuple[LayerGeometry, ...]] = field(default_factory=dict)
    """Geometry by stack (`decoder`, `encoder`), one entry a layer."""
    rope: Mapping[str, Any] | None = None
    """RoPE parameters as the backbone's configuration states them, or None without RoPE."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where the text that follows a prefix starts counting.

    `text_start` is the position id of the first real token. `prefix_takes_positions` says whether the prefix occupies
    position ids before it; with False the text starts at 0 as if there were no prefix.
    """

    text_start: int
    prefix_takes_positions: bool = True


@dataclass(frozen=True, kw_only=True)
class InjectionRecord:
    """What the backbone receives. `kind` alone decides how a file is served; `method` in the provenance never does.

    Fields that a kind does not use are None and are not stored.
    """

    kind: str
    """`key_value_prefix`, `embedding_prompt`, `hidden_prompt`, `parameter_delta` or `task_head`."""
    stack: str | None = None
    attention: str | None = None
    """`self` or `cross`, for `key_value_prefix`."""
    length: int | None = None
    positions: Positions | None = None
    frozen_slots: int | None = None
    placement: str | None = None
    """`prepend`, `after_first` or `slots`, for `embedding_prompt` and `hidden_prompt`. For `key_value_prefix` `slots`,
    or `prepend`, which it is without."""
    token_ids: tuple[int, ...] | None = None
    mode: str | None = None
    """`replace` or `add`, for `hidden_prompt`."""
    names: tuple[str, ...] | None = None
    """The changed parameters, for `parameter_delta`."""
    labels: int | None = None
    """The number of outputs, for `task_head`."""
    reads: str | None = None
    """`first`, `last`, `mean` or `each`: which of the backbone's final states a `task_head` maps."""

    @property
    def infix(self) -> bool:
        """Whether it is keys and values in slots of the text."""
        return (self.kind, self.placement) == ("key_value_prefix", "slots")


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What an image is before the backbone sees it: resized, its values divided by 255, `(value - mean) / std`."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    """One number a channel, as are the deviations."""
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The usage contract: what the prefix was trained to read and write, so that serving repeats it exactly.

    A prompt is the pieces `input_template` (with its fields filled in) and `separator`, each tokenised on its own
    without special tokens being added; the fields' values are tokenised with special tokens treated as plain text.
    """

    name: str
    input_template: str
    separator: str
    target_template: str
    bos: Bos
    """`none`: no BOS anywhere; `before`: the prefix already holds it; `after`: put one between prefix and text."""
    stop: tuple[str, ...]
    max_length: int
    """Tokens of text (prompt plus target) seen in training, at most; longer inputs were truncated."""
    chat_template_hash: str | None = None
    filler_id: int | None = None
    """A token id for runtimes that want one id a prefix slot."""
    labels: tuple[str, ...] | None = None
    verbalizer: Mapping[str, str] | None = None
    answer: Answer | None = None
    """What a head answers with: one label, a tag for each word, one of several choices, a span of the input. None
    without a head: the answer is text."""
    image: ImageRecord | None = None
    """How images are prepared, where the input is one."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who made the file and how. Open: nothing here decides how a prefix is served."""

    method: str
    prefixkit: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    data_hash: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    """Content digests of the files this one was derived from."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a prefix file says of itself, next to its tensors."""

    backbone: BackboneIdentity
    injections: tuple[InjectionRecord, ...]
    provenance: Provenance
    task: TaskRecord | None = None
    content: str | None = None
    """BLAKE3 tree over the tensors and the rest of the manifest; written on save."""
    schema: int = SCHEMA_VERSION


def document(record: Manifest | BackboneIdentity) -> dict[str, Any]:
    """The JSON document of `record`: what is None is left out, tuples become lists."""
    stored = _without_none(asdict(record))
    assert isinstance(stored, dict)
    return stored


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def parse(stored: Mapping[str, Any]) -> Manifest:
    """The records of a document that `validate.problems` found nothing wrong with."""
    provenance = dict(stored["provenance"])
    provenance["parents"] = tuple(provenance.get("parents", ()))
    return Manifest(
        schema=stored["schema"],
        backbone=parse_backbone(stored["backbone"]),
        injections=tuple(_injection(record) for record in stored["injections"]),
        task=_task(stored["task"]) if "task" in stored else None,
        provenance=Provenance(**provenance),
        content=stored.get("content"),
    )


def parse_backbone(stored: Mapping[str, Any]) -> BackboneIdentity:
    """The backbone of a document that `validate.problems` found nothing wrong with."""
    backbone = dict(stored)
    backbone["stacks"] = {
        name: tuple(LayerGeometry(**layer) for layer in layers) for name, layers in backbone["stacks"].items()
    }
    for optional in ("config_hash", "weights_hash", "tokenizer_hash", "context_length"):
        backbone.setdefault(optional, None)
    return BackboneIdentity(**backbone)


def _injection(record: Mapping[str, Any]) -> InjectionRecord:
    fields = _tuples(record)
    if "positions" in fields:
        fields["positions"] = Positions(**record["positions"])
    return InjectionRecord(**fields)


def _task(record: Mapping[str, Any]) -> TaskRecord:
    fields = _tuples(record)
    if "image" in fields:
        fields["image"] = ImageRecord(**_tuples(record["image"]))
    return TaskRecord(**fields)


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
