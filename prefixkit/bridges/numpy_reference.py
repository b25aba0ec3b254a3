"""A decoder with a prefix, in numpy: schemas/README.md as code, to be read aloud, and an oracle for every bridge.

One text, every token computed anew, all in float32. It judges no file: `prefixkit inspect` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prefixkit.errors import FormatError

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]


def read(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, as float32, and its metadata (section 1)."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        stored = np.frombuffer(data[begin:end], {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            stored = (stored.astype("<u4") << 16).view("<f4")
        tensors[name] = stored.astype(np.float32).reshape(entry["shape"])
    return tensors, metadata


def logits(folder: str | Path, tokens: list[int], prefix: str | Path | None = None) -> Array:
    """[tokens, vocab] of the checkpoint in `folder` behind a prefix file. Raises FormatError for what is not here."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {"rope_scaling": None, **config}
    scaled = rope.get("rope_type", "default") != "default" or rope.get("rope_scaling")
    windows = config.get("sliding_window") and config.get("use_sliding_window", True)
    if config["model_type"] not in ("llama", "mistral", "qwen2", "qwen3") or scaled or windows:
        expected, found = "a Llama, Mistral, Qwen2 or Qwen3 with plain RoPE and no window", config["model_type"]
        raise FormatError(folder, expected=expected, found=found)
    weights = {k: v for file in Path(folder).glob("model*.safetensors") for k, v in read(file)[0].items()}
    hidden, positions = weights["model.embed_tokens.weight"][tokens], np.arange(len(tokens))
    injected, metadata = read(prefix) if prefix else ({}, {})
    if prefix:
        record, *others = json.loads(metadata["prefixkit"])["injections"]
        here = record["kind"] in ("key_value_prefix", "embedding_prompt") and record["stack"] == "decoder"
        if others or not here or record.get("placement", "prepend") != "prepend":
            raise FormatError(prefix, expected="a prefix or a prompt before the text of a decoder", found="another")
        positions += record["positions"]["text_start"]  # section 3: later tokens count on from there
    if "prompt.embeddings" in injected:  # section 2: what the first layer consumes in the place of token vectors
        hidden = np.concatenate([injected["prompt.embeddings"], hidden])
        positions = np.append(np.arange(len(hidden) - len(tokens)), positions)
    return _decoder(config, rope.get("rope_theta", 10_000.0), weights, injected, hidden, positions)[-len(tokens) :]


def attention(query: Array, key: Array, value: Array) -> Array:
    """[tokens, heads * dim] of queries [heads, tokens, dim] and the keys and values [kv_heads, slots + tokens, dim]."""
    (heads, tokens, dim), (kv_heads, places, _) = query.shape, key.shape
    key, value = (np.repeat(array, heads // kv_heads, axis=0) for array in (key, value))
    scores = query @ key.swapaxes(1, 2) / np.sqrt(dim)
    scores[:, ~np.tri(tokens, places, places - tokens, dtype=bool)] = -np.inf  # all slots, and the text up to itself
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed: Array = weights / weights.sum(-1, keepdims=True) @ value
    return mixed.swapaxes(0, 1).reshape(tokens, -1)


def _decoder(config: Any, theta: float, weights: Tensors, injected: Tensors, hidden: Array, positions: Array) -> Array:
    def norm(x: Array, name: str) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", np.float32(0))

    def heads(x: Array, name: str) -> Array:
        split = linear(x, f"{name}_proj").reshape(len(x), -1, dim)
        return (norm(split, f"{name}_norm") if f"{name}_norm.weight" in weights else split).swapaxes(0, 1)

    def rotated(x: Array) -> Array:
        one, two = np.split(x, 2, axis=-1)
        angle = positions[:, None] * theta ** -(np.arange(dim // 2) / (dim // 2))
        cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        at, slots = f"model.layers.{layer}", f"decoder.self.layers.{layer}"
        query, key, value = (heads(norm(hidden, f"{at}.input_layernorm"), f"{at}.self_attn.{role}") for role in "qkv")
        query, key = rotated(query), rotated(key)
        if f"{slots}.key" in injected:  # as attention consumes them: MUST NOT be rotated again
            key = np.concatenate([injected[f"{slots}.key"], key], axis=1)
            value = np.concatenate([injected[f"{slots}.value"], value], axis=1)
        hidden = hidden + linear(attention(query, key, value), f"{at}.self_attn.o_proj")
        x = norm(hidden, f"{at}.post_attention_layernorm")
        gate = linear(x, f"{at}.mlp.gate_proj")
        hidden = hidden + linear(gate / (1 + np.exp(-gate)) * linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return linear(norm(hidden, "model.norm"), "lm_head" if "lm_head.weight" in weights else "model.embed_tokens")
