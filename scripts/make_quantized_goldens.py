#!/usr/bin/env python3
"""Quantised checkpoints of the tiny Llama of make_goldens.py in the formats of the hub, with float32 references. No downloads.

    python make_quantized_goldens.py            # write engine/tests/fixtures/quantized/
    python make_quantized_goldens.py --check    # rebuild in a temporary folder and compare with the committed files

Each format has a function that quantises a matrix into the tensors that are stored, and one that reads those tensors back by the format's public
definition, number by number. The reference is transformers in float32 on what the second gives, so both must agree with what the engine reads.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import make_goldens as base
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

OUT = base.FIXTURES / "quantized"
KEPT = 8  # logits of this many last positions of each prompt are stored
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is of this column


def affine(w, group, bits, symmetric):
    """(q >= 0, scale, zero) with scales and zeros [N, K / group]"""
    n, k = w.shape
    top = 2**bits - 1
    blocks = w.reshape(n, k // group, group)
    if symmetric:
        scale = np.abs(blocks).max(-1) / (top // 2)
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scale = (high - low) / top
        zero = np.rint(-low / scale)
    scale = scale.astype(np.float16).astype(np.float32)
    q = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top).reshape(n, k)
    return q.astype(np.int64), scale, zero.astype(np.int64)


def pack(values, bits, axis, order=None):
    """Words of 32 bits along an axis, the first number lowest, or in the order of nibbles."""
    values, per = np.moveaxis(values, axis, -1), 32 // bits
    values = values.reshape(*values.shape[:-1], -1, per)
    words = sum(values[..., column] << (bits * i) for i, column in enumerate(order or range(per)))
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def unpack(words, bits, axis, order=None):
    words, per = np.moveaxis(np.asarray(words), axis, -1).astype(np.int64) & 0xFFFFFFFF, 32 // bits
    out = np.empty((*words.shape, per), np.int64)
    for i, column in enumerate(order or range(per)):
        out[..., column] = words >> (bits * i) & (2**bits - 1)
    return np.moveaxis(out.reshape(*words.shape[:-1], -1), -1, axis)


def tensor(a, dtype=None):
    t = torch.from_numpy(np.ascontiguousarray(a))
    return t if dtype is None else t.to(dtype)


class Fp8:
    """F8E4M3 with scales [N / rows, K / columns]; None for all of an axis."""

    def __init__(self, rows, columns, suffix, config):
        self.rows, self.columns, self.suffix, self.config = rows, columns, suffix, config

    def quantise(self, w):
        n, k = w.shape
        rows, columns = self.rows or n, self.columns or k
        blocks = torch.from_numpy(w).reshape(n // rows, rows, k // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(n, k)
        return {"weight": q, self.suffix: scale.reshape(1) if scale.numel() == 1 else scale.contiguous()}

    def read(self, t):
        w, scale = t["weight"].float(), t[self.suffix].float()
        if scale.dim() == 2:
            for axis in (0, 1):
                scale = scale.repeat_interleave(w.shape[axis] // scale.shape[axis], axis)
        return w * scale


class Awq:
    group = 32
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}

    def quantise(self, w):
        q, scale, zero = affine(w, self.group, 4, False)
        return {
            "qweight": tensor(pack(q.T, 4, 1, AWQ_ORDER)),
            "qzeros": tensor(pack(zero.T, 4, 1, AWQ_ORDER)),
            "scales": tensor(scale.T, torch.float16),
        }

    def read(self, t):
        q, zero = unpack(t["qweight"], 4, 1, AWQ_ORDER), unpack(t["qzeros"], 4, 1, AWQ_ORDER)
        g = np.arange(q.shape[0]) // self.group
        return tensor(((q - zero[g]) * t["scales"].float().numpy()[g]).T.astype(np.float32))


class Gptq:
    def __init__(self, bits, group, symmetric, v2):
        self.bits, self.group, self.symmetric, self.v2 = bits, group, symmetric, v2
        self.config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group or -1,
            "desc_act": not symmetric,
            "sym": symmetric,
            "checkpoint_format": "gptq_v2" if v2 else "gptq",
        }

    def quantise(self, w):
        group = self.group or w.shape[1]
        q, scale, zero = affine(w, group, self.bits, self.symmetric)
        return {
            "qweight": tensor(pack(q.T, self.bits, 0)),
            "qzeros": tensor(pack(zero.T - (0 if self.v2 else 1) & 2**self.bits - 1, self.bits, 1)),
            "scales": tensor(scale.T, torch.float16),
            "g_idx": tensor((np.arange(w.shape[1]) // group).astype(np.int32)),
        }

    def read(self, t):
        q = unpack(t["qweight"], self.bits, 0)
        zero = unpack(t["qzeros"], self.bits, 1) + (0 if self.v2 else 1)
        g = t["g_idx"].numpy()
        return tensor(((q - zero[g]) * t["scales"].float().numpy()[g]).T.astype(np.float32))


def compressed(fmt, weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


class Packed:
    """pack-quantized: numbers moved up by half the range; zero points packed along N."""

    def __init__(self, bits, group, symmetric):
        self.bits, self.symmetric, self.group = bits, symmetric, group
        weights = {"num_bits": bits, "type": "int", "strategy": "group" if group else "channel", "group_size": group}
        self.config = compressed("pack-quantized", weights | {"symmetric": symmetric, "dynamic": False, "actorder": None})

    def quantise(self, w):
        q, scale, zero = affine(w, self.group or w.shape[1], self.bits, self.symmetric)
        zeros = {} if self.symmetric else {"weight_zero_point": tensor(pack(zero, self.bits, 0))}
        return zeros | {
            "weight_packed": tensor(pack(q, self.bits, 1)),
            "weight_scale": tensor(scale, torch.bfloat16),
            "weight_shape": torch.tensor(w.shape),
        }

    def read(self, t):
        middle = 2 ** (self.bits - 1)
        q, scale = unpack(t["weight_packed"], self.bits, 1) - middle, t["weight_scale"].float().numpy()
        zero = np.zeros(scale.shape, np.int64)
        if "weight_zero_point" in t:
            zero = unpack(t["weight_zero_point"], self.bits, 0) - middle
        g = np.arange(q.shape[1]) * scale.shape[1] // q.shape[1]
        return tensor(((q - zero[:, g]) * scale[:, g]).astype(np.float32))


class Int8:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    config = compressed("int-quantized", weights)

    def quantise(self, w):
        scale = (np.abs(w).max(1, keepdims=True) / 127).astype(np.float32)
        return {"weight": tensor(np.rint(w / scale).astype(np.int8)), "weight_scale": tensor(scale)}

    def read(self, t):
        return t["weight"].float() * t["weight_scale"]


FORMATS = {
    "fp8_tensor": Fp8(None, None, "weight_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8_block": Fp8(32, 32, "weight_scale_inv", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}),
    "awq": Awq(),
    "gptq": Gptq(4, 32, True, False),
    "gptq_int8": Gptq(8, None, False, True),
    "packed_int4": Packed(4, 32, False),
    "packed_int8": Packed(8, None, True),
    "int8": Int8(),
    "fp8_channel": Fp8(
        1, None, "weight_scale", compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False})
    ),
}
# Seeds whose greedy tokens are far enough from the next best.
SEEDS = {"gptq": 13}


def write(name, out, seed):
    """The margins of the greedy tokens."""
    folder, fmt = out / name, FORMATS[name]
    folder.mkdir(parents=True)
    config = base.BASE | base.TINY["llama"]["config"]
    weights = base.random_weights(transformers.LlamaConfig(**config), seed)
    stored, plain = {}, {}
    for tensor_name, w in weights.items():
        module, _, last = tensor_name.rpartition(".")
        if w.dim() == 2 and module.endswith("_proj"):
            parts = fmt.quantise(w.numpy())
            stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
            plain[tensor_name] = fmt.read(parts)
        else:
            stored[tensor_name] = w.to(torch.bfloat16)
            plain[tensor_name] = stored[tensor_name].float()
    with tempfile.TemporaryDirectory() as tmp:
        base.write_json(Path(tmp) / "config.json", config)
        save_file(plain, Path(tmp) / "model.safetensors", metadata={"format": "pt"})
        golden, margins, _ = base.reference(base.load_model(tmp))
    base.write_json(folder / "config.json", config | {"quantization_config": fmt.config})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    cut = {n: t[-KEPT:].contiguous() if n.startswith("logits") else t for n, t in golden.items()}
    save_file(cut, folder / "golden.safetensors")
    return margins


def build(out):
    for name in FORMATS:
        margins = write(name, out, SEEDS.get(name, 3))
        print(f"{name}: margins {margins}", flush=True)
        assert min(margins) > base.MIN_MARGIN, f"{name}: choose another seed"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    a = p.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if not a.check:
        for name in FORMATS:
            for file in (OUT / name).glob("*"):
                file.unlink()
            if (OUT / name).exists():
                (OUT / name).rmdir()
        return build(OUT)
    with tempfile.TemporaryDirectory() as tmp:
        build(Path(tmp))
        problems = base.compare(OUT, Path(tmp))
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
