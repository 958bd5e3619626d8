"""Short stories with questions about them, and the words they are made of."""

NAMES = """Mia Tom Ana Leo Zoe Ben Lily Max Eva Sam Nora Finn Ivy Jack Ella Omar Ruby Hugo Maya Noah Lena Theo Rosa Adam Clara Luke
Anna Felix Julia Milo Sara Oscar Alice Nina Peter Emma Paul Iris Kai Tara Alan Amy Amir Andrea Anton Arthur Aisha Bella Boris Bruno
Carl Carlos Carmen Chen Chloe Daniel David Diana Diego Elena Elias Eliza Emil Emily Eric Erin Ethan Fatima Flora Frank Frida George
Grace Greta Hannah Harry Heidi Helen Henry Ian Ida Ines Irene Isaac Isabel Ivan Jacob Jade James Jane Jasper Joan Joel John Jonas
Jose Joseph Judy Karen Karl Kate Kenji Kim Klara Laura Lars Layla Lea Leila Leon Liam Lina Linda Lola Louis Lucas Lucia Lucy Luna
Magnus Marco Maria Marie Mark Martha Martin Mary Mateo Matilda Matt Mei Mila Mina Mohamed Monica Nadia Naomi Natalie Nathan Nico Nils
Nicole Olaf Olga Oliver Olivia Otto Pablo Pedro Petra Philip Pia Priya Rachel Rafael Ravi Rita Robert Robin Roman Rosie Roy Ryan Sally
Samira Sandra Sasha Selma Simon Sofia Sonia Stella Stephen Sven Sylvia Tariq Teresa Thea Thomas Tim Tina Tobias Tony Uma Vera Victor
Viktor Vincent Wendy Will William Yara Yuki Yusuf Zara""".split()
HELD_OUT_NAMES = "Beatrix Dorothy Edward Florence Gandalf Harold Ingrid Kevin Quentin Rupert Sabrina Walter".split()
ANIMALS = """cat dog fox rabbit bear owl mouse duck frog horse turtle bird lion elephant monkey sheep goat pig hen bee squirrel hedgehog
deer wolf dragon tiger penguin otter badger swan crow snail""".split()
OBJECTS = """key lantern ball kite book map drum hat cup bell boat shell stone coin box flower basket umbrella clock ring feather candle
rope scarf button spoon blanket pencil lamp crown ladder teapot""".split()
COLORS = "red blue green yellow white black brown pink purple golden".split()
PLACES = [
    "in the garden", "in the forest", "by the river", "on the beach", "on the hill", "in the barn", "at the school", "at the market",
    "in the park", "in the kitchen", "under the bridge", "by the lake", "in the village", "in the field", "in the cave",
    "in the library", "in the tower", "at the farm",
]  # fmt: skip
ADJECTIVES = "kind brave shy clever curious gentle quiet cheerful patient small".split()
FEELINGS = "happy proud glad calm thankful excited".split()
FOODS = ["an apple", "a pear", "some bread", "some soup", "a cookie", "some honey", "a carrot", "some rice"]
ONSETS = "b d h l m n r s t v w z br dr tr st".split()
VOWELS = "a e i o u".split()
CODAS = ["", "", "n", "r", "l", "s", "m", "t"]


def nonce(rng, capital=False):
    """An invented word of two or three syllables."""
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice([2, 2, 3]))) + rng.choice(CODAS)
    return word.capitalize() if capital else word


def pick(rng, words, p, capital=False):
    """A word of the list, or with probability ``p`` an invented one."""
    return nonce(rng, capital) if rng.random() < p else rng.choice(words)


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


