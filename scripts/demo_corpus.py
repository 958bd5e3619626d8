"""The training text of the demo model: made up from templates, no downloads.

``sample(rng)`` returns one document as ``(kind, tools, messages)``. ``messages`` is a chat, or a plain string for text without
a chat. Proportions are in ``MIX``. Words that must be copied are partly invented (``nonce``), so that the model learns copying
and not a choice from a list.
"""

import json
import random

from demo_facts import CITIES, DAYS, FAQ, GROUPS, MONTHS, OPPOSITES, OUT_OF_SCOPE, SOUNDS, paraphrase
from demo_stories import ADJECTIVES, ANIMALS, COLORS, NAMES, OBJECTS, an, nonce, pick, story

MIX = {
    "story_text": 0.02,
    "story_chat": 0.13,
    "story_qa": 0.22,
    "math": 0.15,
    "tools": 0.14,
    "faq": 0.065,
    "fact": 0.05,
    "count": 0.04,
    "repeat": 0.04,
    "reverse": 0.04,
    "compare": 0.04,
    "json": 0.02,
    "memory": 0.022,
    "unknown": 0.013,
    "list": 0.01,
}
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are a tiny demo model.",
]
UNKNOWN = "I do not know that. I am only a tiny demo model."

# Tool definitions for a house: {verb_thing: sentence}. The held-out pairs never appear in training.
HOME_VERBS = {
    "turn_on": ["Turn on the {t} in the {p}.", "Switch on the {t} in the {p}."],
    "turn_off": ["Turn off the {t} in the {p}.", "Switch off the {t} in the {p}."],
    "open": ["Open the {t} in the {p}.", "Please open the {t} in the {p}."],
    "close": ["Close the {t} in the {p}.", "Shut the {t} in the {p}."],
    "lock": ["Lock the {t} in the {p}."],
    "clean": ["Clean the {t} in the {p}.", "Please clean the {t} in the {p}."],
    "check": ["Check the {t} in the {p}.", "How is the {t} in the {p}?"],
}
HOME_THINGS = "light lamp door window oven fan radio heater gate camera curtain printer screen".split()
ROOMS = "kitchen bedroom garage office hall bathroom attic cellar library garden".split()
HELD_OUT_TOOLS = {("turn_on", "light"), ("open", "gate")}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def tool_definition(name, description, rng=None, **properties):
    """An OpenAI-style tool; with a generator, in the varied shapes that clients send."""
    props = {k: {"type": v} for k, v in properties.items()}
    if rng and rng.random() < 0.4:
        props = {k: dict(v, description="The " + k.replace("_", " ")) for k, v in props.items()}
    parameters = {"type": "object", "properties": props}
    if not rng or rng.random() < 0.8:
        parameters["required"] = list(props)
    if rng and rng.random() < 0.3:
        description += "."
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _tool_catalog(rng):
    """{key: (spec, questions, arguments, result, final answer)}"""
    city, name = pick(rng, list(CITIES), 0.25, True), pick(rng, NAMES, 0.15, True)
    x, y, minutes = rng.randint(0, 99), rng.randint(0, 99), rng.randint(1, 60)
    thing, degrees, hour = pick(rng, OBJECTS, 0.15), rng.randint(0, 35), rng.randint(1, 12)
    sky = rng.choice("sunny cloudy rainy windy snowy".split())
    text = rng.choice(
        ["I am late", "see you soon", "lunch is ready", "happy birthday", "call me back", f"bring the {thing}", f"I am in {city}"]
    )
    song = pick(rng, COLORS, 0.2) + " " + pick(rng, OBJECTS, 0.2)
    search, query = rng.choice(
        [
            (f"Search for {an(thing)}.", an(thing)),
            (f"Find a red {thing} online.", f"red {thing}"),
            (f"Look up {thing} on the web.", thing),
            (f"Search the web for {song}.", song),
        ]
    )
    verb, device = rng.choice(list(HOME_VERBS)), rng.choice(HOME_THINGS)
    while (verb, device) in HELD_OUT_TOOLS:
        verb, device = rng.choice(list(HOME_VERBS)), rng.choice(HOME_THINGS)
    room, room_key = pick(rng, ROOMS, 0.1), rng.choice(["room", "place"])
    weather = rng.choice(["Get the weather for a city", "Get current weather", "Weather lookup"])
    return {
        "weather": (
            ("get_weather", weather, {"city": "string"}),
            [
                f"What is the weather in {city}?",
                f"How is the weather in {city} today?",
                f"Is it raining in {city}?",
                f"weather {city}",
                f"What's the weather like in {city}?",
            ],
            {"city": city},
            {"temperature": degrees, "sky": sky},
            f"It is {sky} in {city} with {degrees} degrees.",
        ),
        "add": (
            ("add", "Add two numbers", {"a": "integer", "b": "integer"}),
            [f"Add {x} and {y}.", f"What is {x} plus {y}?", f"Use the tool to compute {x} + {y}."],
            {"a": x, "b": y},
            {"result": x + y},
            f"The result is {x + y}.",
        ),
        "timer": (
            ("set_timer", "Set a timer", {"minutes": "integer"}),
            [f"Set a timer for {minutes} minutes.", f"Wake me in {minutes} minutes.", f"Start a {minutes} minute timer."],
            {"minutes": minutes},
            {"ok": True},
            "Done.",
        ),
        "search": (
            ("search", "Search the web", {"query": "string"}),
            [search],
            {"query": query},
            {"results": minutes},
            f"I found {minutes} results.",
        ),
        "send": (
            ("send_message", "Send a message to a person", {"to": "string", "text": "string"}),
            [f"Send a message to {name}: {text}.", f"Tell {name}: {text}.", f"Write to {name}: {text}."],
            {"to": name, "text": text},
            {"ok": True},
            "Done.",
        ),
        "time": (
            ("get_time", "Get the local time in a city", {"city": "string"}),
            [f"What time is it in {city}?", f"time in {city}"],
            {"city": city},
            {"time": f"{hour}:00"},
            f"It is {hour}:00 in {city}.",
        ),
        "music": (
            ("play_song", "Play a song", {"title": "string"}),
            [f"Play {song}.", f"Play the song {song}."],
            {"title": song},
            {"ok": True},
            "Done.",
        ),
        "price": (
            ("get_price", "Get the price of an item", {"item": "string"}),
            [f"How much is {an(thing)}?", f"What does {an(thing)} cost?", f"Price of {thing}?"],
            {"item": thing},
            {"price": x},
            f"{an(thing).capitalize()} costs {x}.",
        ),
        "home": (
            (f"{verb}_{device}", f"{verb.replace('_', ' ').capitalize()} the {device}", {room_key: "string"}),
            [q.format(t=device, p=room) for q in HOME_VERBS[verb]],
            {room_key: room},
            {"ok": True},
            "Done.",
        ),
    }


