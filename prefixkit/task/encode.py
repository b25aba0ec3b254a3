"""The usage contract in code: the token ids of a prompt and of a target, the same in training and in serving.

A prompt is `[BOS] input separator` and a target is `target stop`. Input, separator and target are tokenised one by
one. Special tokens that a template spells are special tokens; the same spelling in a field's value is plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task.chat import Message, chat_template_hash, render_chat
from prefixkit.task.template import SLOT_MARK, encodable, fill, slots_in, template_fields
from prefixkit.task.tokenizer import SLOT_ID, ModelTokenizer

Fields = Mapping[str, str | Sequence[Message]]
"""An input's fields by name. A chat task takes `messages`, or `input` for a conversation of one user message."""


def input_fields(task: TaskRecord) -> tuple[str, ...]:
    """The names of the fields that an input must have."""
    return template_fields(task.input_template)


def slots_of(task: TaskRecord) -> int:
    """How many slots for a prompt's vectors the task marks."""
    return slots_in(task.input_template) + task.separator.count("{slot}")


def without_slots(task: TaskRecord) -> TaskRecord:
    """`task` as a model without a prompt is asked."""
    template, separator = (part.replace("{slot}", "") for part in (task.input_template, task.separator))
    return replace(task, input_template=template, separator=separator)


def encode_prompt(
    task: TaskRecord, tokenizer: ModelTokenizer, fields: Fields, *, room: int = 0, where: str = "prompt"
) -> list[int]:
    """The ids of `[BOS] input separator`, which leave at least `room` of the task's `max_length` tokens free.

    A longer input loses tokens from its end, and only the input does: what must survive belongs into the separator.
    A conversation is refused instead, since its end opens the reply. Raises DataError, placed at `where`.
    """
    return fit_prompt(task, tokenizer, fields, room=room, where=where)[0]


def fit_prompt(
    task: TaskRecord, tokenizer: ModelTokenizer, fields: Fields, *, room: int = 0, where: str = "prompt"
) -> tuple[list[int], int]:
    """What `encode_prompt` gives, and how many tokens the input lost for it."""
    head = [bos_id(task, tokenizer)] if task.bos == "after" else []
    body = _conversation(task, tokenizer, fields, where) if is_chat(task) else _input(task, tokenizer, fields, where)
    separator = separator_ids(task, tokenizer)
    allowed = task.max_length - room - len(head) - len(separator)
    if allowed < 0 or (is_chat(task) and len(body) > allowed):
        raise DataError(
            where,
            expected=f"at most {task.max_length} tokens",
            found=f"{len(head) + len(separator) + room + (len(body) if is_chat(task) else 0)} that cannot be shortened",
            next_step="shorten it, or raise max_length where the model's context allows",
        )
    if SLOT_ID in body[allowed:]:
        step = "write what follows the text, slots and all, into the task's separator, which is never cut"
        raise DataError(
            where, expected=f"at most {allowed} tokens up to the last slot", found=f"{len(body)}", next_step=step
        )
    return head + body[:allowed] + separator, max(0, len(body) - allowed)


def separator_ids(task: TaskRecord, tokenizer: ModelTokenizer) -> list[int]:
    """The ids of the separator, in which `{slot}` marks a slot too."""
    return tokenizer.encode_marked([(task.separator.replace("{slot}", SLOT_MARK), True)])


def encode_target(task: TaskRecord, tokenizer: ModelTokenizer, text: str, *, where: str = "target") -> list[int]:
    """The ids of the filled target template, then the task's first stop token: what the model learns to write."""
    ids = tokenizer.encode_marked(fill(task.target_template, {"target": text}, where))
    return ids + list(stop_ids(task, tokenizer)[:1])


def answer_ids(task: TaskRecord, tokenizer: ModelTokenizer, word: str) -> list[int]:
    """The ids that `word` has as a target: without the stop token, and without what else is special in the template."""
    ids = tokenizer.encode_marked(fill(task.target_template, {"target": word}, "answer"))
    return [id_ for id_ in ids if id_ not in spelled_ids(task, tokenizer)]


