"""Every runtime that a prefix travels to or from: what goes, what does not and why, and which function carries it.

A row with an exporter is a flag of `prefixkit export`, one with an importer a flag of `prefixkit import`, and every row
is a line of `prefixkit runtimes`. Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any

from prefixkit.errors import ConfigError
from prefixkit.spelling import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A runtime, and how prefixes get there.

    Attributes:
        name: of the flag, without its dashes; unique.
        title: of the runtime itself.
        goes: what it takes.
        stays: what it does not take, and why.
        how: for a runtime that needs no other file than the prefix: what to call instead of a command.
        exporter: `module:function(prefix, output, **settings) -> Carried`.
        importer: `module:function(source, *, backbone) -> Prefix`.
        writes, reads: what the exporter writes and the importer reads, for the help of the flags.
        settings: what `--set NAME=VALUE` may choose when exporting; the first value is the default.
        backbone: whether the exporter needs `--backbone`.
        asks: whether the task goes too: how inputs are written, where answers end.
        extra: of the package, for what the runtime's side of the bridge needs.
        tried: the release that the tests run, or why they run none.
    """

    name: str
    title: str
    goes: str
    stays: str
    tried: str
    how: str = ""
    exporter: str | None = None
    importer: str | None = None
    writes: str = ""
    reads: str = ""
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    backbone: bool = False
    asks: bool = False
    extra: str | None = None