def _tools(rng):
    catalog = _tool_catalog(rng)
    keys = rng.sample(list(catalog), rng.choice([1, 1, 1, 2, 2, 3]))
    key = rng.choice(keys)
    if "home" not in keys and rng.random() < 0.3:
        keys[keys.index(key)] = key = "home"
    tools = [tool_definition(catalog[k][0][0], catalog[k][0][1], rng, **catalog[k][0][2]) for k in keys]
    if rng.random() < 0.12:
        return "tool_none", tools, _faq(rng)[2]
    spec, questions, arguments, result, final = catalog[key]
    call = {"type": "function", "function": {"name": spec[0], "arguments": arguments}}
    messages = [user(rng.choice(questions)), {"role": "assistant", "content": "", "tool_calls": [call]}]
    if rng.random() < 0.4:
        messages += [{"role": "tool", "content": json.dumps(result)}, assistant(final)]
    return "tool_call", tools, messages


def _story_text(rng):
    return "story_text", None, story(rng)[0]


def _story_chat(rng):
    """A story on request; half of the time with questions about it."""
    name, animal, thing = pick(rng, NAMES, 0.1, True), pick(rng, ANIMALS, 0.12), pick(rng, OBJECTS, 0.12)
    adjective, color = rng.choice(ADJECTIVES), rng.choice(COLORS)
    about, fixed = rng.choice(
        [
            (f"{an(animal)} and {an(thing)}", dict(a=animal, o=thing)),
            (an(animal), dict(a=animal)),
            (f"{name} and {an(animal)}", dict(n=name, a=animal)),
            (f"{an(adjective)} {animal}", dict(a=animal, adj=adjective)),
            (f"{an(adjective)} {animal} and {an(color)} {thing}", dict(a=animal, adj=adjective, c=color, o=thing)),
            (an(thing), dict(o=thing)),
            (f"{name}", dict(n=name)),
            ("", {}),
        ]
    )
    ask = rng.choice(
        [
            "Tell me a story",
            "Tell me a short story",
            "Write a short story",
            "tell me a story",
            "Please tell me a story",
            "Can you tell me a story",
            "Write a story",
        ]
    )
    text, questions = story(rng, **fixed)
    messages = [user(f"{ask} about {about}." if about else ask + "."), assistant(text)]
    if rng.random() < 0.6:
        for question, answer in rng.sample(questions, rng.choice([1, 2, 3, 4])):
            messages += [user(question), assistant(answer)]
    return "story_chat", None, messages


