#!/usr/bin/env python3
"""Train the demo model: a tiny Llama chat model, on CPU, from text that ``demo_corpus.py`` makes up. No downloads.

    python train_demo_model.py OUT                 # corpus, tokenizer, training, then save
    python train_demo_model.py OUT --resume OUT    # train on: same tokenizer, new documents, a new schedule
    python eval_demo_model.py OUT                  # held-out results

Needs torch, transformers and tokenizers. The budget counts CPU time, so a busy machine trains longer and not worse; --max-minutes
bounds the wall time, and the learning-rate schedule ends properly at whichever bound comes first.
"""

import argparse
import json
import math
import os
import random
import sys
import time

# Freed memory stays mapped and in huge pages: page faults cost a third of the speed otherwise. Threads wait only shortly by spinning:
# on a busy machine a long spin takes the core from the thread that is waited for.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
if __name__ == "__main__" and not os.environ.get("MALLOC_MMAP_MAX_"):
    os.environ.update(ENVIRONMENT, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
import torch.nn.functional as F
import transformers
from demo_corpus import sample, training_sample
from demo_tokenizer import CONTEXT, END_OF_TEXT, IM_END, IM_START, build_tokenizer, render
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

MAX_DOCUMENT = 448  # tokens
BUCKET = 32  # documents of a batch are padded to a multiple of this
ROPE_THETA = 10000.0


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--resume", metavar="MODEL", help="start from this model and its tokenizer")
    p.add_argument("--seed", type=int, default=2, help="of the documents")
    p.add_argument("--cpu-minutes", type=float, default=90, help="training budget, summed over the threads")
    p.add_argument("--max-minutes", type=float, default=180, help="bound on the wall time of training")
    p.add_argument("--documents", type=int, default=330_000)
    p.add_argument("--vocab", type=int, default=2048)
    p.add_argument("--batch-tokens", type=int, default=4096)
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--prompt-weight", type=float, default=0.1, help="loss weight of tokens that the assistant does not write")
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


def make_tokenizer(vocab):
    rng = random.Random(1)
    plain = ("".join(t for t, _ in render(*sample(rng)[1:])) for _ in range(15_000))
    special = (IM_START, IM_END, END_OF_TEXT)

    def strip(text):
        for s in special:
            text = text.replace(s, "")
        return text

    tok = build_tokenizer(map(strip, plain), vocab)
    for _ in range(400):  # the fast renderer and the template must agree
        kind, tools, messages = training_sample(rng)
        if isinstance(messages, list):
            want = "".join(t for t, _ in render(tools, messages)).removesuffix(IM_START + "assistant\n")
            assert tok.apply_chat_template(messages, tools=tools, tokenize=False) == want, (kind, messages)
    return tok


def make_documents(tok, count, prompt_weight, seed):
    """[(ids, loss weights)]"""
    rng, backend, documents = random.Random(seed), tok.backend_tokenizer, []
    for start in range(0, count, 4096):
        batch = [render(*training_sample(rng)[1:]) for _ in range(min(4096, count - start))]
        encoded = iter(backend.encode_batch_fast([text for doc in batch for text, _ in doc], add_special_tokens=False))
        for doc in batch:
            ids, weights = [], []
            for _, trained in doc:
                piece = next(encoded).ids
                ids += piece
                weights += [1.0 if trained else prompt_weight] * len(piece)
            if len(ids) <= MAX_DOCUMENT:
                documents.append((ids, weights))
    return documents


def make_batches(documents, budget):
    """Documents of like length together: little padding, and no attention across documents."""
    batches, current, width = [], [], 0
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i][0])):
        length = math.ceil(len(documents[i][0]) / BUCKET) * BUCKET
        if current and max(width, length) * (len(current) + 1) > budget:
            batches.append(current)
            current, width = [], 0
        current.append(i)
        width = max(width, length)
    return batches + [current]


def collate(documents, pad):
    width = math.ceil(max(len(x) for x, _ in documents) / BUCKET) * BUCKET
    ids, weights = torch.full((len(documents), width), pad), torch.zeros(len(documents), width)
    for row, (x, w) in enumerate(documents):
        ids[row, : len(x)] = torch.tensor(x)
        weights[row, : len(x)] = torch.tensor(w)
    return ids, weights