def decode_target(task: TaskRecord, tokenizer: ModelTokenizer, ids: Sequence[int]) -> str:
    """The text that `ids` say: up to the first stop token, without white space at either end.

    Special tokens that the target template spells are not part of what was said.
    """
    ends, spelled = stop_ids(task, tokenizer), spelled_ids(task, tokenizer)
    written = takewhile(lambda id_: id_ not in ends, ids)
    return tokenizer.decode([id_ for id_ in written if id_ not in spelled]).strip()


def spelled_ids(task: TaskRecord, tokenizer: ModelTokenizer) -> set[int]:
    """The special tokens that the target template spells: written with every target, and no part of its text."""
    return {id_ for token, id_ in tokenizer.special_ids.items() if token in task.target_template}


def stop_ids(task: TaskRecord, tokenizer: ModelTokenizer) -> tuple[int, ...]:
    """The ids that end a target. Raises ConfigError for a stop string that is not one token."""
    return tuple(_stop_id(token, tokenizer) for token in task.stop)


def is_chat(task: TaskRecord) -> bool:
    """Whether prompts go through the tokenizer's chat template."""
    return task.chat_template_hash is not None


def check_task(task: TaskRecord, tokenizer: ModelTokenizer) -> None:
    """Raise ConfigError when `tokenizer` cannot do what `task` promises: stop tokens, BOS, fields, chat template."""
    stop_ids(task, tokenizer)
    template_fields(task.input_template)
    if slots_in(task.target_template):
        found, step = repr(task.target_template), "write {slot} into input_template or separator"
        raise ConfigError(f"task {task.name}", expected="a target_template without slots", found=found, next_step=step)
    if template_fields(task.target_template) != ("target",):
        found, step = repr(task.target_template), "write {target} once in target_template"
        raise ConfigError(f"task {task.name}", expected="the one field {target}", found=found, next_step=step)
    if task.bos == "after":
        bos_id(task, tokenizer)
    if task.bos != "none" and tokenizer.bos and task.input_template.startswith(tokenizer.bos):
        raise ConfigError(
            f"task {task.name}",
            expected="an input_template without the BOS token",
            found=repr(tokenizer.bos),
            next_step='write bos = "after", which puts exactly one',
        )
    template = tokenizer.chat_template
    if is_chat(task) and (template is None or chat_template_hash(template) != task.chat_template_hash):
        raise ConfigError(
            tokenizer.folder,
            expected="the chat template that the prefix was trained with",
            found="another" if template else "none",
            next_step="take the tokenizer of that backbone",
        )


def _input(task: TaskRecord, tokenizer: ModelTokenizer, fields: Fields, where: str) -> list[int]:
    texts: dict[str, str] = {}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise DataError(where, expected="text", found=repr(name), next_step="conversations need --task chat")
        texts[name] = value
    return tokenizer.encode_marked(fill(task.input_template, texts, where))


def _conversation(task: TaskRecord, tokenizer: ModelTokenizer, fields: Fields, where: str) -> list[int]:
    if set(fields) not in ({"messages"}, {"input"}):
        raise DataError(where, expected="'messages' or 'input'", found=", ".join(fields) or "no field")
    (given,) = fields.values()
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    rendered = encodable(render_chat(tokenizer, messages, where=where), where)
    # Templates write the BOS themselves; the contract alone decides whether there is one.
    return tokenizer.encode_rendered(rendered.removeprefix(tokenizer.bos or ""))


def bos_id(task: TaskRecord, tokenizer: ModelTokenizer) -> int:
    """The BOS that `task` speaks of. Raises ConfigError where the tokenizer has none."""
    if tokenizer.bos_id is None:
        raise ConfigError(
            f"task {task.name}",
            expected=f"a BOS token in {tokenizer.folder}",
            found="none",
            next_step='write bos = "none" in the task file',
        )
    return tokenizer.bos_id


def _stop_id(token: str, tokenizer: ModelTokenizer) -> int:
    ids = tokenizer.encode_marked([(token, True)])
    if len(ids) != 1:
        raise ConfigError(
            f"stop token {token!r}",
            expected="exactly one token of the vocabulary",
            found=f"{len(ids)} tokens",
            next_step="stop at one of the tokenizer's special tokens",
        )
    return ids[0]
