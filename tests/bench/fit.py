"""Whether a backbone of eight billion weights trains on a part of one device: peak memory, and how fast.

The weights are random and made on the device: they are never written, and not there twice. Ours and PEFT read the same
copy, one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import measure as geometry_of
from prefixkit.backbones.identity import identify
from tests.bench.contenders import Ours, PeftPlain, Shuffled
from tests.bench.fresh import of_process
from tests.bench.rounds import Row, row
from tests.bench.shapes import Setting, examples
from tests.bench.speed import Amount, Tell, rate

BAR = 40.0
"""GiB."""
MEMORY, RATE = "peak memory, GiB", "real tokens a second"


def measure(case: str, setting: Setting, amount: Amount, tell: Tell) -> list[Row]:
    """Ours against the bar, and against PEFT as people run it where that fits."""
    backbone, rows = made_on_device(setting), examples(setting)
    tell(f"{case}: {sum(weight.numel() for weight in backbone.model.parameters()) / 1e9:.2f} billion weights")
    ours, rates = _tried(Ours(setting, rows, backbone), setting, amount)
    found = [row(case, MEMORY, [ours], [BAR], "the bar")]
    model = backbone.release()
    del backbone
    plan = Shuffled(rows, batch_size=setting.batch_size, seed=setting.seed)
    try:
        peer, others = _tried(PeftPlain(setting, model, plan, None), setting, amount)
    except torch.OutOfMemoryError:
        tell(f"{case}: PEFT does not fit; ours took {rates}")
        return [*found, row(case, RATE, rates, rates, "itself: PEFT does not fit")]
    return [*found, row(case, MEMORY, [ours], [peer], "PEFT"), row(case, RATE, rates, others, "PEFT")]


def made_on_device(setting: Setting) -> Decoder:
    """A frozen decoder of the shape that the folder's config.json says, with random weights."""
    folder, device = Path(setting.backbone), torch.device(setting.device)
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(setting.seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=setting.torch_dtype, attn_implementation="sdpa")
    model = model.to(device).eval().requires_grad_(False)
    geometry = geometry_of(model, folder.name)
    return Decoder(model, folder, identify(folder, folder.name, None, config, geometry, weights=False), geometry)


def _tried(one: Any, setting: Setting, amount: Amount) -> tuple[float, list[float]]:
    """The peak of memory in GiB, the weights in it, and the rate of each turn behind the first steps."""
    on_gpu = setting.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rate(one, range(amount.equal))
    begins = [amount.equal + number * amount.steps for number in range(amount.rounds)]
    rates = [rate(one, range(begin, begin + amount.steps)) for begin in begins]
    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu else of_process("VmHWM") / 1024, rates
