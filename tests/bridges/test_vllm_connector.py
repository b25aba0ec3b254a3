"""The KV connector, held to the interface of vLLM 0.33, which stands here as far as the connector meets it.

vLLM itself is not run: that its scheduler and workers call the connector like this is read, not tried.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_decoder
from prefixkit.bridges.vllm import export_vllm
from prefixkit.errors import ConfigError, FormatError, MismatchError
from prefixkit.format.manifest import Manifest, Positions, Provenance
from prefixkit.injections import KeyValuePrefix
from prefixkit.prefix import Prefix
from tests.prefixes import small_prefix

Folder = Callable[..., Path]
BLOCK, LENGTH, HEADS, DIM = 16, 32, 2, 16
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
MODULE = "prefixkit.bridges.vllm_connector"
TEXT = list(range(40, 52))


class KVConnectorMetadata(ABC):  # noqa: B024 - as in vLLM
    pass


class KVConnectorBase(ABC):
    """What `KVConnectorBase_V1` keeps, and what it wants from others."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._connector_metadata: Any = None

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    @abstractmethod
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...
    @abstractmethod
    def wait_for_save(self) -> None: ...
    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]: ...
    @abstractmethod
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...
    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> Any: ...


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The connector's module, as it is where vLLM is installed."""
    parts = BASE.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    base: Any = sys.modules[BASE]
    base.KVConnectorBase_V1, base.KVConnectorMetadata = KVConnectorBase, KVConnectorMetadata
    sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    # The next test imports it without vLLM.
    sys.modules.pop(MODULE)


def random_prefix(folder: Path, seed: int) -> Prefix:
    decoder, draw = load_decoder(folder), torch.Generator().manual_seed(seed)
    rows = [torch.randn(HEADS, LENGTH, DIM, generator=draw) * 1.5 for _ in range(4)]
    made = KeyValuePrefix(keys=(rows[0], rows[1]), values=(rows[2], rows[3]), positions=Positions(text_start=LENGTH))
    provenance = Provenance(method="prefix-tuning", prefixkit="0.1.0")
    manifest = Manifest(backbone=decoder.identity, injections=(made.record(),), provenance=provenance)
    return Prefix(manifest, made.arrays())


def config(files: dict[str, str], model: str, **changes: Any) -> Any:
    extra = {"prefixes": files}
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=changes.get("block", BLOCK)),
        parallel_config=SimpleNamespace(tensor_parallel_size=changes.get("parallel", 1)),
        model_config=SimpleNamespace(model=model),
        kv_transfer_config=SimpleNamespace(get_from_extra_config=extra.get),
    )


def asks(name: str | None, ids: list[int] | None = None) -> Any:
    return SimpleNamespace(cache_salt=name, prompt_token_ids=[0] * LENGTH + TEXT if ids is None else ids)


def given(blocks: list[int]) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (blocks,))


def layers(caches: list[Tensor]) -> Any:
    """What a forward pass knows: the attentions with their caches, and layers without one."""
    named = {f"model.layers.{index}.self_attn.attn": SimpleNamespace(kv_cache=one) for index, one in enumerate(caches)}
    return SimpleNamespace(no_compile_layers={"model.layers.0.mlp": SimpleNamespace(), **named})


def read(caches: list[Tensor], blocks: list[int]) -> DynamicCache:
    """What attention in vLLM would read for a request with these blocks."""
    cache = DynamicCache()
    for layer, one in enumerate(caches):
        both = torch.cat([one[block] for block in blocks], dim=1)[None]
        cache.update(*both.split(DIM, dim=-1), layer)
    return cache


@pytest.fixture
def two(backbone_folder: Folder, tmp_path: Path) -> dict[str, Path]:
    """Two prefixes for the tiny Llama, as `prefixkit export --vllm` writes them."""
    for seed, name in enumerate(("one", "other")):
        export_vllm(random_prefix(backbone_folder("llama"), seed), tmp_path / name)
    return {name: tmp_path / name for name in ("one", "other")}


def connectors(module: Any, two: dict[str, Path], model: str) -> tuple[Any, Any]:
    files = {name: str(folder / "prefix.safetensors") for name, folder in two.items()}
    scheduler, worker = (module.PrefixKitConnector(config(files, model), role, None) for role in range(2))
    return scheduler, worker


def test_a_step_fills_the_blocks_that_attention_reads(
    module: Any, two: dict[str, Path], backbone_folder: Folder
) -> None:
    folder = backbone_folder("llama")
    scheduler, worker = connectors(module, two, str(folder))
    tables = {"one": [7, 2, 5], "other": [1, 8, 3], None: [4, 6, 9]}
    for name, blocks in tables.items():
        found, waits = scheduler.get_num_new_matched_tokens(asks(name), 0)
        assert (found, waits) == (LENGTH if name else 0, False)
        scheduler.update_state_after_alloc(asks(name), given(blocks), found)
    # From the scheduler's process to the worker's.
    worker.bind_connector_metadata(pickle.loads(pickle.dumps(scheduler.build_connector_meta(None))))
    assert scheduler.build_connector_meta(None).loads == ()
    caches = [torch.full((10, HEADS, BLOCK, 2 * DIM), float(layer)) for layer in range(2)]
    worker.start_load_kv(layers(caches))
    for layer, one in enumerate(caches):
        untouched = [0, 3, 4, 5, 6, 9]
        assert (one[untouched] == layer).all()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([TEXT])
    mask = torch.ones(1, LENGTH + len(TEXT), dtype=torch.long)
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        found = {
            name: model(input_ids=ids, attention_mask=mask, past_key_values=read(caches, tables[name][:2])).logits
            for name in ("one", "other")
        }
        for seed, name in enumerate(found):
            own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            expected = attach(own, random_prefix(folder, seed))(input_ids=ids).logits
            assert (found[name] - expected).abs().max() <= 1e-4
            assert (found[name] - bare).abs().max() > 1
    assert (found["one"] - found["other"]).abs().max() > 1


