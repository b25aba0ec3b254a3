"""All that are compared in serving, by name. Each is imported when it is built: ours need no PyTorch."""

from __future__ import annotations

from typing import Any

from tests.bench.genai_peer import NoGenaiError
from tests.bench.serving_work import Tell, Work

SCATTERED, PORTABLE = "ours, opset 24 for tokens", "ours, portable graph"
TRANSFORMERS, PEFT, GENAI = "transformers generate", "PEFT generate, one prefix", "onnxruntime-genai, prompt for prefix"
OURS = ("ours", SCATTERED, PORTABLE)


def build(name: str, work: Work, genai: str | None = None, model: Any = None) -> Any:
    """The contender of that name; `model` is what transformers loaded, for those that run it.

    Raises:
        NoGenaiError: for onnxruntime-genai, which cannot run the model.
    """
    if name in OURS:
        from tests.bench import serving_ours

        kinds = (serving_ours.OurEngine, serving_ours.OurScatteredEngine, serving_ours.OurPortable)
        return kinds[OURS.index(name)](work)
    if name == GENAI:
        from tests.bench.genai_peer import Genai

        assert genai is not None
        return Genai(work, genai)
    from tests.bench import serving_peers

    return (serving_peers.Transformers if name == TRANSFORMERS else serving_peers.Peft)(work, model)


def build_all(work: Work, genai: str | None, tell: Tell) -> dict[str, Any]:
    """All of them, those of transformers around one model; onnxruntime-genai where it can be had."""
    from tests.bench.serving_peers import load_model

    model = load_model(work)
    names = [name for name in (*OURS, TRANSFORMERS, PEFT) if name != PORTABLE or work.portable]
    found = {name: build(name, work, model=model) for name in names}
    if genai is None:
        tell("onnxruntime-genai: left out, there is no --genai-python")
        return found
    try:
        found[GENAI] = build(GENAI, work, genai)
    except NoGenaiError as error:
        tell(f"onnxruntime-genai: left out: {error}")
    return found