def _story_qa(rng):
    text, questions = story(rng)
    chosen = rng.sample(questions, rng.choice([1, 2, 3, 4, 5]))
    head = rng.choice(["Read this story and answer the question.\n\n", "Here is a story. ", "", "Story: "])
    messages = [user(f"{head}{text}\n\n{chosen[0][0]}"), assistant(chosen[0][1])]
    for question, answer in chosen[1:]:
        messages += [user(question), assistant(answer)]
    return "story_qa", None, messages


def _math(rng):
    operation = rng.choice("++--*")
    limit = 10 if operation == "*" else 20 if rng.random() < 0.55 else 99
    x, y = rng.randint(0, limit), rng.randint(0, limit)
    if operation == "-":
        x, y = max(x, y), min(x, y)
    word, value = {"+": ("plus", x + y), "-": ("minus", x - y), "*": ("times", x * y)}[operation]
    sum_ = f"{x} {operation} {y}"
    ask = rng.choice([f"What is {sum_}?", f"{sum_} =", sum_, f"What is {x} {word} {y}?", f"Compute {sum_}.", f"what is {sum_}"])
    return "math", None, [user(ask), assistant(f"{sum_} = {value}")]


def _faq(rng):
    questions, answer = rng.choice(FAQ)
    return "faq", None, [user(paraphrase(rng, rng.choice(questions))), assistant(answer)]