# A plot is (sentences, questions). A sentence that is a tuple stands for one of its members. Fields: n and m names, a animal,
# o object, c colour, co "a <colour>", p and p2 places, adj and aadj the animal's adjective, f feeling, food, t time of day, fin "at last".
START = (
    "Once upon a time there was {aadj} {a} who lived {p}.",
    "{Aadj} {a} lived {p}.",
    "Long ago, {aadj} {a} lived {p}.",
)
LOST = (
    [
        START,
        "The {a} had a friend named {n}.",
        "{t}, {n} lost {co} {o}.",
        ("{n} looked everywhere but could not find it.", "{n} was very sad."),
        ('"I will help you," said the {a}.', "The {a} wanted to help."),
        "Together they searched {p2}.",
        "{fin}, the {a} found the {o} {p2}.",
        "{n} was {f} and hugged the {a}.",
    ],
    [
        ("What did {n} lose?", "{n} lost {co} {o}."),
        ("Who found the {o}?", "The {a} found the {o}."),
        ("Where was the {o}?", "The {o} was {p2}."),
        ("What color was the {o}?", "The {o} was {c}."),
        ("How did {n} feel at the end?", "{n} was {f}."),
        ("Where did the {a} live?", "The {a} lived {p}."),
    ],
)
GIFT = (
    [
        START,
        "{t}, {n} came to visit and brought {co} {o}.",
        '"This {o} is for you," said {n}.',
        "The {a} had never seen such a nice {o}.",
        "The {a} gave {n} {food} to say thank you.",
        "They sat {p2} and talked until the sun went down.",
        "The {a} was {f}.",
    ],
    [
        ("What did {n} bring?", "{n} brought {co} {o}."),
        ("What did the {a} give {n}?", "The {a} gave {n} {food}."),
        ("Where did they sit?", "They sat {p2}."),
        ("What color was the {o}?", "The {o} was {c}."),
        ("Who came to visit?", "{n} came to visit."),
        ("How did the {a} feel?", "The {a} was {f}."),
    ],
)
STORM = (
    [
        "{n} and {m} were playing {p}.",
        ("Suddenly the wind began to blow.", "Dark clouds came, and it began to rain."),
        "They saw {aadj} {a} that was cold and wet.",
        "{n} put {co} {o} next to the {a}.",
        "{m} gave the {a} {food}.",
        "They waited {p2} until the storm was over.",
        "{fin}, the sun came out, and everyone was {f}.",
    ],
    [
        ("Who gave the {a} {food}?", "{m} gave the {a} {food}."),
        ("Where were {n} and {m} playing?", "They were playing {p}."),
        ("What animal did they see?", "They saw {aadj} {a}."),
        ("What color was the {o}?", "The {o} was {c}."),
        ("Where did they wait?", "They waited {p2}."),
        ("How did everyone feel at the end?", "Everyone was {f}."),
    ],
)
SHARE = (
    [
        "{n} had {co} {o}.",
        "{m} wanted to play with it too.",
        "At first {n} did not want to share.",
        'Then {aadj} {a} came and said, "It is more fun to play together."',
        "So {n} gave the {o} to {m}.",
        "They played {p} all day, and then they ate {food}.",
        "{m} was {f}.",
    ],
    [
        ("What did {n} have?", "{n} had {co} {o}."),
        ("Who wanted to play with the {o}?", "{m} wanted to play with the {o}."),
        ("Where did they play?", "They played {p}."),
        ("What did they eat?", "They ate {food}."),
        ("Who said that it is more fun to play together?", "The {a} said that it is more fun to play together."),
        ("How did {m} feel?", "{m} was {f}."),
    ],
)
TREASURE = (
    [
        START,
        "{t}, the {a} found an old map.",
        "The map showed a treasure {p2}.",
        "The {a} asked {n} to come along.",
        ("They walked for a long time.", "The way was long, but they did not give up."),
        "{fin}, they dug a hole and found {co} {o}.",
        '"We found it together," said {n}, and the {a} was {f}.',
    ],
    [
        ("What did the {a} find first?", "The {a} found an old map."),
        ("Where was the treasure?", "The treasure was {p2}."),
        ("What was the treasure?", "The treasure was {co} {o}."),
        ("Who came along?", "{n} came along."),
        ("Where did the {a} live?", "The {a} lived {p}."),
        ("What color was the {o}?", "The {o} was {c}."),
    ],
)
HELP = (
    [
        "{n} was walking {p}.",
        "{n} heard a small voice.",
        "It was {aadj} {a} that could not reach its {c} {o}.",
        '"Please help me," said the {a}.',
        "{n} called {m}, and together they got the {o} back.",
        "The {a} said thank you and showed them a secret place {p2}.",
        "From that day on they were friends, and {n} was {f}.",
    ],
    [
        ("Where was {n} walking?", "{n} was walking {p}."),
        ("Who needed help?", "The {a} needed help."),
        ("What could the {a} not reach?", "The {a} could not reach its {c} {o}."),
        ("Who did {n} call?", "{n} called {m}."),
        ("Where was the secret place?", "The secret place was {p2}."),
        ("How did {n} feel?", "{n} was {f}."),
    ],
)
PLOTS = [LOST, GIFT, STORM, SHARE, TREASURE, HELP]


def story(rng, **fixed):
    """(text, [(question, answer)]); ``fixed`` presets fields such as n, a, o, c or adj."""
    f = {
        "n": pick(rng, NAMES, 0.1, True),
        "a": pick(rng, ANIMALS, 0.06),
        "o": pick(rng, OBJECTS, 0.06),
        "c": rng.choice(COLORS),
        "adj": rng.choice(ADJECTIVES),
        "f": rng.choice(FEELINGS),
        "food": rng.choice(FOODS),
        "t": rng.choice(["One morning", "One day", "One sunny afternoon", "One evening", "Early one day"]),
        "fin": rng.choice(["At last", "In the end", "Finally"]),
    } | fixed
    f["m"] = rng.choice([x for x in NAMES if x != f["n"]])
    f["p"], f["p2"] = rng.sample(PLACES, 2)
    f["co"], f["aadj"] = an(f["c"]), an(f["adj"])
    f["Aadj"] = f["aadj"].capitalize()
    sentences, questions = rng.choice(PLOTS)
    text = " ".join((rng.choice(s) if isinstance(s, tuple) else s).format(**f) for s in sentences)
    return text, [(q.format(**f), a.format(**f)) for q, a in questions]
