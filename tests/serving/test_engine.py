"""Continuous batching: every text is what it would be alone, whoever comes and goes beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.errors import ConfigError, InputError, MismatchError
from prefixkit.injections import key_value_prefix
from prefixkit.serving.buffered_runtime import Rows
from prefixkit.serving.engine import Engine
from prefixkit.serving.generation import Completion
from prefixkit.serving.request import BusyError, Progress, Request
from prefixkit.serving.sampling import Sampler, Sampling
from prefixkit.serving.session import OWN, Session
from prefixkit.task import encode_prompt, load_tokenizer, stop_ids
from tests.exported import TASK, backbone, exported, random_prefix

FAMILIES = ["gpt2", "llama"]
PROMPTS = ["Blue Spice", "The Eagle is a coffee shop near Burger King .", "x", "near the river", "a pub in the city"]
LENGTHS = (7, 20, 1, 12, 9)


def prefix_for(family: str, **options: Any) -> Any:
    return random_prefix(load_backbone(backbone(family)).identity, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def session_of(family: str, *, long: int = 40) -> Session:
    """The folder's own prefix, a short one, and one of `long` slots."""
    made = Session(exported(family, target="cuda").folder, device="cpu", threads=1)
    made.add_prefix("short", prefix_for(family, seed=2, length=3))
    made.add_prefix("long", prefix_for(family, seed=3, length=long))
    return made


@pytest.fixture
def session(family: str) -> Session:
    return session_of(family)


def drained(engine: Engine) -> dict[int, list[Progress]]:
    """What the engine says until it is idle, by request."""
    found: dict[int, list[Progress]] = {}
    while not engine.idle:
        for progress in engine.step():
            found.setdefault(progress.number, []).append(progress)
    return found


def answer(engine: Engine, request: Request) -> Completion:
    number = engine.submit(request)
    completion = drained(engine)[number][-1].completion
    assert completion is not None
    return completion


def test_rows_that_come_and_go_write_what_pytorch_writes_for_each_alone(session: Session, family: str) -> None:
    decoder, tokenizer = load_backbone(backbone(family)), load_tokenizer(backbone(family))
    injections = {
        None: None,
        OWN: key_value_prefix(prefix_for(family)),
        "short": key_value_prefix(prefix_for(family, seed=2, length=3)),
        "long": key_value_prefix(prefix_for(family, seed=3, length=40)),
    }
    engine, asked = Engine(session, rows=3, capacity=80), {}
    for turn, name in enumerate([*injections, *reversed(injections)] * 2):
        text, length = PROMPTS[turn % len(PROMPTS)], LENGTHS[turn * 3 % len(LENGTHS)]
        asked[engine.submit(Request(prompt=text, prefix=name, max_new_tokens=length))] = (text, name, length)
    found = drained(engine)
    wanted = set()
    for number, (text, name, length) in asked.items():
        ids = encode_prompt(TASK, tokenizer, {"input": text}, room=1)
        stop = stop_ids(TASK, tokenizer)
        (expected,) = decoder.generate([ids], injections[name], stop=stop, max_new_tokens=length)
        completion = found[number][-1].completion
        assert completion is not None
        assert list(completion.token_ids) == expected
        assert completion.text == "".join(progress.text for progress in found[number])
        wanted.add((text, tuple(expected)))
    assert len({text for text, _ in wanted}) < len(wanted), "prefixes change what is written"


def test_a_session_generates_from_the_same_folder(session: Session, family: str) -> None:
    portable = Session(exported(family).folder, device="cpu", threads=1)
    sampling = Sampling(temperature=1.2, top_k=40, seed=5)
    for how in (Sampling(), sampling):
        expected = portable.generate(PROMPTS, OWN, max_new_tokens=12, sampling=how)
        assert session.generate(PROMPTS, OWN, max_new_tokens=12, sampling=how) == expected


def test_drawn_texts_do_not_depend_on_their_neighbours(session: Session) -> None:
    requests = [
        Request(prompt=text, prefix=name, max_new_tokens=12, sampling=Sampling(temperature=1.3, seed=seed))
        for seed, (text, name) in enumerate(zip(PROMPTS, [OWN, "short", None, "long", OWN], strict=True))
    ]
    alone = [answer(Engine(session, rows=1, capacity=96), request) for request in requests]
    engine = Engine(session, rows=2, capacity=96)
    numbers = [engine.submit(request) for request in requests]
    found = drained(engine)
    assert [found[number][-1].completion for number in numbers] == alone