def _fact(rng):
    kind = rng.randrange(4)
    if kind == 0:
        city, country = rng.choice(list(CITIES.items()))
        question, answer = rng.choice(
            [
                (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
                (f"Which country is {city} in?", f"{city} is in {country}."),
            ]
        )
    elif kind == 1:
        animal = rng.choice(list(SOUNDS))
        question, answer = f"What does {an(animal)} say?", f"{an(animal).capitalize()} says {SOUNDS[animal]}."
    elif kind == 2:
        x, y = rng.choice(list(OPPOSITES.items()))
        x, y = rng.choice([(x, y), (y, x)])
        question, answer = rng.choice([f"What is the opposite of {x}?", f"opposite of {x}?"]), f"The opposite of {x} is {y}."
    else:
        row, word = rng.choice([(DAYS, "day"), (MONTHS, "month")])
        i = rng.randrange(len(row))
        question, answer = f"What {word} comes after {row[i]}?", f"{row[(i + 1) % len(row)]} comes after {row[i]}."
    return "fact", None, [user(question), assistant(answer)]


def _count(rng):
    x = rng.choice([1, 1, rng.randint(0, 9), rng.randint(0, 40)])
    y = x + rng.randint(2, 14)
    ask = rng.choice([f"Count from {x} to {y}.", f"count from {x} to {y}"] + ([f"Count to {y}."] if x == 1 else []))
    return "count", None, [user(ask), assistant(", ".join(map(str, range(x, y + 1))))]


def _list(rng):
    group, members = rng.choice(list(GROUPS.items()))
    n = rng.randint(2, 6)
    word = "two three four five six".split()[n - 2]
    return "list", None, [user(f"Name {rng.choice([word, str(n)])} {group}."), assistant(", ".join(rng.sample(members, n)))]


def _json(rng):
    name, age, color = pick(rng, NAMES, 0.2, True), rng.randint(3, 99), rng.choice(COLORS)
    thing, city = pick(rng, OBJECTS, 0.15), rng.choice(list(CITIES))
    ask, value = rng.choice(
        [
            (f"Give me JSON with the name {name} and the age {age}.", {"name": name, "age": age}),
            (f"Write a JSON object for {an(color)} {thing}.", {"object": thing, "color": color}),
            (f"Extract the name and city as JSON: {name} lives in {city}.", {"name": name, "city": city}),
            (f"Extract the name and age as JSON: {name} is {age} years old.", {"name": name, "age": age}),
        ]
    )
    return "json", None, [user(ask), assistant(json.dumps(value))]


def _repeat(rng):
    words = [pick(rng, ANIMALS + OBJECTS + COLORS, 0.15) for _ in range(rng.randint(1, 5))]
    return "repeat", None, [user(rng.choice(["Repeat after me: ", "Say: "]) + " ".join(words)), assistant(" ".join(words))]


def _reverse(rng):
    words = [pick(rng, ANIMALS + OBJECTS + COLORS, 0.06) for _ in range(rng.randint(2, 5))]
    return "reverse", None, [user(f"Reverse the list: {', '.join(words)}"), assistant(", ".join(words[::-1]))]


def _compare(rng):
    x, y = rng.sample(range(0, 100), 2)
    ask = rng.choice([f"Which is bigger, {x} or {y}?", f"Which number is bigger: {x} or {y}?"])
    return "compare", None, [user(ask), assistant(f"{max(x, y)} is bigger than {min(x, y)}.")]


def memory_chat(rng, name=None):
    name = name or pick(rng, NAMES, 0.2, True)
    friend, color = rng.choice([x for x in NAMES if x != name]), rng.choice(COLORS)
    hello = rng.choice([f"My name is {name}.", f"Hi, I am {name}.", f"Hello, my name is {name}."])
    between = rng.choice(
        [
            [],
            [user(f"I like {color}."), assistant(f"{color.capitalize()} is a nice color.")],
            [user(f"My friend is called {friend}."), assistant(f"{friend} sounds like a good friend.")],
            _fact(rng)[2],
            _faq(rng)[2],
        ]
    )
    ask = rng.choice(["What is my name?", "Do you remember my name?"])
    return (
        "memory",
        None,
        [user(hello), assistant(f"Nice to meet you, {name}!"), *between, user(ask), assistant(f"Your name is {name}.")],
    )


def _unknown(rng):
    ask = rng.choice(
        [
            "What is the capital of {X}?",
            "Who is {X}?",
            "What is a {x}?",
            "How tall is {X}?",
            "When was {X} born?",
            "What does {x} mean?",
            "Where is {X}?",
            "What is the price of a {x}?",
        ]
    ).format(X=nonce(rng, True), x=nonce(rng))
    if rng.random() < 0.6:
        ask = paraphrase(rng, rng.choice(OUT_OF_SCOPE))
    return "unknown", None, [user(ask), assistant(UNKNOWN)]


MAKERS = {
    "story_text": _story_text,
    "story_chat": _story_chat,
    "story_qa": _story_qa,
    "math": _math,
    "tools": _tools,
    "faq": _faq,
    "fact": _fact,
    "count": _count,
    "repeat": _repeat,
    "reverse": _reverse,
    "compare": _compare,
    "json": _json,
    "memory": memory_chat,
    "unknown": _unknown,
    "list": _list,
}
SHORT = ["math", "faq", "faq", "fact", "fact", "count", "repeat", "reverse", "compare", "json", "list", "unknown"]


def sample(rng: random.Random):
    """One document of one topic: (kind, tools, messages or text)."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    return MAKERS[kind](rng)


def training_sample(rng: random.Random):
    """As ``sample``, sometimes with a system prompt and with short exchanges on other topics before it."""
    kind, tools, messages = sample(rng)
    if isinstance(messages, str):
        return kind, tools, messages
    if kind != "story_qa" and rng.random() < 0.2:
        earlier = [MAKERS[k](rng)[2] for k in rng.choices(SHORT, k=rng.choice([1, 1, 2]))]
        messages = [m for chat in earlier for m in chat] + messages
    if rng.random() < 0.15:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] + messages
    return kind, tools, messages
