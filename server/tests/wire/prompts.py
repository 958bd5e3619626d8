"""Prompts that are alike in nothing, and requests made of them."""

OPENINGS = [
    "What is a KV cache?",
    "Tell me a short story about",
    "Once upon a time",
    "The capital of France is",
    "Größe, naïveté, 東京, 🦀 and",
    "1 2 3 4 5 6",
    'Answer in JSON: {"name":',
    "   leading blanks and a tab\t",
]


def request(number):
    """The number-th of endlessly many requests: lengths, sampling and seeds all differ."""
    opening = OPENINGS[number % len(OPENINGS)]
    prompt = f"{opening} {number} " + "and so on " * (number * 7 % 23)
    sampling = dict(temperature=0) if number % 3 == 0 else dict(temperature=0.7 + number % 5 / 5, seed=number)
    if number % 4 == 1:
        sampling.update(top_k=40, top_p=0.95, min_p=0.01)
    if number % 5 == 2:
        sampling.update(repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2)
    return dict(prompt=prompt, max_tokens=8 + number % 17, ignore_eos=number % 2 == 0, **sampling)
