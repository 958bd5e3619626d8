#!/usr/bin/env python3
"""Golden fixtures of low-rank adapters: tiny seeded ones in PEFT's files, and float32 references. No downloads, no peft package.

    python make_lora_goldens.py             # write engine/tests/fixtures/lora/
    python make_lora_goldens.py --check     # rebuild in a temporary folder and compare with the committed files

The reference is transformers with W + scale * B A in place of W, computed in float32. Each folder holds adapter_config.json,
adapter_model.safetensors and golden.safetensors: input_ids.<i> i32 [T], logits.<i> f32 [8, V] of the prompt's last tokens, and
greedy_ids.<i> i32 [16]. Those whose name begins with demo_ are of the built-in model, for tests through the wire, and have no reference.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import make_goldens as goldens
import numpy as np
import torch
from safetensors.torch import save_file

OUT = goldens.FIXTURES / "lora"
LAST, NEW_TOKENS = 8, 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

# name: model, seed, r, alpha, rsLoRA, targets, dtype, what A and B are scaled with
ADAPTERS = {
    "llama_all": dict(model="llama", seed=1, r=8, alpha=16, rslora=False, targets=ALL, dtype=torch.bfloat16, std=0.3),
    "llama_qv": dict(model="llama", seed=3, r=3, alpha=4.5, rslora=True, targets=("q_proj", "v_proj"), dtype=torch.float32, std=0.6),
    "llama_mlp": dict(model="llama", seed=8, r=4, alpha=4, rslora=False, targets=("up_proj", "down_proj"), dtype=torch.float16, std=0.5),
    "demo_a": dict(model="demo", seed=4, r=2, alpha=4, rslora=False, targets=("o_proj",), dtype=torch.bfloat16, std=0.5),
    "demo_b": dict(model="demo", seed=5, r=4, alpha=4, rslora=False, targets=("q_proj", "v_proj"), dtype=torch.bfloat16, std=0.5),
}


def folder_of(model):
    return goldens.DEMO if model == "demo" else goldens.FIXTURES / model


def make(name, out):
    spec = ADAPTERS[name]
    model = goldens.load_model(folder_of(spec["model"]))
    rng = np.random.Generator(np.random.PCG64(spec["seed"]))
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    goldens.write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": spec["model"],
            "r": spec["r"],
            "lora_alpha": spec["alpha"],
            "use_rslora": spec["rslora"],
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": sorted(spec["targets"]),
        },
    )
    scale = spec["alpha"] / (spec["r"] ** 0.5 if spec["rslora"] else spec["r"])
    tensors = {}
    for path, module in sorted(model.named_modules()):
        if path.rsplit(".", 1)[-1] not in spec["targets"]:
            continue
        n, k = module.weight.shape
        a = goldens.gaussian(rng, (spec["r"], k), spec["std"]).to(spec["dtype"])
        b = goldens.gaussian(rng, (n, spec["r"]), spec["std"] / 4).to(spec["dtype"])
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
        with torch.no_grad():
            module.weight += (scale * (b.double() @ a.double())).float()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if spec["model"] == "demo":
        return None
    golden, margins = {}, []
    for i, ids in enumerate(goldens.prompts(model.config.vocab_size)):
        new, margin = goldens.greedy(model, ids, NEW_TOKENS)
        golden[f"input_ids.{i}"], golden[f"greedy_ids.{i}"] = ids.int(), new.int()
        golden[f"logits.{i}"] = goldens.logits_of(model, ids)[-LAST:].contiguous().clone()
        margins.append(margin)
    save_file(golden, folder / "golden.safetensors")
    return min(margins)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if not args.check:
        for name in ADAPTERS:
            margin = make(name, OUT)
            print(json.dumps({"adapter": name, "margin": margin}))
            if margin is not None and margin < goldens.MIN_MARGIN:
                sys.exit(f"{name}: greedy steps are too close; take another seed")
        return
    with tempfile.TemporaryDirectory() as fresh:
        for name in ADAPTERS:
            make(name, Path(fresh))
        problems = goldens.compare(OUT, Path(fresh))
    sys.exit("\n".join(problems) if problems else None)


if __name__ == "__main__":
    main()
