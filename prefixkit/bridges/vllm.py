"""Prefixes for vLLM: what its KV connector reads, and soft prompts as vectors.

The connector itself is `prefixkit.bridges.vllm_connector`, which a server loads by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.bridges.prompt_embeds import write_prompt_embeds
from prefixkit.errors import FormatError
from prefixkit.format.atomic import replacing_folder, write_bytes
from prefixkit.prefix import Prefix, save

BLOCK = 16
"""Slots in a block of vLLM's cache, unless it is told otherwise."""
CONFIG = "kv-transfer-config.json"
PREFIX = "prefix.safetensors"


def export_vllm(prefix: Prefix, output: str | Path) -> Carried:
    """Write what vLLM needs for `prefix`: a folder for the connector, or the payload of a soft prompt.

    vLLM is given the configuration as text, so that it names the folder's place: after a move it is to be made again.

    Raises:
        FormatError: something else than keys and values or a soft prompt before the text of a decoder; a length that
            does not fill blocks of 16.
        InputError: it cannot be written.
    """
    output = Path(output)
    if [record.kind for record in prefix.manifest.injections] == ["embedding_prompt"]:
        return write_prompt_embeds(prefix, output)
    length = keys_and_values(prefix, "vLLM")[0][0].shape[1]
    if length % BLOCK:
        below = length - length % BLOCK
        step = f"use one of {below} or {below + BLOCK} slots" if below else f"use one of {BLOCK} slots"
        expected = f"a length that is a multiple of vLLM's block of {BLOCK}"
        raise FormatError("prefix", expected=expected, found=str(length), next_step=step)
    folder = output.resolve()
    name = folder.name
    with replacing_folder(output, marker=CONFIG) as target:
        save(prefix, target / PREFIX)
        write_bytes(target / CONFIG, f"{json.dumps(_config(name, folder / PREFIX), indent=2)}\n".encode())
    server = f'vllm serve MODEL --kv-transfer-config "$(cat {quote(str(folder / CONFIG))})"'
    filler = prefix.manifest.task.filler_id if prefix.manifest.task is not None else 0
    request = f'cache_salt "{name}", {length} ids {filler or 0} before the prompt'
    return Carried(
        output=output, next=f"{server}; {request}; the folder stays where it is, as {CONFIG} names its place"
    )


def _config(name: str, path: Path) -> dict[str, object]:
    return {
        "kv_connector": "PrefixKitConnector",
        "kv_connector_module_path": "prefixkit.bridges.vllm_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"prefixes": {name: str(path)}},
    }
