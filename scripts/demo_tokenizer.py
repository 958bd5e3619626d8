"""The demo model's chat template, its byte-level BPE tokenizer, and a fast renderer that agrees with the template."""

import json

IM_START, IM_END, END_OF_TEXT, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CONTEXT = 1024
# Qwen2's pattern: words with their leading space, digits one by one.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    r"{%- if tools %}{{- '<|im_start|>system\n' }}"
    r"{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    r"{{- 'Tools:' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\n' }}"
    r"{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    r"{%- for m in messages %}"
    r"{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    r"{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- if m.content %}{{- m.content }}{%- endif %}"
    r"{%- if m.tool_calls %}{%- for c in m.tool_calls %}"
    r"""{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + """
    r"""(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) + '}\n</tool_call>' }}"""
    r"{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    r"{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{%- endif %}"
    r"{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def tool_call_text(call):
    """A tool call as the assistant writes it."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    body = f'{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'
    return f"<tool_call>\n{body}\n</tool_call>"


def render(tools, messages):
    """[(text, is it the assistant's?)]: the same text as the chat template gives, plus the turn header after each user turn."""
    if isinstance(messages, str):
        return [(messages + END_OF_TEXT, True)]
    out = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        head = f"{system}\n\n" if system is not None else ""
        listing = "".join("\n" + json.dumps(t, ensure_ascii=False) for t in tools)
        out.append((f"{IM_START}system\n{head}Tools:{listing}{IM_END}\n", False))
    elif system is not None:
        out.append((f"{IM_START}system\n{system}{IM_END}\n", False))
    for m in messages:
        if m["role"] == "user":
            out.append((f"{IM_START}user\n{m['content']}{IM_END}\n{IM_START}assistant\n", False))
        elif m["role"] == "tool":
            out.append(
                (f"{IM_START}user\n<tool_response>\n{m['content']}\n</tool_response>{IM_END}\n{IM_START}assistant\n", False)
            )
        elif m["role"] == "assistant":
            text = m["content"] + "".join(map(tool_call_text, m.get("tool_calls", [])))
            out += [(text + IM_END, True), ("\n", False)]
    return out


def build_tokenizer(texts, vocab_size):
    """A byte-level BPE with the special tokens at the end of the vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    t.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    special = [END_OF_TEXT, IM_START, IM_END, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(TOOL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(texts, trainer)
    t.add_special_tokens(special)
    t.add_tokens([AddedToken(x, normalized=False) for x in TOOL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=t, eos_token=IM_END, pad_token=PAD, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
