"""S6: transformers and PEFT on NF4 bytes of the same sort, in the same minutes on the same device.

The model has the shapes of S5's. Its projections are bitsandbytes' `Linear4bit` over our codes, or
dense bfloat16 matrices of the same values if bitsandbytes is not there. A step's time is the
difference between two calls of `generate`, so the prompt is left out, as in S5.
"""

from __future__ import annotations

import gc
import time
from importlib.util import find_spec
from typing import Any

import torch
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.ops import nf4
from torch import nn

from gpu import inputs
from gpu.stage import StageReport
from gpu.timing import synchronise

DTYPE = torch.bfloat16
ROWS, ADAPTERS, RANK = 16, 16, 16
PROMPT, SHORT, LONG = 896, 2, 18
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(report: StageReport) -> None:
    """Measures 16 base rows, then 16 rows with 16 adapters."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        report.note(f"{' and '.join(missing)} not installed: nothing to compare with")
        return
    rows, adapters = (2, 2) if report.dry else (ROWS, ADAPTERS)
    model = inputs.TINY if report.dry else inputs.LLAMA_8B
    fused = find_spec("bitsandbytes") is not None
    report.note(f"PEFT's base: {'bitsandbytes Linear4bit' if fused else 'dense bfloat16'}")
    report.figure("peer_base", "nf4" if fused else "dense")
    peer = load(model, report.device, fused)
    rates: dict[str, float] = {}
    with torch.inference_mode():
        steps = {f"base_{rows}": step_seconds(peer, rows, report, None)}
    names = [f"a{i}" for i in range(adapters)]
    peer = with_adapters(peer, names)
    with torch.inference_mode():
        if report.left > 4 or report.dry:
            steps[f"adapters_{adapters}"] = step_seconds(peer, rows, report, names)
        else:
            report.note("no time was left for the adapters")
    for case, seconds in steps.items():
        # A dry run's three tokens only show that both calls work; their times mean nothing.
        report.check(report.dry or seconds > 0, f"{case}: a step took {seconds:.4f} s")
        rates[case] = rows / seconds
    report.figure("tok_s", rates)
    lines: list[list[object]] = [[case, rate] for case, rate in rates.items()]
    report.table(["PEFT", "tok/s"], lines)


def load(config: DecoderConfig, device: str, fused: bool) -> Any:
    """transformers' model of these shapes on the device, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(before)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if name in MODULES:
                    out, fan_in = module.weight.shape
                    matrix = inputs.random_matrix((out,), fan_in, device)
                    setattr(block, name, four_bit(matrix, device) if fused else dense(matrix))
    model.generation_config.eos_token_id = None  # rows end at max_new_tokens only
    gc.collect()
    return model.eval()


def four_bit(matrix: NF4Matrix, device: str) -> nn.Module:
    """bitsandbytes' module over the codes of a matrix of one module."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    out, fan_in = matrix.shape
    state = QuantState(
        absmax=nf4.maxima(matrix),
        shape=torch.Size(matrix.shape),
        code=nf4.nf4_code(device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=DTYPE,
    )
    with torch.device("meta"):
        module = bnb.nn.Linear4bit(fan_in, out, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    module.weight = bnb.nn.Params4bit(
        data=matrix.packed.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        quant_type="nf4",
        bnb_quantized=True,
        module=module,
    )
    return module


def dense(matrix: NF4Matrix) -> nn.Module:
    """A dense module with the values of a matrix."""
    out, fan_in = matrix.shape
    with torch.device("meta"):
        module = nn.Linear(fan_in, out, bias=False)
    module.weight = nn.Parameter(nf4.dequantize(matrix).to(DTYPE), requires_grad=False)
    return module


def with_adapters(model: Any, names: list[str]) -> Any:
    """The model with random LoRA adapters of all projections."""
    from peft import LoraConfig, get_peft_model

    def settings() -> Any:
        return LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=list(MODULES),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )

    wrapped = get_peft_model(model, settings(), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, settings())
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name and parameter.dtype != DTYPE:
            parameter.data = parameter.data.to(DTYPE)
    return wrapped.eval()


def step_seconds(model: Any, rows: int, report: StageReport, names: list[str] | None) -> float:
    """Seconds of a decode step: of two calls that differ in the number of new tokens."""
    prompt, short, long = (5, 1, 3) if report.dry else (PROMPT, SHORT, LONG)
    vocab = model.config.vocab_size
    extra = {"adapter_names": names} if names else {}

    def generate(count: int) -> float:
        ids = torch.randint(3, vocab, (rows, prompt), device=report.device)
        synchronise(report.device)
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        synchronise(report.device)
        assert out.shape == (rows, prompt + count)
        return time.perf_counter() - start

    generate(2)  # warm-up
    return (generate(long) - generate(short)) / (long - short)
