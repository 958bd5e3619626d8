#!/usr/bin/env python3
"""Tiny GGUF files with float32 references. No downloads; the files are written here, byte by byte, after ggml's docs/gguf.md.

    python make_gguf_goldens.py            # write engine/tests/fixtures/gguf/
    python make_gguf_goldens.py --check    # rebuild in a temporary folder and compare with the committed files
    python make_gguf_goldens.py --verify   # compare with what the package `gguf` decodes and transformers' tokenizer encodes, where both are installed

Blocks are random codes with scales of a sensible size; `DECODE` reads them by the definitions of ggml-common.h and ggml-quants.c. The reference is
transformers in float32 on what that gives.
"""

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

import make_goldens as base
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

OUT = base.FIXTURES / "gguf"
KEPT = 8
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}
BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
# What a weight is on average in units of the scale, so that weights have the size that is asked for.
UNITS = {"Q4_0": 4.6, "Q8_0": 74.0, "Q4_K": 200.0, "Q5_K": 400.0, "Q6_K": 1350.0}


def f16(block, at):
    return block[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def halves(bytes_):
    return bytes_ & 15, bytes_ >> 4


def six_bits(block):
    """Eight scales and eight minima from twelve bytes."""
    b = block[:, 4:16].astype(np.int64)
    low, mid, high = b[:, :4], b[:, 4:8], b[:, 8:]
    scale = np.concatenate([low & 63, high & 15 | low >> 6 << 4], 1)
    minimum = np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], 1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def q4_0(b):
    low, high = halves(b[:, 2:])
    return f16(b, 0) * (np.concatenate([low, high], 1).astype(np.float32) - 8)


def q8_0(b):
    return f16(b, 0) * b[:, 2:].view(np.int8)


def q45_k(b, fifth):
    scale, minimum = six_bits(b)
    data = b[:, 48 if fifth else 16 :].reshape(-1, 4, 32)
    q = np.stack(halves(data), 2).reshape(-1, 8, 32).astype(np.int64)
    if fifth:
        bits = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1
        q = q + (bits.astype(np.int64) << 4)
    return (f16(b, 0)[..., None] * scale[..., None] * q - f16(b, 2)[..., None] * minimum[..., None]).reshape(-1, 256)


