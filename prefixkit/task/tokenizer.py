"""A model folder's tokenizer and what the folder says of its special tokens, read without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from prefixkit.errors import BackboneError
from prefixkit.task.template import SLOT_MARK
from prefixkit.task.token_bytes import most_bytes

SLOT_ID = -1
"""The id of a slot among token ids: a prompt's vector stands there."""
_LONG = 10_000
"""Characters that take milliseconds."""


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer that never adds a special token by itself, and never reads one out of a user's text.

    `backend` is owned: its padding, truncation and treatment of special tokens are set here.
    """

    backend: Tokenizer
    bos: str | None = None
    eos: str | None = None
    stop: tuple[str, ...] = ()
    """Every token that the model's configuration calls an end of sequence, `eos` first."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that chat templates use: `bos_token`, `pad_token`, …"""
    chat_template: str | None = None
    folder: str = "tokenizer"

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True

    @property
    def bos_id(self) -> int | None:
        return self.token_id(self.bos)

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.eos)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the model expects a BOS: its own post-processor puts one in front of every text."""
        return self.bos_id is not None and self.backend.encode("a").ids[:1] == [self.bos_id]

    @cached_property
    def separators(self) -> int:
        """How many special tokens its post-processor puts between two texts: RoBERTa's two, BERT's one."""
        owners = self.backend.encode("a", "a").sequence_ids
        between = owners[owners.index(0) : owners.index(1)] if {0, 1} <= set(owners) else []
        return max(1, between.count(None))

    def named_id(self, name: str) -> int | None:
        """The id of the special token of that name, such as `mask_token`; None without one."""
        return self.token_id(self.special_tokens.get(name))

    def token_id(self, token: str | None) -> int | None:
        """The id of `token`, or None where the vocabulary has no such token."""
        return None if token is None else self.backend.token_to_id(token)

    def encode_text(self, text: str) -> list[int]:
        """The ids of `text`, in which a special token's spelling is plain text like any other.

        Tokens that a tokenizer adds without calling them special, such as `<think>`, are recognised as ever.
        """
        return list(_encoded(self.backend, text).ids)

    def encode_marked(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """The ids of `(text, trusted)` parts; special tokens are recognised in trusted text only, and slots.

        Text between two special tokens is tokenised in one go, whoever wrote it.
        """
        ids: list[int] = []
        for text, special in self._runs(parts):
            ids += [self._marks[text]] if special else self.encode_text(text)
        return ids

    def encode_located(self, parts: Iterable[tuple[str, bool]]) -> list[tuple[int, int, int]]:
        """What `encode_marked` gives, each id with the characters of all the text that it stands for: begin and end."""
        located: list[tuple[int, int, int]] = []
        before = 0
        for text, special in self._runs(parts):
            if special:
                located.append((self._marks[text], before, before + len(text)))
            else:
                found = self.backend.encode(text, add_special_tokens=False)
                places = zip(found.ids, found.offsets, strict=True)
                located += [(id_, before + begin, before + end) for id_, (begin, end) in places]
            before += len(text)
        return located

    def _runs(self, parts: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """The special tokens and slots of `parts`, True, and the text between them."""
        plain = ""
        for text, trusted in parts:
            for piece in self._special_pattern.split(text) if trusted else (text,):
                if trusted and piece in self._marks:
                    if plain:
                        yield plain, False
                    yield piece, True
                    plain = ""
                else:
                    plain += piece
        if plain:
            yield plain, False

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a chat template's output: special tokens are recognised wherever they stand."""
        return list(_encoded(self._recognising, text).ids)

    def surely_more(self, text: str, tokens: int) -> bool:
        """Whether `text` has more than so many tokens, whatever it says; False where only tokenising it can tell."""
        size = len(text.encode("utf-8", "surrogatepass"))
        return size > tokens and self._most_bytes is not None and size > tokens * self._most_bytes

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The id of every special token, by its spelling."""
        return {token.content: id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _most_bytes(self) -> int | None:
        return most_bytes(self.backend)

    @cached_property
    def _marks(self) -> dict[str, int]:
        return {**self.special_ids, SLOT_MARK: SLOT_ID}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = [*sorted(self.special_ids, key=len, reverse=True), SLOT_MARK]
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _recognising(self) -> Tokenizer:
        # A second tokenizer, because the switch belongs to the backend and other threads may be encoding user text.
        return Tokenizer.from_str(self.backend.to_str())


def _encoded(backend: Tokenizer, text: str) -> Encoding:
    """`text` tokenised; while a long one is, other threads go on, for only a batch releases the GIL."""
    if len(text) < _LONG:
        return backend.encode(text, add_special_tokens=False)
    return backend.encode_batch([text], add_special_tokens=False)[0]


def load_tokenizer(folder: str | Path) -> ModelTokenizer:
    """The tokenizer of a model folder, with the special tokens that its configuration files name.

    Reads `tokenizer.json`, and where they exist `tokenizer_config.json`, `chat_template.jinja`,
    `generation_config.json` and `config.json`. Raises BackboneError.
    """
    folder = Path(folder)
    backend = _backend(folder / "tokenizer.json")
    config = _json(folder / "tokenizer_config.json")
    generation = {**_json(folder / "config.json"), **_json(folder / "generation_config.json")}
    special = {key: _content(value) for key, value in config.items() if key.endswith("_token") and _content(value)}
    bos = special.get("bos_token") if "bos_token" in config else _first(_tokens(backend, generation, "bos_token_id"))
    ends = _tokens(backend, generation, "eos_token_id")
    eos = special.get("eos_token") if "eos_token" in config else _first(ends)
    return ModelTokenizer(
        backend=backend,
        bos=bos,
        eos=eos,
        stop=tuple(dict.fromkeys([*([eos] if eos else []), *ends])),
        special_tokens={**({"bos_token": bos} if bos else {}), **({"eos_token": eos} if eos else {}), **special},
        chat_template=_chat_template(folder, config),
        folder=str(folder),
    )


def _backend(path: Path) -> Tokenizer:
    if not path.is_file():
        raise BackboneError(
            path,
            expected="the model's tokenizer",
            found="no such file",
            next_step="AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER) writes it",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise BackboneError(path, expected="a tokenizers JSON file", found=str(error)) from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(path, expected="a JSON object", found=str(error)) from error
    if not isinstance(stored, dict):
        raise BackboneError(path, expected="a JSON object", found=f"a {type(stored).__name__}")
    return stored


def _content(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _tokens(backend: Tokenizer, config: Mapping[str, Any], key: str) -> list[str]:
    stored = config.get(key)
    ids = stored if isinstance(stored, list) else [stored]
    tokens = (backend.id_to_token(id_) for id_ in ids if type(id_) is int and id_ >= 0)
    return [token for token in tokens if token is not None]


def _first(tokens: list[str]) -> str | None:
    return tokens[0] if tokens else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    stored = config.get("chat_template")
    if isinstance(stored, list):  # several named templates; "default" is the one for plain conversations
        stored = {entry.get("name"): entry.get("template") for entry in stored}.get("default")
    return stored if isinstance(stored, str) else None
