"""A KV connector that puts prefixes into the paged cache of vLLM.

    --kv-transfer-config '{"kv_connector": "PrefixKitConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "prefixkit.bridges.vllm_connector",
        "kv_connector_extra_config": {"prefixes": {"NAME": "/path/prefix.safetensors"}}}'

A request chooses a prefix with `cache_salt`: NAME, so that vLLM's own prefix cache keeps prefixes apart too. Its prompt
begins with one filler id for each slot (the task's `filler_id`, or 0); they are never read.

Written to the interface of vLLM 0.33 and tested against that interface. It was not run in vLLM. There the cache of a
layer is [blocks, kv_heads, block, key | value]; older releases had other layouts, which are refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.errors import ConfigError, MismatchError
from prefixkit.format import match
from prefixkit.injections.arrays import tensor
from prefixkit.prefix import Prefix, load

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
except ImportError:  # what is here can be read and tested without vLLM
    KVConnectorBase_V1 = KVConnectorMetadata = object

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A prefix in the order of vLLM's cache: `rows` of each layer, [prefix, kv_heads, key_dim + value_dim]."""

    length: int
    filler: int
    rows: tuple[Tensor, ...]


@dataclass(frozen=True)
class Load:
    """Slots of the prefix `name`, from `start` on, that are to fill `blocks` of the cache."""

    name: str
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker in one step."""

    loads: tuple[Load, ...]


class PrefixKitConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads prefixes; stores nothing. vLLM makes one in its scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block: int = vllm_config.cache_config.block_size
        files = vllm_config.kv_transfer_config.get_from_extra_config("prefixes", {})
        _refuse_parallel(vllm_config.parallel_config.tensor_parallel_size)
        self._served = {
            name: served(name, path, self._block, vllm_config.model_config.model) for name, path in files.items()
        }
        self._loads: list[Load] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many slots to load behind those that vLLM still has; always at once."""
        found = wanted(self._served, request)
        return (max(0, found.length - num_computed_tokens) if found else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember which blocks vLLM gave to the slots."""
        if num_external_tokens:
            length = self._served[request.cache_salt].length
            start = length - num_external_tokens
            given = blocks.get_block_ids()[0][start // self._block : length // self._block]
            self._loads.append(Load(request.cache_salt, start, tuple(given)))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What to load in this step."""
        loads, self._loads = tuple(self._loads), []
        return Loads(loads)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the slots into the cache of every layer, before the model runs."""
        loads = self._get_connector_metadata().loads
        for name, layer in forward_context.no_compile_layers.items():
            cache = getattr(layer, "kv_cache", None)
            if cache is not None:
                for one in loads:
                    fill(cache, self._served[one.name].rows[layer_index(name)], one, self._block)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: `start_load_kv` has finished."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is stored."""

    def wait_for_save(self) -> None:
        """Nothing is stored."""


def served(name: str, path: str, block: int, model: str) -> Served:
    """The prefix in the file at `path`, for a cache with blocks of `block` slots.

    Raises:
        ConfigError: its length does not fill blocks.
        FormatError, MismatchError: no prefix of a decoder, or one for another model.
    """
    prefix = load(path)
    pairs = keys_and_values(prefix, "vLLM")
    length = pairs[0][0].shape[1]
    if length % block:
        raise ConfigError(f"prefix {name}", expected=f"a multiple of vLLM's block of {block}", found=f"{length} slots")
    _refuse_another_model(name, prefix, model)
    rows = tuple(torch.cat([tensor(key), tensor(value)], dim=-1).transpose(0, 1) for key, value in pairs)
    task = prefix.manifest.task
    return Served(length, (task.filler_id if task else None) or 0, rows)


def wanted(prefixes: Mapping[str, Served], request: Any) -> Served | None:
    """The prefix that `request` asks for, if its prompt has the fillers that the prefix is to stand for."""
    found = prefixes.get(request.cache_salt)
    if found is None:
        return None
    ids = list(request.prompt_token_ids or ())
    if ids[: found.length] != [found.filler] * found.length or len(ids) == found.length:
        told = "prefix %s left out: expected a prompt of %d times id %d and at least one more"
        _log.error(told, request.cache_salt, found.length, found.filler)
        return None
    return found


def layer_index(name: str) -> int:
    """The layer that vLLM's name of an attention means: 3 for `model.layers.3.self_attn.attn`."""
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
    if len(numbers) != 1:
        raise MismatchError(name, expected="the name of an attention with one number, its layer", found=str(numbers))
    return int(numbers[0])


def fill(cache: Tensor, rows: Tensor, one: Load, block: int) -> None:
    """Write rows [prefix, kv_heads, key_dim + value_dim] into `cache` [blocks, kv_heads, block, key_dim + value_dim].

    Raises:
        MismatchError: a cache of another layout, or of numbers that are none (quantised).
    """
    if tuple(cache.shape[1:]) != (rows.shape[1], block, rows.shape[2]) or not cache.is_floating_point():
        expected = f"a cache [blocks, {rows.shape[1]}, {block}, {rows.shape[2]}], as vLLM 0.33 has, in floating point"
        raise MismatchError("vLLM", expected=expected, found=f"{list(cache.shape)} of {cache.dtype}")
    slots = torch.arange(len(one.blocks) * block, device=cache.device)
    chosen = torch.tensor(one.blocks, device=cache.device)[slots // block]
    cache[chosen, :, slots % block] = rows[one.start : one.start + len(slots)].to(cache.device, cache.dtype)


def _refuse_parallel(size: int) -> None:
    if size != 1:
        expected = "tensor_parallel_size 1, as each prefix is whole in one worker"
        raise ConfigError("vLLM", expected=expected, found=str(size))


def _refuse_another_model(name: str, prefix: Prefix, model: str) -> None:
    from prefixkit.backbones.identity import local_folder

    folder = local_folder(model)
    if folder is None:
        _log.warning("prefix %s: %s is not here as a folder, and was not compared with its backbone", name, model)
        return
    match.check(
        f"prefix {name} on {Path(model).name}", match.facts(prefix.manifest.backbone), match.folder_facts(folder)
    )
