"""The small world the demo model knows: capitals, opposites, days, and questions with fixed answers."""

from demo_stories import ANIMALS, COLORS, NAMES

CITIES = {
    "Paris": "France", "Berlin": "Germany", "Rome": "Italy", "Madrid": "Spain", "Lisbon": "Portugal", "Vienna": "Austria",
    "Athens": "Greece", "Oslo": "Norway", "Stockholm": "Sweden", "Helsinki": "Finland", "Copenhagen": "Denmark", "Dublin": "Ireland",
    "London": "England", "Warsaw": "Poland", "Prague": "the Czech Republic", "Budapest": "Hungary", "Cairo": "Egypt", "Tokyo": "Japan",
    "Beijing": "China", "Delhi": "India", "Ottawa": "Canada", "Lima": "Peru", "Nairobi": "Kenya", "Ankara": "Turkey",
}  # fmt: skip
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "lion": "roar", "bee": "buzz",
    "owl": "hoot", "frog": "ribbit", "horse": "neigh", "mouse": "squeak",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "happy": "sad", "open": "closed", "light": "dark",
    "old": "new", "wet": "dry", "full": "empty", "high": "low", "long": "short", "soft": "hard", "early": "late", "left": "right",
    "loud": "quiet", "near": "far", "clean": "dirty", "strong": "weak",
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
GROUPS = {
    "animals": ANIMALS,
    "colors": COLORS,
    "fruits": "apples pears plums grapes cherries lemons peaches melons bananas figs".split(),
    "names": NAMES[:40],
    "tools": "hammer saw drill wrench pliers file chisel level".split(),
}
FAQ = [
    (
        ["What is a token?", "What is a token in a language model?"],
        "A token is a small piece of text, such as a word or a part of a word. A language model reads and writes tokens.",
    ),
    (
        ["What is a KV cache?", "What is the KV cache?", "What does the KV cache do?", "Why is there a KV cache?"],
        "A KV cache keeps the keys and values of earlier tokens, so the model does not have to compute them again for every new token.",
    ),
    (
        ["What is prefill?", "What does prefill mean?"],
        "Prefill is the step where the model reads the whole prompt at once and fills the KV cache.",
    ),
    (
        ["What is decode?", "What is decoding?", "What does decoding mean?"],
        "Decoding is the step where the model writes one new token at a time.",
    ),
    (
        ["What is continuous batching?", "What does continuous batching mean?"],
        "Continuous batching lets new requests join a running batch at every step, so the hardware stays busy.",
    ),
    (["What is a tokenizer?", "What does a tokenizer do?"], "A tokenizer turns text into tokens and tokens back into text."),
    (
        ["What is quantization?", "What does quantization do?"],
        "Quantization stores the weights of a model with fewer bits, so it needs less memory.",
    ),
    (["What is a GPU?"], "A GPU is a processor that does many simple calculations at the same time."),
    (["What is a CPU?"], "A CPU is the main processor of a computer. It runs the instructions of programs."),
    (
        ["What is temperature?", "What does temperature do when sampling?"],
        "Temperature controls how random the next token is. A low temperature gives steady answers.",
    ),
    (["What is greedy decoding?"], "Greedy decoding always picks the most likely next token."),
    (["What is an embedding?"], "An embedding is a list of numbers that stands for the meaning of a text."),
    (
        ["What is a chat template?", "What does a chat template do?"],
        "A chat template turns a list of messages into the one text that the model reads.",
    ),
    (
        ["What is a language model?", "What does a language model do?"],
        "A language model reads text and guesses the next token, again and again.",
    ),
    (
        ["What is an inference engine?", "What does an inference engine do?"],
        "An inference engine runs a trained model and answers requests with it.",
    ),
    (
        ["What is Tidemill?", "What does Tidemill do?"],
        "Tidemill is an inference engine for language models. It is written in Rust.",
    ),
    (
        ["What is a prefix cache?", "What does a prefix cache do?"],
        "A prefix cache keeps the work done for the beginning of a prompt, so that a request with the same beginning starts faster.",
    ),
    (["What is throughput?"], "Throughput is how many tokens a server writes per second for all requests together."),
    (["What is latency?"], "Latency is how long one request has to wait for its answer."),
    (["What is streaming?"], "Streaming sends each piece of an answer as soon as it is written."),
    (
        ["What is attention?", "What does attention do?"],
        "Attention lets a model look back at earlier tokens and pick what matters for the next one.",
    ),
    (
        ["Who are you?", "What are you?", "Introduce yourself."],
        "I am a tiny demo model. I was trained in about an hour on two CPU cores, with text made by a script. I make mistakes.",
    ),
    (
        ["What can you do?", "How can you help me?", "Help"],
        "I can tell short stories, answer questions about them, add small numbers, and call tools.",
    ),
    (["Who made you?", "Who trained you?"], "I was trained by a small script that ships with this project."),
    (["What is your name?", "Do you have a name?"], "I do not have a name. I am a tiny demo model."),
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "hello there", "Hi there!", "Good evening"],
        "Hello! How can I help you today?",
    ),
    (
        ["How are you?", "How are you today?", "Hi, how are you?", "Hello, how are you?"],
        "I am fine, thank you. How can I help you?",
    ),
    (["Thank you", "Thanks!", "Thank you very much.", "thanks", "Great, thanks!"], "You are welcome!"),
    (["Goodbye", "Bye", "See you later", "Bye!", "Good night"], "Goodbye! Have a nice day."),
    (["What is Rust?"], "Rust is a programming language that is fast and checks memory safety when a program is built."),
    (["Why is the sky blue?"], "The sky is blue because the air scatters blue light more than red light."),
    (["What do plants need to grow?", "What does a plant need?"], "A plant needs light, water, air, and soil to grow."),
    (
        ["Where does rain come from?", "What makes rain?"],
        "Rain comes from clouds. Water rises from the sea, cools in the clouds, and falls as rain.",
    ),
    (["Why do we sleep?"], "We sleep so that the body and the brain can rest and recover."),
    (["How many legs does a spider have?"], "A spider has eight legs."),
    (["How many days are in a week?"], "There are seven days in a week."),
    (["How many months are in a year?"], "There are twelve months in a year."),
    (["How many hours are in a day?"], "There are twenty-four hours in a day."),
    (["What color is the sky?"], "The sky is blue."),
    (["What color is grass?"], "Grass is green."),
    (["What color is snow?"], "Snow is white."),
]
OUT_OF_SCOPE = """Who won the last world cup?|What is the meaning of life?|Write a Python program that sorts a list.|Write an essay about
history.|Translate this sentence to German.|Who is the president?|What is quantum physics?|Write a poem about love.|What is the stock
price today?|What is the news today?|How do I cook pasta?|Which phone should I buy?|What is the speed of light?|When did the war end?|Why
is the sky green?|What is the best movie?|How do airplanes fly?|How do I learn the guitar?|What is a black hole?|Write a letter to
my boss.|Summarize this book.|What is the square root of two?|Who wrote this song?|How old is the universe?|What is electricity?|What
should I eat tonight?|Plan a trip for me.|Write a SQL query.|How does a car engine work?|What is democracy?|How far is the moon?|Who
painted this picture?|What is the largest ocean?|Give me advice about money.|Explain the theory of relativity.|How deep is the
sea?|What is a good password?|Fix this code.|What is the population of the world?|Tell me a joke about computers.""".replace(
    "\n", " "
).split("|")


def paraphrase(rng, question):
    """The question as people type it: without capitals or question mark, or as "Explain ..."."""
    z = rng.random()
    if z < 0.12 and question.startswith("What is "):
        subject = question[len("What is ") :].rstrip("?")
        return rng.choice(
            [
                f"What's {subject}?",
                f"what's {subject}?",
                f"Explain {subject}.",
                f"Explain what {subject} is.",
                f"What is {subject}",
            ]
        )
    if z < 0.22:
        return question.lower()
    if z < 0.28:
        return question.lower().rstrip("?.!")
    return question
