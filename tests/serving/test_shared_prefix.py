"""Rows that read one prefix in place write what each writes alone, whoever shares it and whatever takes its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import ConfigError, ParityError
from prefixkit.export.buffered_verify import verify_buffered
from prefixkit.export.verify import refuse_differences
from prefixkit.injections import key_value_prefix
from prefixkit.serving.engine import Engine
from prefixkit.serving.request import Request
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.session import OWN, Session
from prefixkit.serving.shared_prefix import SharedPrefix
from prefixkit.task import encode_prompt, load_tokenizer, stop_ids
from tests.exported import TASK, backbone, exported
from tests.serving.test_engine import LENGTHS, PROMPTS, answer, drained, prefix_for, session_of

LONG = 60
CAPACITY = 48
"""Less than the long prefix takes."""


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """With as many heads of keys as of queries, and with fewer."""
    return str(request.param)


@pytest.fixture
def session(family: str) -> Session:
    return session_of(family, long=LONG)


def alone(session: Session, request: Request) -> Any:
    """Behind a copy in its own row."""
    return answer(Engine(session, rows=1, capacity=120), request)


def test_rows_that_share_and_rows_that_do_not_write_what_pytorch_writes_for_each_alone(
    session: Session, family: str
) -> None:
    decoder, tokenizer = load_backbone(backbone(family)), load_tokenizer(backbone(family))
    injections = {
        "long": key_value_prefix(prefix_for(family, seed=3, length=LONG)),
        None: None,
        OWN: key_value_prefix(prefix_for(family)),
    }
    engine, asked = Engine(session, rows=3, capacity=CAPACITY, shared="long"), {}
    for turn, name in enumerate(["long", *injections, "long", "long", OWN] * 2):
        text, length = PROMPTS[turn % len(PROMPTS)], LENGTHS[turn * 3 % len(LENGTHS)]
        asked[engine.submit(Request(prompt=text, prefix=name, max_new_tokens=length))] = (text, name, length)
    found = drained(engine)
    for number, (text, name, length) in asked.items():
        ids, stop = encode_prompt(TASK, tokenizer, {"input": text}, room=1), stop_ids(TASK, tokenizer)
        (expected,) = decoder.generate([ids], injections[name], stop=stop, max_new_tokens=length)
        completion = found[number][-1].completion
        assert completion is not None
        assert list(completion.token_ids) == expected


def test_a_shared_prefix_is_stored_once_and_copied_into_no_row(session: Session) -> None:
    engine = Engine(session, rows=2, capacity=CAPACITY, shared="long")
    rows = engine._batching._rows
    for _ in range(2):
        engine.submit(Request(prompt=(5, 6, 7), prefix="long", max_new_tokens=4))
    engine.step()
    assert rows.write_index.tolist() == [3, 3]
    assert rows.seen.tolist() == [LONG, LONG]
    assert rows.shared is not None
    kept = zip(rows.shared.buffers._values, session.prefixes["long"].tensors, strict=True)  # type: ignore[union-attr]
    assert all((value.numpy()[0] == tensor).all() for value, tensor in kept)
    # Beyond its own tokens, nothing was written to a row: its slots are fewer than those of the prefix.
    assert all(not value.numpy()[:, :, 4:].any() for value in rows.buffers._values)
    assert rows.buffers.capacity == CAPACITY


def test_the_prefix_is_what_changes_the_text(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request(prompt=PROMPTS[1], prefix="long", max_new_tokens=10, logprobs=0)
    whole = answer(Engine(session, rows=2, capacity=CAPACITY, shared="long"), asked)
    assert whole == alone(session, asked)
    monkeypatch.setattr(SharedPrefix, "keep", lambda *_: False)
    assert answer(Engine(session, rows=2, capacity=CAPACITY, shared="long"), asked).token_ids != whole.token_ids


def test_a_shared_prefix_is_replaced_while_it_is_read(session: Session, family: str) -> None:
    asked = Request(prompt=PROMPTS[1], prefix="long", max_new_tokens=15)
    other = Request(prompt=PROMPTS[0], prefix="short", max_new_tokens=6, sampling=Sampling(temperature=1.2, seed=4))
    engine, before = Engine(session, rows=3, capacity=CAPACITY, shared="long"), alone(session, asked)
    first = engine.submit(asked)
    engine.step()
    waited = []
    # Longer than the one before, then shorter.
    for seed, length in ((9, LONG + 7), (10, 5)):
        session.add_prefix("long", prefix_for(family, seed=seed, length=length))
        waited.append((engine.submit(asked), alone(session, asked)))
        waited.append((engine.submit(other), alone(session, other)))
    engine.step()
    assert (engine.running, engine.waiting) == (1, 4)
    found = drained(engine)
    assert found[first][-1].completion == before
    assert [found[number][-1].completion for number, _ in waited] == [expected for _, expected in waited]
    assert len({expected.token_ids for _, expected in waited} | {before.token_ids}) == 4


def test_a_shared_prefix_is_dropped_and_comes_back(session: Session, family: str) -> None:
    asked = Request(prompt=PROMPTS[1], prefix="long", max_new_tokens=15)
    engine, before = Engine(session, rows=2, capacity=CAPACITY, shared="long"), alone(session, asked)
    number = engine.submit(asked)
    engine.step()
    session.drop_prefix("long")
    with pytest.raises(ConfigError, match="'long'"):
        engine.submit(asked)
    assert drained(engine)[number][-1].completion == before
    session.add_prefix("long", prefix_for(family, seed=11, length=LONG))
    assert answer(engine, asked) == alone(session, asked) != before


def test_nobody_else_needs_to_share(session: Session) -> None:
    requests = [
        Request(prompt=text, prefix=name, max_new_tokens=6)
        for text, name in zip(PROMPTS[:3], (OWN, None, "short"), strict=True)
    ]
    engine = Engine(session, rows=2, capacity=CAPACITY, shared="a name to come")
    numbers, found = [engine.submit(request) for request in requests], drained(engine)
    assert [found[number][-1].completion for number in numbers] == [alone(session, request) for request in requests]


def test_the_capacity_is_for_prompt_and_answer(session: Session) -> None:
    engine = Engine(session, rows=1, capacity=10 + 8 - 1, shared="long")
    tokens = tuple(range(5, 15))
    asked = Request(prompt=tokens, prefix="long", max_new_tokens=8)
    assert answer(engine, asked) == alone(session, asked)
    with pytest.raises(ConfigError, match="expected prompt and 9 new tokens in the 17 slots of a row; found 10"):
        engine.submit(Request(prompt=tokens, prefix="long", max_new_tokens=9))


def test_a_folder_of_before_there_was_sharing_serves_as_it_did(tmp_path: Path) -> None:
    folder = shutil.copytree(exported("gpt2", target="cuda").folder, tmp_path / "served")
    report = json.loads((folder / "export.json").read_text())
    del report["buffered"]["shared"]
    report["graph"]["files"] = [file for file in report["graph"]["files"] if file["file"] != "onnx/shared.onnx"]
    (folder / "export.json").write_text(json.dumps(report))
    (folder / "onnx" / "shared.onnx").unlink()
    old, new = (Session(each, device="cpu", threads=1) for each in (folder, exported("gpt2", target="cuda").folder))
    asked = Request(prompt=PROMPTS[0], prefix=OWN, max_new_tokens=6)
    assert answer(Engine(old, rows=1, capacity=80), asked) == alone(new, asked)
    with pytest.raises(ConfigError, match=r"expected a graph whose rows can share a prefix.*; export again"):
        Engine(old, rows=1, capacity=80, shared=OWN)


def test_what_is_shared_and_not_read_fails_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_backbone(backbone("gpt2"))
    assert isinstance(loaded, Decoder)
    folder, injection = exported("gpt2", target="cuda").folder, key_value_prefix(prefix_for("gpt2"))
    refuse_differences(verify_buffered(folder, loaded, injection))
    monkeypatch.setattr(SharedPrefix, "keep", lambda *_: False)
    with pytest.raises(ParityError, match="case 'shared prefix'"):
        refuse_differences(verify_buffered(folder, loaded, injection))