def q6_k(b):
    low = b[:, :128].reshape(-1, 2, 2, 32)
    low = np.stack(halves(low), 2).reshape(-1, 2, 4, 32).astype(np.int64)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high.astype(np.int64) << 4) - 32
    scale = b[:, 192:208].view(np.int8).astype(np.float32)
    return (f16(b, 208)[..., None] * scale[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


DECODE = {"Q4_0": q4_0, "Q8_0": q8_0, "Q4_K": lambda b: q45_k(b, False), "Q5_K": lambda b: q45_k(b, True), "Q6_K": q6_k}


def random_tensor(rng, kind, shape, std):
    """(bytes, values)"""
    if kind not in BLOCKS:
        w = base.gaussian(rng, shape, std).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
        return w.view(torch.uint8).numpy().tobytes(), w.float().numpy()
    block, size = BLOCKS[kind]
    b = rng.integers(0, 256, size=(shape[0] * shape[1] // block, size), dtype=np.uint8)
    d = np.float16(std / UNITS[kind]) * (1 + rng.integers(0, 3, size=len(b)) / 4)
    places = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
    for i, at in enumerate(places):
        # Minima that make the mean about 0.
        value = d * (1 if i == 0 else 7.5 if kind == "Q4_K" else 15.5)
        b[:, at : at + 2] = value.astype(np.float16)[:, None].view(np.uint8)
    return b.tobytes(), DECODE[kind](b).reshape(shape).astype(np.float32)


def text(s):
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    """Type and bytes."""
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, text(v)
    kind = {bool: 7, int: 5, float: 6, str: 8}[type(v[0])]
    raw = b"".join(text(x) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", x) for x in v)
    return 9, struct.pack("<IQ", kind, len(v)) + raw


def write_gguf(path, metadata, tensors):
    """tensors: name to (kind, shape, bytes)"""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, v in metadata.items():
        kind, raw = value(v)
        head += text(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += bytes(-len(data) % 32)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", KINDS[kind], len(data))
        data += raw
    path.write_bytes(head + bytes(-len(head) % 32) + data)


SPACE = "\u2581"


def spm_vocab(size):
    """Pieces, scores, kinds of a small SentencePiece BPE with byte fallback."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    merged = ["th", "he", SPACE + "t", "in", "er", SPACE + "th", SPACE + "the", "an", "re", SPACE + "a", "on", SPACE + "w", "or", "at", "en"]
    letters = [SPACE, *"etaoinshrdlucmfwypvbgkjqxz.,T"]
    pieces += [(m, -float(i), 1) for i, m in enumerate(merged)] + [(c, -100.0 - i, 1) for i, c in enumerate(letters)]
    pieces += [(f"<extra_{i}>", -1000.0, 4) for i in range(size - len(pieces))]
    return pieces[:size]


def byte_chars():
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def bpe_vocab(size):
    """Tokens, kinds and merges of a small byte-level BPE."""
    chars = byte_chars()
    tokens = [chars[b] for b in range(256)]
    merges = ["t h", "th e", "Ġ the", "i n", "a n", "e r", "Ġ a", "Ġ w", "o n", "1 2"]
    tokens += [m.replace(" ", "") for m in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds = [1] * len(tokens) + [3] * len(special)
    tokens += special
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(5)
    return tokens, kinds, merges


def spm_metadata(config):
    pieces, scores, kinds = zip(*spm_vocab(config["vocab_size"]))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(kinds),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    }


def bpe_metadata(config):
    tokens, kinds, merges = bpe_vocab(config["vocab_size"])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


MODELS = {
    "llama": dict(
        seed=3,
        config={"vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        tokenizer=spm_metadata,
        kinds=[
            {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q8_0", "ffn_gate": "Q4_0", "ffn_up": "Q4_K", "ffn_down": "Q6_K"},
            {"attn_q": "F16", "attn_k": "Q8_0", "attn_v": "BF16", "attn_output": "Q4_0", "ffn_gate": "Q5_K", "ffn_up": "Q6_K", "ffn_down": "Q4_K"},
        ],
        embedding="Q8_0",
        output="Q6_K",
    ),
    "qwen2": dict(
        seed=3,
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 288,
            "intermediate_size": 96,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tokenizer=bpe_metadata,
        kinds=[dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"], "Q8_0")] * 2,
        embedding="F16",
        output=None,
    ),
}
TEXTS = ["the whether in then", "  two  spaces\nand a line", "bytes: \u00e9\u4e16 1234 it's", "", "wor</s>d"]
HUB = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def unpaired(w, head_dim):
    """From llama.cpp's order of a head's rows, pairs side by side, to the hub's, first halves before second ones."""
    return w.reshape(-1, head_dim // 2, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def make(name, out, seed):
    spec, folder = MODELS[name], out / name
    folder.mkdir(parents=True)
    config = base.BASE | spec["config"]
    arch, h, inter = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or h // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors, plain = {}, {}

    def add(gguf_name, hub_name, kind, shape, std, centre=0.0, paired=False):
        if len(shape) == 1:
            values = (base.gaussian(rng, shape, std) + np.float32(centre)).numpy()
            raw = values.astype(np.float32).tobytes()
        else:
            raw, values = random_tensor(rng, kind, shape, std)
        tensors[gguf_name] = (kind, shape, raw)
        plain[hub_name] = torch.from_numpy(np.ascontiguousarray(unpaired(values, head_dim) if paired else values))

    tied = config["tie_word_embeddings"]
    add("token_embd.weight", "model.embed_tokens.weight", spec["embedding"], (config["vocab_size"], h), 0.2 if tied else 0.6)
    for i, kinds in enumerate(spec["kinds"]):
        shapes = {"attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, q)}
        shapes |= {"ffn_gate": (inter, h), "ffn_up": (inter, h), "ffn_down": (h, inter)}
        for part, shape in shapes.items():
            hub = f"model.layers.{i}.{HUB[part]}"
            paired = arch == "llama" and part in ("attn_q", "attn_k")
            add(f"blk.{i}.{part}.weight", f"{hub}.weight", kinds[part], shape, 1.3 / shape[1] ** 0.5, paired=paired)
            if arch == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{i}.{part}.bias", f"{hub}.bias", "F32", shape[:1], 0.2)
        add(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight", "F32", (h,), 0.2, 1.0)
        add(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight", "F32", (h,), 0.2, 1.0)
    add("output_norm.weight", "model.norm.weight", "F32", (h,), 0.2, 1.25 if tied else 1.0)
    if spec["output"]:
        add("output.weight", "lm_head.weight", spec["output"], (config["vocab_size"], h), 0.25)
    metadata = {
        "general.architecture": arch,
        "general.name": f"tiny {arch}",
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": h,
        f"{arch}.feed_forward_length": inter,
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
    write_gguf(folder / "model.gguf", metadata | spec["tokenizer"](config), tensors)
    with tempfile.TemporaryDirectory() as tmp:
        base.write_json(Path(tmp) / "config.json", config)
        save_file(plain, Path(tmp) / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.float32, attn_implementation="eager").eval()
        golden, margins, _ = base.reference(model)
    cut = {n: t[-KEPT:].contiguous() if n.startswith("logits") else t for n, t in golden.items()}
    save_file(cut, folder / "golden.safetensors")
    return margins


def build(out):
    for name, spec in MODELS.items():
        margins = make(name, out, spec["seed"])
        print(f"{name}: margins {margins}", flush=True)
        assert min(margins) > base.MIN_MARGIN, f"{name}: choose another seed"


def verify():
    """Our decoding against the package's; the ids of TEXTS by transformers, to be compared with the engine's test."""
    import gguf

    for name in MODELS:
        path = OUT / name / "model.gguf"
        for t in gguf.GGUFReader(path).tensors:
            if t.tensor_type.name in DECODE:
                ours = DECODE[t.tensor_type.name](np.asarray(t.data).reshape(-1, BLOCKS[t.tensor_type.name][1])).ravel()
                theirs = gguf.quants.dequantize(t.data, t.tensor_type).ravel()
                assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max(), t.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file="model.gguf")
        for s in TEXTS:
            print(name, json.dumps(s), tokenizer.encode(s))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    p.add_argument("--verify", action="store_true")
    a = p.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if a.verify:
        return verify()
    if a.check:
        with tempfile.TemporaryDirectory() as tmp:
            build(Path(tmp))
            problems = base.compare(OUT, Path(tmp))
        print("\n".join(problems) or "ok")
        return 1 if problems else 0
    for name in MODELS:
        for file in (OUT / name).glob("*"):
            file.unlink()
        if (OUT / name).exists():
            (OUT / name).rmdir()
    return build(OUT)


if __name__ == "__main__":
    sys.exit(main())
