"""Soft prompts for servers that take vectors in the place of token ids: vLLM and SGLang.

Both want the vectors of the whole prompt: those of the soft prompt, then those of the text, as the model's embedding
makes them. Written to the formats of vLLM 0.33 and SGLang 0.5; neither was run.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.soft_prompt import prompt_vectors
from prefixkit.format.atomic import write_bytes
from prefixkit.prefix import Prefix

if TYPE_CHECKING:
    from torch import Tensor

    Embedding = Callable[[Tensor], Tensor]
    """From ids [seq] to vectors [seq, hidden], with the model's scale: `model.get_input_embeddings()`."""

_HERE = "prefixkit.bridges.prompt_embeds"
_ALONE = "it holds the soft prompt alone: the text's own vectors must follow it, which {function} does"


def whole_prompt(prefix: Prefix, token_ids: Sequence[int], embedding: Embedding, *, runtime: str) -> Tensor:
    """The vectors [prefix + seq, hidden] of the soft prompt in `prefix` and of the text behind it.

    Raises:
        FormatError: something besides a soft prompt before the text of a decoder.
    """
    import torch

    from prefixkit.injections.arrays import tensor

    vectors = tensor(prompt_vectors(prefix, runtime))
    with torch.no_grad():
        text = embedding(torch.tensor(list(token_ids), dtype=torch.long))
    return torch.cat([vectors.to(text.device, text.dtype), text])


def vllm_prompt_embeds(prefix: Prefix, token_ids: Sequence[int], embedding: Embedding) -> str:
    """The `prompt_embeds` of a request to `vllm serve --enable-prompt-embeds`; raises as `whole_prompt` does."""
    return _base64(whole_prompt(prefix, token_ids, embedding, runtime="vLLM"))


def sglang_input_embeds(prefix: Prefix, token_ids: Sequence[int], embedding: Embedding) -> list[list[float]]:
    """The `input_embeds` of a request to SGLang's /generate; raises as `whole_prompt` does."""
    rows: list[list[float]] = whole_prompt(prefix, token_ids, embedding, runtime="SGLang").float().tolist()
    return rows


def write_prompt_embeds(prefix: Prefix, output: str | Path) -> Carried:
    """Write the vectors of a soft prompt as vLLM reads them: `torch.save`, in base64."""
    from prefixkit.injections.arrays import tensor

    write_bytes(output, _base64(tensor(prompt_vectors(prefix, "vLLM"))).encode())
    lost = _ALONE.format(function=f"{_HERE}.vllm_prompt_embeds")
    body = '{"type": "prompt_embeds", "data": …}'
    return Carried(output=Path(output), next=f"{body} in a message, vllm serve --enable-prompt-embeds", lost=(lost,))


def export_sglang(prefix: Prefix, output: str | Path) -> Carried:
    """Write the vectors of a soft prompt as the JSON of a request to SGLang's /generate.

    Raises:
        FormatError: something besides a soft prompt before the text of a decoder.
        InputError: the file cannot be written.
    """
    from prefixkit.injections.arrays import tensor

    rows = tensor(prompt_vectors(prefix, "SGLang")).float().tolist()
    write_bytes(output, json.dumps({"input_embeds": rows}).encode())
    lost = _ALONE.format(function=f"{_HERE}.sglang_input_embeds")
    return Carried(
        output=Path(output), next="POST it to /generate of a server with --disable-radix-cache", lost=(lost,)
    )


def _base64(vectors: Tensor) -> str:
    import torch

    # A view would take the whole of what it is a view of along.
    file = io.BytesIO()
    torch.save(vectors.cpu().clone(), file)
    return base64.b64encode(file.getvalue()).decode()