def test_scores_are_log_probabilities_of_the_model(session: Session, family: str) -> None:
    engine = Engine(session, rows=2, capacity=80)
    other = engine.submit(Request(prompt=PROMPTS[1], prefix="long", max_new_tokens=9))
    number = engine.submit(Request(prompt=PROMPTS[0], prefix=OWN, max_new_tokens=5, logprobs=3))
    found = drained(engine)
    assert not any(progress.scores for progress in found[other])
    scores = [score for progress in found[number] for score in progress.scores]
    decoder, tokenizer = load_backbone(backbone(family)), load_tokenizer(backbone(family))
    ids = encode_prompt(TASK, tokenizer, {"input": PROMPTS[0]}, room=1)
    whole = torch.tensor([[*ids, *(score.token for score in scores)]])
    with torch.no_grad():
        logits = decoder.logits(whole, None, key_value_prefix(prefix_for(family)))[0, len(ids) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    for score, row in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
        assert [token for token, _, _ in score.top] == row.topk(3).indices.tolist()
        assert [value for _, _, value in score.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert score.text == tokenizer.decode([score.token])


def test_a_stop_text_ends_the_answer_and_is_not_shown(session: Session) -> None:
    engine = Engine(session, rows=1, capacity=80)
    whole = answer(engine, Request(prompt=PROMPTS[1], prefix=OWN, max_new_tokens=20))
    stop = whole.text[len(whole.text) // 2 :][:3]
    number = engine.submit(Request(prompt=PROMPTS[1], prefix=OWN, max_new_tokens=20, stop=(stop, "never")))
    pieces = drained(engine)[number]
    completion = pieces[-1].completion
    assert completion is not None
    assert completion.finish == "stop"
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert "".join(piece.text for piece in pieces) == completion.text


def test_stop_texts_of_white_space_are_met(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(session, rows=1, capacity=80)
    tokens = [session.tokenizer.encode_text(text) for text in ("the blue", "\n", "eagle")]
    written = iter([token for piece in tokens for token in piece])
    monkeypatch.setattr(Sampler, "choose", lambda *_: next(written))
    asked = Request(prompt="x", max_new_tokens=20, stop=("\n",), sampling=Sampling(temperature=1.0))
    completion = answer(engine, asked)
    assert (completion.text, completion.finish) == ("the blue", "stop")


def test_prompts_are_read_with_those_of_like_length(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []
    read = Rows.read

    def noted(rows: Rows, first: int, texts: Any) -> Any:
        passes.append([len(text) for text in texts])
        return read(rows, first, texts)

    monkeypatch.setattr(Rows, "read", noted)
    engine = Engine(session, rows=4, capacity=120)
    for length in (3, 60, 5, 4):
        engine.submit(Request(prompt=(7,) * length, max_new_tokens=2))
    engine.step()
    assert passes == [[3, 4, 5], [60]]


def test_too_large_buffers_are_told_in_a_line(session: Session) -> None:
    with pytest.raises(ConfigError, match=r"buffers: expected memory for 1000000 rows of [1-9][0-9,]* MiB each"):
        Engine(session, rows=10**6, capacity=10**6)


def test_what_is_cancelled_makes_room(session: Session) -> None:
    engine = Engine(session, rows=1, capacity=80)
    first = engine.submit(Request(prompt=PROMPTS[0], max_new_tokens=20))
    second = engine.submit(Request(prompt=PROMPTS[1], max_new_tokens=4))
    third = engine.submit(Request(prompt=PROMPTS[2], max_new_tokens=4))
    engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(99)
    assert (engine.running, engine.waiting) == (0, 1)
    assert list(drained(engine)) == [third]


def test_as_many_wait_as_may(session: Session) -> None:
    engine = Engine(session, rows=2, capacity=80, waiting=1)
    for _ in range(3):
        engine.submit(Request(prompt="x", max_new_tokens=2))
    with pytest.raises(BusyError, match="expected fewer than 3 waiting"):
        engine.submit(Request(prompt="x", max_new_tokens=2))
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    with pytest.raises(BusyError, match="expected fewer than 1 waiting"):
        engine.submit(Request(prompt="x", max_new_tokens=2))
    engine.step()
    assert (engine.running, engine.waiting) == (0, 1)
    engine.submit(Request(prompt="x", max_new_tokens=2))


def test_prefixes_are_added_replaced_and_dropped_while_texts_are_written(session: Session, family: str) -> None:
    engine = Engine(session, rows=2, capacity=80)
    asked = Request(prompt=PROMPTS[1], prefix="short", max_new_tokens=15)
    before = answer(engine, asked)
    number = engine.submit(asked)
    engine.step()
    session.add_prefix("short", prefix_for(family, seed=9, length=5))
    after = engine.submit(asked)
    found = drained(engine)
    assert found[number][-1].completion == before
    assert found[after][-1].completion != before
    assert found[after][-1].completion == answer(engine, asked)
    session.drop_prefix("short")
    with pytest.raises(ConfigError, match="'short'"):
        engine.submit(asked)


def test_a_prefix_of_another_backbone_is_refused(session: Session, family: str) -> None:
    other = load_backbone(backbone(family, seed=1)).identity
    with pytest.raises(MismatchError):
        session.add_prefix("foreign", random_prefix(other))
    assert "foreign" not in session.prefixes


def test_the_capacity_is_used_to_its_last_slot(session: Session) -> None:
    tokens = tuple(range(5, 15))
    asked = Request(prompt=tokens, prefix="short", max_new_tokens=8)
    enough = answer(Engine(session, rows=2, capacity=96), asked)
    engine = Engine(session, rows=2, capacity=3 + 10 + 8 - 1)
    beside = engine.submit(Request(prompt=(7,), prefix="short", max_new_tokens=2))
    assert answer(engine, asked) == enough
    assert enough.finish == "length"
    assert beside == 0
    with pytest.raises(ConfigError, match="expected prefix, prompt and 9 new tokens in the 20 slots of a row"):
        engine.submit(Request(prompt=tokens, prefix="short", max_new_tokens=9))


def test_prompts_that_do_not_fit_together_are_read_one_after_the_other(session: Session) -> None:
    texts = [(tuple(range(5, 45)), None), ((7, 8), "long")]
    requests = [Request(prompt=ids, prefix=name, max_new_tokens=5) for ids, name in texts]
    alone = [answer(Engine(session, rows=1, capacity=96), request) for request in requests]
    engine = Engine(session, rows=2, capacity=48)
    numbers = [engine.submit(request) for request in requests]
    found = drained(engine)
    assert [found[number][-1].completion for number in numbers] == alone


def test_what_cannot_be_written_is_refused_at_once(session: Session) -> None:
    engine = Engine(session, rows=1, capacity=80)
    for request, message in (
        (Request(prompt=(99999,), max_new_tokens=2), "token ids from 0 to"),
        (Request(prompt=(), max_new_tokens=2), "at least one token"),
        (Request(prompt="x", prefix="nobody"), "nobody"),
        (Request(prompt="x", max_new_tokens=0), "new tokens"),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(request)
    assert engine.idle


def test_one_stop_text_is_not_taken_for_its_letters() -> None:
    with pytest.raises(InputError, match="stop: expected a tuple of texts; found one text"):
        Request(prompt="x", stop="END")  # type: ignore[arg-type]


def test_a_portable_folder_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="--target cuda"):
        Engine(Session(exported(family).folder, device="cpu", threads=1))


def test_buffers_are_left_alone_but_for_the_rows_of_a_pass(session: Session) -> None:
    rows = session.runtime.rows(3, 32)  # type: ignore[union-attr]
    rows.begin(1, session.prefixes["short"])
    kept = [value.numpy().copy() for value in rows.buffers._values]
    rows.read(1, [[5, 6, 7]])
    changed = [
        np.argwhere((old != value.numpy()).any(axis=(1, 3)))
        for old, value in zip(kept, rows.buffers._values, strict=True)
    ]
    assert all(places.tolist() == [[1, slot] for slot in (3, 4, 5)] for places in changed)


def test_a_damaged_graph_is_named(family: str, tmp_path: Path) -> None:
    import shutil

    from prefixkit.errors import FormatError

    folder = tmp_path / "served"
    shutil.copytree(exported(family, target="cuda").folder, folder)
    (folder / "onnx" / "decode.onnx").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"decode\.onnx"):
        Session(folder, device="cpu")