RUNTIMES: tuple[Runtime, ...] = (
    Runtime(
        name="transformers",
        title="transformers",
        goes="keys and values, or a prompt, before the text of a decoder; a prefix for each row of a batch",
        stays="padded text under a sliding window, which counts slots: attach takes it",
        how="prefixkit.attach(model, prefix), or prefixkit.bridges.transformers_cache.dynamic_cache and static_cache; "
        "back from a cache: prefixkit.bridges.transformers_capture.import_cache",
        tried="5.23",
    ),
    Runtime(
        name="peft",
        title="PEFT",
        goes="keys and values of a decoder, or of that of an encoder-decoder; prompts of both "
        "(PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING; P_TUNING comes in and goes as PROMPT_TUNING)",
        stays="layers of different shapes: PEFT keeps one tensor for all of them; text that does not start behind the "
        "prefix; for encoder-decoders, keys and values of the encoder or between the two",
        exporter="prefixkit.bridges.peft:export_peft",
        importer="prefixkit.bridges.peft:import_peft",
        writes="a folder for PeftModel.from_pretrained",
        reads="a PEFT folder",
        tried="0.21",
    ),
    Runtime(
        name="numpy",
        title="numpy",
        goes="keys and values, or a prompt, before the text of a Llama, Mistral, Qwen2 or Qwen3",
        stays="sliding windows and scaled RoPE: it is the specification in less than 100 lines, to be read",
        how="prefixkit.bridges.numpy_reference.logits(folder, tokens, prefix)",
        tried="2.4",
    ),
    Runtime(
        name="onnxruntime",
        title="ONNX Runtime",
        goes="keys and values, prompts folded into them, deltas; several prefixes in one batch",
        stays="the dtype bfloat16 on the CPU: it becomes float32",
        how="prefixkit export --onnx, then prefixkit.Session or any past of the graph",
        tried="1.31",
    ),
    Runtime(
        name="onnx-adapter",
        title="ONNX Runtime, adapters",
        goes="keys and values before the text of a decoder, one prefix a call",
        stays="prompts, which the graph's own folder holds folded; the task; bfloat16, which becomes float32",
        exporter="prefixkit.bridges.onnx_adapter:export_onnx_adapter",
        writes="an .onnx_adapter file, for the graph that --genai writes",
        settings=MappingProxyType({"dtype": ("float32", "float16")}),
        tried="1.31",
    ),
    Runtime(
        name="genai",
        title="onnxruntime-genai",
        goes="keys and values before the text of a decoder, and prompts folded into them; one prefix a generator",
        stays="the fused attention of its own builder: genai begins with an empty past, so the prefix is an input",
        exporter="prefixkit.bridges.genai:export_genai",
        writes="a model folder with the prefix as an adapter",
        settings=MappingProxyType({"dtype": ("float32", "float16")}),
        backbone=True,
        asks=True,
        tried="0.18",
    ),
    Runtime(
        name="openvino",
        title="OpenVINO",
        goes="keys and values before the text of a decoder, and prompts folded into them; several prefixes in a batch",
        stays="LLMPipeline of OpenVINO GenAI, which gives states no beginning",
        exporter="prefixkit.bridges.openvino_folder:export_openvino",
        writes="a stateful model with the prefix",
        backbone=True,
        asks=True,
        extra="openvino",
        tried="2026.4",
    ),
    Runtime(
        name="onnxruntime-node",
        title="onnxruntime-node",
        goes="keys and values before the text of a decoder, as the first past of a portable graph",
        stays="bfloat16, which JavaScript has not: bound as float32; conversations: render the chat template yourself",
        how="pastFeeds(readPrefix(bytes), ort.Tensor) of examples/javascript/prefix.mjs",
        tried="1.30",
    ),
    Runtime(
        name="onnxruntime-web",
        title="onnxruntime-web",
        goes="keys and values before the text of a decoder, as the first past of a portable graph",
        stays="bfloat16, which JavaScript has not: bound as float32; conversations: render the chat template yourself",
        how="pastFeeds(readPrefix(bytes), ort.Tensor) of examples/javascript/prefix.mjs",
        tried="1.30, WebAssembly in Node",
    ),
    Runtime(
        name="transformers-js",
        title="transformers.js",
        goes="keys and values before the text of a decoder, as the cache that generate begins with",
        stays="bfloat16, which JavaScript has not: bound as float32; text that starts elsewhere than behind the prefix",
        how="model.generate(generateInputs(readPrefix(bytes), [ids], transformers)) of examples/javascript/prefix.mjs",
        tried="4.3",
    ),
    Runtime(
        name="cartridges",
        title="HazyResearch cartridges, tokasaurus",
        goes="keys and values before the text of a decoder",
        stays="layers of different shapes; tokasaurus drops slots behind the last full page of 16",
        exporter="prefixkit.bridges.cartridges:export_cartridge",
        importer="prefixkit.bridges.cartridges:import_cartridge",
        writes="the .pt file of a cartridge, under its older and newer names",
        reads="the .pt file of a cartridge, which is read without running what is in it",
        tried="the file's layout; neither package is in the tests",
    ),
    Runtime(
        name="google-prompt",
        title="google-research/prompt-tuning",
        goes="a soft prompt before the text",
        stays="everything else: the package knows input vectors only",
        exporter="prefixkit.bridges.google_prompt:export_google_prompt",
        importer="prefixkit.bridges.google_prompt:import_google_prompt",
        writes="a .npy file with the vectors of a soft prompt",
        reads="a .npy file with the vectors of a soft prompt",
        tried="the file's layout; the package is not in the tests",
    ),
    Runtime(
        name="vllm",
        title="vLLM",
        goes="keys and values before the text of a decoder, by a KV connector; soft prompts, as prompt_embeds",
        stays="lengths that do not fill blocks of 16, tensor parallelism, quantised caches",
        exporter="prefixkit.bridges.vllm:export_vllm",
        writes="a folder for the KV connector of a server, or the payload of a soft prompt",
        tried="not run in vLLM: written to the interface of 0.33 and tested against that interface",
    ),
    Runtime(
        name="sglang",
        title="SGLang",
        goes="soft prompts, as input_embeds of a request",
        stays="keys and values: its caches have no place for those of somebody else",
        exporter="prefixkit.bridges.prompt_embeds:export_sglang",
        writes="the JSON of a request with a soft prompt",
        tried="not run in SGLang: written to the format of 0.5",
    ),
    Runtime(
        name="tensorrt-llm",
        title="TensorRT-LLM",
        goes="soft prompts, as a PEFT folder",
        stays="keys and values: there is no file for them",
        how="prefixkit export --peft PREFIX -o FOLDER, which its PromptAdapterRequest reads; the engine is built with "
        "--max_prompt_embedding_table_size",
        tried="not run in TensorRT-LLM: 1.2 reads PEFT's folders",
    ),
    Runtime(
        name="mlx",
        title="mlx-lm",
        goes="keys and values before the text of a decoder, bfloat16 too; fold a prompt first",
        stays="sliding windows except Gemma 3's: mlx-lm leaves out those of Gemma 2, Mistral and Phi-3",
        exporter="prefixkit.bridges.mlx:export_mlx",
        importer="prefixkit.bridges.mlx:import_mlx",
        writes="a prompt cache for mlx_lm (--prompt-cache-file, load_prompt_cache)",
        reads="a prompt cache of mlx-lm",
        settings=MappingProxyType(
            {"layout": ("current", "older"), "dtype": ("stored", "float32", "float16", "bfloat16")}
        ),
        extra="mlx",
        tried="0.32.2; layout=older for releases before 0.32",
    ),
    Runtime(
        name="llama-cpp",
        title="llama.cpp",
        goes="keys and values before the text of a decoder of the families that were tried; fold a prompt first",
        stays="bfloat16, which is cast; quantised caches, whose rows are rotated; families that were not tried",
        exporter="prefixkit.bridges.llama_cpp:export_llama_cpp",
        importer="prefixkit.bridges.llama_cpp:import_llama_cpp",
        writes="a sequence state for llama_state_seq_load_file (prefixkit.bridges.llama_cpp.load_state)",
        reads="a sequence state of llama.cpp (with --backbone)",
        settings=MappingProxyType({"dtype": ("float16", "float32"), "flash": ("off", "on")}),
        extra="llama-cpp",
        tried="llama-cpp-python 0.3.36, in a job of its own: it has to be compiled",
    ),
)


def runtime(name: str) -> Runtime:
    """The row of `name`. Raises ConfigError for an unknown one, naming the likeliest."""
    for row in RUNTIMES:
        if row.name == name:
            return row
    known = [row.name for row in RUNTIMES]
    raise ConfigError("runtime", expected="the name of one", found=repr(name), next_step=did_you_mean(name, known))


def function(home: str) -> Any:
    """The function of an exporter or importer, `module:function`."""
    module, name = home.split(":")
    return getattr(import_module(module), name)


def chosen(row: Runtime, settings: Mapping[str, str]) -> dict[str, str]:
    """The value of every setting of `row`. Raises ConfigError for a name or value that it does not have."""
    for name, value in settings.items():
        where, step = f"export --{row.name}", "see `prefixkit runtimes`"
        if name not in row.settings:
            expected = f"no setting but {' and '.join(row.settings)}" if row.settings else "no settings"
            raise ConfigError(where, expected=expected, found=name, next_step=step)
        if value not in row.settings[name]:
            expected = f"{name}={' or '.join(row.settings[name])}"
            raise ConfigError(where, expected=expected, found=repr(value), next_step=step)
    return {name: settings.get(name, values[0]) for name, values in row.settings.items()}