def test_slots_that_are_there_already_are_not_loaded_again(
    module: Any, two: dict[str, Path], backbone_folder: Folder
) -> None:
    scheduler, worker = connectors(module, two, str(backbone_folder("llama")))
    assert scheduler.get_num_new_matched_tokens(asks("one"), BLOCK) == (BLOCK, False)
    assert scheduler.get_num_new_matched_tokens(asks("one"), LENGTH) == (0, False)
    scheduler.update_state_after_alloc(asks("one"), given([7, 2, 5]), BLOCK)
    meta = scheduler.build_connector_meta(None)
    assert meta.loads == (module.Load("one", BLOCK, (2,)),)
    worker.bind_connector_metadata(meta)
    caches = [torch.zeros(10, HEADS, BLOCK, 2 * DIM) for _ in range(2)]
    worker.start_load_kv(layers(caches))
    key = random_prefix(backbone_folder("llama"), 0).tensors["decoder.self.layers.1.key"]
    assert (caches[1][2, :, :, :DIM].numpy() == key[:, BLOCK:]).all()
    assert not caches[1][7].any()


@pytest.mark.parametrize("ids", [TEXT, [0] * LENGTH, [0] * (LENGTH - 1) + TEXT, [1] * LENGTH + TEXT, []])
def test_prompts_without_fillers_go_without_the_prefix_and_it_is_logged(
    ids: list[int], module: Any, two: dict[str, Path], backbone_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, _ = connectors(module, two, str(backbone_folder("llama")))
    assert scheduler.get_num_new_matched_tokens(asks("one", ids), 0) == (0, False)
    assert "prefix one left out: expected a prompt of 32 times id 0 and at least one more" in caplog.text


def test_what_is_refused_at_the_start(
    module: Any, two: dict[str, Path], backbone_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = str(backbone_folder("llama")), str(two["one"] / "prefix.safetensors")
    for changes, told in (
        ({"block": 64}, "a multiple of vLLM's block of 64; found 32 slots"),
        ({"parallel": 2}, "found 2"),
    ):
        with pytest.raises(ConfigError, match=told):
            module.PrefixKitConnector(config({"one": path}, model, **changes), 0, None)
    with pytest.raises(MismatchError, match=r"prefix one on .*: expected weights hash"):
        module.PrefixKitConnector(config({"one": path}, str(backbone_folder("llama", 1))), 0, None)
    module.PrefixKitConnector(config({"one": path}, "nobody/model"), 0, None)
    assert "nobody/model is not here as a folder, and was not compared" in caplog.text


def test_other_caches_are_refused(module: Any) -> None:
    rows, one = torch.zeros(LENGTH, HEADS, 2 * DIM), module.Load("one", 0, (1, 2))
    for cache in (
        torch.zeros(2, 10, BLOCK, HEADS, DIM),
        torch.zeros(10, HEADS, BLOCK, DIM),
        torch.zeros(10, HEADS, BLOCK, 2 * DIM, dtype=torch.uint8),
    ):
        with pytest.raises(MismatchError, match=r"expected a cache \[blocks, 2, 16, 32\], as vLLM 0\.33 has"):
            module.fill(cache, rows, one, BLOCK)
    with pytest.raises(MismatchError, match="one number, its layer"):
        module.layer_index("model.layers.attn")
    assert module.layer_index("transformer.h.11.attn") == 11


def test_the_module_is_there_without_vllm() -> None:
    without = importlib.import_module(MODULE)
    assert without.PrefixKitConnector.__mro__[1] is object


def test_the_folder_for_a_server(tmp_path: Path) -> None:
    prefix = small_prefix(length=BLOCK, seed=1)
    carried = export_vllm(prefix, tmp_path / "persona")
    assert sorted(path.name for path in carried.output.iterdir()) == ["kv-transfer-config.json", "prefix.safetensors"]
    stored = json.loads((tmp_path / "persona" / "kv-transfer-config.json").read_text())
    assert stored["kv_connector_module_path"] == MODULE
    assert hasattr(importlib.import_module(MODULE), stored["kv_connector"])
    (path,) = stored["kv_connector_extra_config"]["prefixes"].values()
    assert Path(path).read_bytes() == (tmp_path / "persona" / "prefix.safetensors").read_bytes()
    assert 'cache_salt "persona", 16 ids 0 before the prompt' in carried.next
    assert f'--kv-transfer-config "$(cat {tmp_path / "persona" / "kv-transfer-config.json"})"' in carried.next
    assert carried.next.endswith("; the folder stays where it is, as kv-transfer-config.json names its place")
    assert carried.lost == ()
    spaced = export_vllm(prefix, str(tmp_path / "my persona"))
    assert f"$(cat '{tmp_path / 'my persona' / 'kv-transfer-config.json'}')" in spaced.next


def test_what_does_not_go_there(tmp_path: Path) -> None:
    prefix = small_prefix(length=19)
    with pytest.raises(FormatError, match="multiple of vLLM's block of 16; found 19; use one of 16 or 32 slots"):
        export_vllm(prefix, tmp_path / "out")
    (record,) = prefix.manifest.injections
    moved = replace(record, positions=Positions(text_start=0, prefix_takes_positions=False))
    with pytest.raises(FormatError, match="right behind the prefix, as vLLM counts"):
        export_vllm(Prefix(replace(prefix.manifest, injections=(moved,)), prefix.tensors), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
