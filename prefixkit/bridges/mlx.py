"""Prompt caches of mlx-lm, there and back, bit for bit; mlx itself is not needed.

mlx-lm keeps a decoder's keys after RoPE as [1, kv_heads, length, head_dim], which is what a prefix holds, and continues
at the position behind them. Layers with a sliding window have a cache that rotates in it.
"""

from __future__ import annotations

from pathlib import Path

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.catalogue import chosen, runtime
from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.bridges.described import described
from prefixkit.bridges.imported import imported
from prefixkit.bridges.in_words import RUNTIMES, of_whom
from prefixkit.bridges.mlx_cache import LayerCache, read_cache, write_cache
from prefixkit.bridges.narrowed import narrowed
from prefixkit.errors import FormatError, InputError
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.prefix import Prefix

_RUNTIME = "mlx-lm"
_TRIED = ("gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")
"""Families in which mlx-lm computes what transformers computes, with a prefix."""
_ROTATING = ("gemma3_text",)
"""Those of them whose sliding windows it has; in gemma2, mistral and phi3 every token sees all before it."""


def export_mlx(prefix: Prefix, output: str | Path, *, layout: str = "current", dtype: str = "stored") -> Carried:
    """Write `prefix` as a prompt cache, for `load_prompt_cache` and `mlx_lm.generate --prompt-cache-file`.

    Args:
        layout: `current`, or `older` for mlx-lm before 0.32.
        dtype: of the keys and values: as `stored`, or another. Where they are wider than the model, mlx computes in
            theirs from there on.

    Raises:
        FormatError: no prefix of a decoder with text right behind it; sliding windows of a family that was not tried.
        InputError: the file cannot be written, or has another ending than mlx reads.
        ConfigError: another layout or dtype.
    """
    chosen(runtime("mlx"), {"layout": layout, "dtype": dtype})
    _refuse_other_names(Path(output))
    pairs, backbone = keys_and_values(prefix, _RUNTIME), prefix.manifest.backbone
    windows = _windows(prefix)
    rounded: tuple[str, ...] = ()
    if dtype != "stored":
        pairs, rounded = narrowed(pairs, dtype, otherwise="use --set dtype=bfloat16")
    layers = [LayerCache(key, value, window) for (key, value), window in zip(pairs, windows, strict=True)]
    stated = {"model": backbone.name, "tokenizer_config": "{}"}
    write_cache(Path(output), layers, stated, older=layout == "older")
    step = f'generate(model, tokenizer, tokens, prompt_cache=load_prompt_cache("{output}"))'
    return Carried(output=Path(output), next=step, lost=(*rounded, *_left_out(backbone)))


def import_mlx(source: str | Path, *, backbone: str | Path | None = None) -> Prefix:
    """The keys and values of a prompt cache in either layout.

    Args:
        source: what `save_prompt_cache` or `export --mlx` wrote.
        backbone: folder or hub id of the model that it was made with. Without it the weights stay unknown, and the
            configuration is that of the model that the file names.

    Raises:
        FormatError: no prompt cache, or one that is quantised, recurrent or lost rows; NaN or Infinity.
        BackboneError: the backbone cannot be used, or none is given and the one that is named is not here.
        MismatchError: other layers or shapes than the backbone's.
    """
    layers, stated = read_cache(Path(source))
    known = described(Path(source), backbone=backbone, named=stated.get("model"))
    return imported(Path(source), [(layer.key, layer.value) for layer in layers], known, runtime="mlx")


def _refuse_other_names(output: Path) -> None:
    if output.suffix != ".safetensors":
        step = f"mlx tells formats by their names: use {output.name}.safetensors"
        raise InputError(output, expected="a name that ends in .safetensors", found=repr(output.suffix), next_step=step)


def _left_out(backbone: BackboneIdentity) -> tuple[str, ...]:
    family, layers = backbone.family, backbone.stacks["decoder"]
    windows = {layer.window for layer in layers if layer.window is not None}
    if family not in _TRIED:
        return (f"{_RUNTIME} was not tried with {family}: compare its logits before you rely on it",)
    if windows and family not in _ROTATING:
        return (f"{_RUNTIME} leaves out the sliding windows of {family}: right up to {min(windows)} tokens in all",)
    return ()


def _windows(prefix: Prefix) -> list[int | None]:
    backbone = prefix.manifest.backbone
    layers = backbone.stacks["decoder"]
    if any(layer.window is not None for layer in layers) and backbone.family not in _TRIED:
        expected = f"full attention in every layer, or sliding windows of {', '.join(_ROTATING)}"
        found = f"those of {backbone.family}, which were not tried"
        raise FormatError(of_whom(prefix), expected=expected, found=found, next_step=RUNTIMES)
    return [layer.window if backbone.family in _ROTATING else None for layer in layers]
