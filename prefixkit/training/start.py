"""The method of a run at its start, with a head where its task wants one."""

from __future__ import annotations

from collections.abc import Callable

from prefixkit.backbones.backbone import Backbone
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import TaskHead, injection, part_of
from prefixkit.methods.catalogue import METHODS, method_file
from prefixkit.methods.method import Material, Method
from prefixkit.methods.with_head import WithHead
from prefixkit.prefix import Prefix
from prefixkit.training.config import TrainConfig


def method_for(
    config: TrainConfig, backbone: Backbone, task: TaskRecord, material: Material, parents: list[Prefix]
) -> Method:
    """The method of a run at its start, on the backbone's device, with a head where its task wants one.

    Args:
        parents: the prefix files that it starts from; a head for the same labels is taken over.

    Raises:
        ConfigError: a start or a setting that the method does not know, or a method that takes no head.
        BackboneError: text that the model cannot place where it should start.
    """
    name = config.method.name
    if task.answer is None:
        method = method_file(name).make(config.method, material)
    elif METHODS[name].head:
        body = None if name == "linear-probe" else method_file(name).make(config.method, material)
        method = _with_head(body, backbone, task, config.seed, parents)
    else:
        step = "use a task that is answered in words"
        raise ConfigError(f"--method {name}", expected="a task without a head", found=repr(task.name), next_step=step)
    method = method.to(backbone.device)
    backbone.refuse_unplaceable(method())
    return method


def _with_head(body: Method | None, backbone: Backbone, task: TaskRecord, seed: int, parents: list[Prefix]) -> WithHead:
    """`body` and a head for `task`: that of a parent with the same labels, or else a random one."""
    one = "last" if backbone.kind == "decoder" else "first"
    return WithHead(
        body,
        outputs={"choice": 1, "span": 2}.get(task.answer or "", len(task.labels or ())),
        hidden=backbone.identity.hidden_size,
        reads="each" if task.answer in ("tags", "span") else one,
        seed=seed,
        start=next((head for head in map(_head_for(task), parents) if head is not None), None),
    )


def _head_for(task: TaskRecord) -> Callable[[Prefix], TaskHead | None]:
    def head(parent: Prefix) -> TaskHead | None:
        theirs = parent.manifest.task
        same = theirs is not None and (theirs.answer, theirs.labels) == (task.answer, task.labels)
        return part_of(injection(parent), TaskHead) if same else None

    return head
