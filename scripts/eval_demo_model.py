#!/usr/bin/env python3
"""Held-out results of the demo model: exact match with the reference answer, greedy and with the folder's sampling defaults.

    python eval_demo_model.py MODEL [--items 40] [--talk]

Items are drawn with a seed that training does not use. Facts and questions with fixed answers are closed sets that training covers;
stories, sums, names and tool arguments are new combinations. "new name" and "new tool" use words that never appear in training.
"""

import argparse
import json
import os
import random
from collections import Counter

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch
import transformers
from demo_corpus import MAKERS, ROOMS, assistant, memory_chat, sample, tool_definition, user
from demo_stories import ANIMALS, HELD_OUT_NAMES, OBJECTS, an
from demo_tokenizer import IM_END, render
from transformers import AutoModelForCausalLM, AutoTokenizer

SKIPPED = ("story_text", "story_chat", "list")  # no single right answer
PROMPTS = [
    ["Hello!", "Who are you?", "What is a KV cache?", "Thanks!"],
    ["Tell me a story about a fox and a lantern.", "What color was the lantern?"],
    ["Write a short story about Mia and a dragon.", "How did Mia feel?"],
    ["The owl lost a blue hat. Ben found the hat under the bridge.\n\nWho found the hat?", "Where was the hat?"],
    ["Hi, my name is Clara.", "I like blue.", "What is the capital of Japan?", "What is my name?"],
    ["What is 7 + 5?", "What is 43 plus 38?", "12 * 3", "9 * 7"],
    ["Count from 5 to 12.", "Name three animals.", "Reverse the list: cup, owl, red", "Which is bigger, 17 or 71?"],
    ["Give me JSON with the name Rosa and the age 31.", "Write a JSON object for a red kite."],
    ["explain prefill", "What's a token?", "Why is the sky green?", "Write a Python program.", "What is Tidemill?"],
]


class Chat:
    def __init__(self, folder, threads):
        torch.set_num_threads(threads)
        self.tok = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def answer(self, messages, tools=None, sampled=False, limit=160):
        x = self.tok.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        how = (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
            if sampled
            else {"do_sample": False, "temperature": None, "top_p": None}
        )
        y = self.model.generate(**x, max_new_tokens=limit, pad_token_id=self.tok.pad_token_id, **how)[
            0, x["input_ids"].shape[1] :
        ]
        return self.tok.decode(y, skip_special_tokens=True)


def items(count):
    """{kind: [(tools, messages)]}: the last message is the reference."""
    rng, out = random.Random(999), {}
    wanted = [k for k in MAKERS if k not in (*SKIPPED, "tools", "math")]
    wanted += ["tool_call", "tool_final", "tool_none", "times", "sums to 20", "sums to 99"]
    while any(len(out.get(k, ())) < count for k in wanted):
        kind, tools, messages = sample(rng)
        if kind == "math":
            a, operation, b = messages[-1]["content"].split(" = ")[0].split()
            kind = "times" if operation == "*" else "sums to 20" if max(int(a), int(b)) <= 20 else "sums to 99"
        elif kind == "tool_call" and not messages[-1].get("tool_calls"):
            kind = "tool_final"
        if kind in SKIPPED:
            continue
        if len(out.setdefault(kind, [])) < count:
            out[kind].append((tools, messages))
    out["new name"] = [(None, memory_chat(rng, name)[2]) for name in HELD_OUT_NAMES]
    light = tool_definition("turn_on_light", "Turn on the light in a room", room="string")
    gate = tool_definition("open_gate", "Open the gate in a place", place="string")
    out["new tool"] = []
    for room in ROOMS:
        for tool, key, text in [
            (light, "room", f"Turn on the light in the {room}."),
            (gate, "place", f"Open the gate in the {room}."),
        ]:
            call = {"type": "function", "function": {"name": tool["function"]["name"], "arguments": {key: room}}}
            out["new tool"].append(([tool], [user(text), {"role": "assistant", "content": "", "tool_calls": [call]}]))
    return out


def score(chat, count, sampled):
    table, misses = {}, {}
    for kind, examples in sorted(items(count).items()):
        right = 0
        for tools, messages in examples:
            want = render(None, messages[-1:])[0][0].removesuffix(IM_END)
            got = chat.answer(messages[:-1], tools, sampled)
            right += got == want
            if got != want:
                misses.setdefault(kind, []).append((want, got))
        table[kind] = f"{right}/{len(examples)}"
    return table, misses


def talk(chat, sampled):
    for questions in PROMPTS:
        messages = []
        for question in questions:
            messages.append(user(question))
            messages.append(assistant(chat.answer(messages, sampled=sampled)))
            print("USER:", question.replace("\n", " / "), "\n  ->", messages[-1]["content"].replace("\n", " / "), flush=True)


def story_quality(chat, sampled, count=30):
    """How often a requested story ends by itself, mentions what was asked for, and repeats no sentence."""
    rng, good = random.Random(5), Counter()
    for _ in range(count):
        animal, thing = rng.choice(ANIMALS), rng.choice(OBJECTS)
        text = chat.answer([user(f"Tell me a story about {an(animal)} and {an(thing)}.")], sampled=sampled, limit=200)
        sentences = text.split(". ")
        good["mentions both"] += animal in text and thing in text
        good["ends"] += text.rstrip().endswith((".", '"'))
        good["no sentence twice"] += len(set(sentences)) == len(sentences)
    return {k: f"{v}/{count}" for k, v in good.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--items", type=int, default=40)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--misses", action="store_true", help="print wrong answers")
    p.add_argument("--talk", action="store_true", help="print some conversations")
    a = p.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    chat = Chat(a.model, a.threads)
    for sampled in (False, True):
        torch.manual_seed(0)
        label = "sampled" if sampled else "greedy"
        table, misses = score(chat, a.items, sampled)
        print(label, json.dumps(table), json.dumps(story_quality(chat, sampled)), flush=True)
        if a.misses and not sampled:
            for kind, pairs in misses.items():
                for want, got in pairs[:3]:
                    print(f"  {kind}: want {want!r} got {got!r}")
        if a.talk:
            talk(chat, sampled)


if __name__ == "__main__":
    main()