def make_model(tok):
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tok.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tok.convert_tokens_to_ids(IM_END),
        pad_token_id=tok.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    return LlamaForCausalLM(config)


def make_optimizers(model, lr):
    """Muon for the matrices, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model, documents, pad, a):
    rng, batches, optimizers = random.Random(3), make_batches(documents, a.batch_tokens), make_optimizers(model, a.lr)
    hidden = model.config.hidden_size

    def token_loss(ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].reshape(-1, hidden)
            logits = F.linear(h, model.lm_head.weight)
        return F.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="none")

    token_loss = torch.compile(token_loss, dynamic=True)
    wall0, cpu0, queue, losses, step, seen = time.time(), time.process_time(), [], [], 0, 0
    model.train()
    while True:
        cpu, wall = (time.process_time() - cpu0) / 60, (time.time() - wall0) / 60
        progress = max(cpu / a.cpu_minutes, wall / a.max_minutes)
        if progress >= 1:
            break
        decay = 1.0 if progress < 0.3 else max(0.02, (1 - progress) / 0.7)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = a.lr * min(1.0, (step + 1) / 60) * decay
        for _ in range(a.accumulate):
            if not queue:
                queue = rng.sample(batches, len(batches))
            ids, weights = collate([documents[i] for i in queue.pop()], pad)
            target = weights[:, 1:].reshape(-1)
            loss = token_loss(ids)
            ((loss * target).sum() / target.sum() / a.accumulate).backward()
            losses.append(float(loss.detach()[target == 1].mean()))
            seen += int((weights > 0).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            print(
                f"step {step} progress {progress:.3f} cpu {cpu:.1f} wall {wall:.1f} min tokens {seen / 1e6:.2f} M "
                f"({seen / (wall * 60 + 1e-9):.0f}/s) loss {sum(losses) / len(losses):.4f}",
                flush=True,
            )
            losses = []
    print(f"trained {step} steps, {seen / 1e6:.2f} M tokens, {cpu:.1f} CPU minutes, {wall:.1f} wall minutes", flush=True)


def save(model, tok, out):
    """The folder as loaders of both config generations want it."""
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tok.save_pretrained(out)

    def rewrite(name, change):
        path = os.path.join(out, name)
        with open(path) as f:
            data = json.load(f)
        data = change(data)
        with open(path, "w") as f:
            f.write(json.dumps(data, indent=2, sort_keys=True) + "\n")

    ends = [tok.convert_tokens_to_ids(x) for x in (IM_END, END_OF_TEXT)]
    rewrite("config.json", lambda c: c | {"rope_theta": ROPE_THETA, "dtype": "bfloat16", "torch_dtype": "bfloat16"})
    rewrite(
        "generation_config.json",
        lambda _: {
            "bos_token_id": ends[1],
            "eos_token_id": ends,
            "pad_token_id": tok.pad_token_id,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    rewrite(
        "tokenizer_config.json",
        lambda c: {k: v for k, v in c.items() if k != "backend"} | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )


def main():
    a = arguments()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    started = time.time()
    tok = AutoTokenizer.from_pretrained(a.resume) if a.resume else make_tokenizer(a.vocab)
    print(f"tokenizer: {len(tok)} tokens, {time.time() - started:.0f} s", flush=True)
    documents = make_documents(tok, a.documents, a.prompt_weight, a.seed)
    tokens = sum(len(x) for x, _ in documents)
    print(f"corpus: {len(documents)} documents, {tokens / 1e6:.2f} M tokens, {time.time() - started:.0f} s", flush=True)
    model = LlamaForCausalLM.from_pretrained(a.resume, dtype=torch.float32) if a.resume else make_model(tok)
    print(f"model: {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    train(model, documents, tok.pad_token_id, a)
    save(model, tok, a.out)
    print({f: os.path.getsize(os.path.join(a.out, f)) for f in sorted(os.listdir(a.out))})


if __name__ == "__main__":
    main()
