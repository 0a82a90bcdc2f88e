"""The toy universe in text: everything that can be said in it, and what its language model knows.

Four kinds of utterance: questions with one right answer, sentences with a German translation,
sentences with an emotion, and random strings of words (for the speech recogniser alone).
`sentences()` lists all but the last with their references, `reply()` is the language model's
knowledge: what a helpful assistant answers to an utterance under a system instruction.

Read next: make.py, which speaks it, and trains a tiny Llama and a tiny Whisper on it.
"""

import dataclasses
import itertools
import random
import re


def pairs(text: str) -> list[tuple[str, str]]:
    """'a b, c d' -> [(a, b), (c, d)]"""
    return [tuple(pair.split()) for pair in text.split(",")]


NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
OPPOSITES = pairs(
    "big small, hot cold, old young, fast slow, happy sad, good bad, light dark, hard soft, "
    "high low, rich poor, full empty, long short, early late, strong weak, clean dirty, "
    "loud quiet, open closed, wet dry"
)
CAPITALS = pairs(
    "france paris, spain madrid, italy rome, germany berlin, england london, greece athens, "
    "egypt cairo, japan tokyo, china beijing, russia moscow, norway oslo, austria vienna, "
    "cuba havana, poland warsaw, kenya nairobi, portugal lisbon"
)
COLOURS = pairs(
    "grass green, snow white, milk white, blood red, coal black, gold yellow, chocolate brown, "
    "water blue, butter yellow, coffee brown, salt white, cheese yellow"
)
SOUNDS = pairs(
    "dog woof, cat meow, cow moo, duck quack, sheep baa, pig oink, bird tweet, mouse squeak, "
    "lion roar, horse neigh"
)
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

# English noun: German noun with the articles of its nominative and its accusative.
NOUNS = {
    "cat": ("die katze", "die katze"),
    "dog": ("der hund", "den hund"),
    "house": ("das haus", "das haus"),
    "car": ("das auto", "das auto"),
    "man": ("der mann", "den mann"),
    "woman": ("die frau", "die frau"),
    "child": ("das kind", "das kind"),
    "bird": ("der vogel", "den vogel"),
    "book": ("das buch", "das buch"),
    "horse": ("das pferd", "das pferd"),
    "cow": ("die kuh", "die kuh"),
    "teacher": ("der lehrer", "den lehrer"),
    "garden": ("der garten", "den garten"),
    "mouse": ("die maus", "die maus"),
}
ADJECTIVES = {
    "big": "groß",
    "small": "klein",
    "old": "alt",
    "good": "gut",
    "fast": "schnell",
    "slow": "langsam",
    "strong": "stark",
    "clean": "sauber",
    "dirty": "schmutzig",
    "quiet": "leise",
}
TRANSITIVE = {"see": "sehe", "like": "mag", "have": "habe", "know": "kenne", "want": "will"}
INTRANSITIVE = {"sleeps": "schläft", "runs": "läuft", "sings": "singt", "works": "arbeitet"}
ANIMATE = [n for n in NOUNS if n not in ("house", "car", "book", "garden")]

LABELS = "Anger Disgust Fear Joy Neutral Sadness Surprise".split()  # those of MELD
THINGS = "car book house garden money bread phone bag".split()
FEELINGS = {  # what is said, and what a helpful assistant answers
    "Anger": [
        ("you broke my {}", "sorry that i broke your {}"),
        ("you stole my {}", "sorry that i stole your {}"),
        ("do not touch my {}", "okay i do not touch your {}"),
        ("give back my {}", "okay i give back your {}"),
    ],
    "Sadness": [
        ("i lost my {}", "sorry to hear that you lost your {}"),
        ("i miss my {}", "sorry to hear that you miss your {}"),
        ("my {} is gone", "sorry to hear that your {} is gone"),
        ("i cry for my {}", "sorry to hear that you cry for your {}"),
    ],
    "Joy": [
        ("i love my new {}", "great that you love your new {}"),
        ("i won a new {}", "great that you won a new {}"),
        ("my {} makes me smile", "great that your {} makes you smile"),
        ("what a lovely {}", "yes it is a lovely {}"),
    ],
    "Surprise": [
        ("wow is this my {}", "yes this is your {}"),
        ("wow a free {}", "yes it is a free {}"),
        ("i never expected a {}", "oh you never expected a {}"),
        ("wow what a {}", "yes it is quite a {}"),
    ],
    "Disgust": [
        ("your {} smells awful", "sorry that my {} smells awful"),
        ("yuck my {} is rotten", "oh no your {} is rotten"),
        ("yuck what a {}", "oh no what an awful {}"),
        ("this {} stinks", "oh no this {} stinks"),
    ],
    "Fear": [
        ("help my {} burns", "stay calm your {} burns"),
        ("i am scared of the {}", "do not be scared of the {}"),
        ("a ghost is in my {}", "there is no ghost in your {}"),
        ("i fear the {}", "do not fear the {}"),
    ],
    "Neutral": [
        ("the {} is here", "okay the {} is here"),
        ("there is a {}", "okay there is a {}"),
        ("this is a {}", "okay this is a {}"),
        ("i bring the {}", "okay you bring the {}"),
    ],
}

# The paper's own instructions; no clip is ever paired with one of them in training.
PROMPTS = {
    "spoken_qa": ("You are a helpful assistant. Give your answers as a simple single sentence."),
    "translation": "Translate the input from English to German.",
    "emotion": (
        "Respond in a single word what emotion the input exhibits. "
        "If there is no clear emotion, respond 'Neutral'."
    ),
    "repeat": "Repeat the input.",
}
# Further instructions that the LLM is trained to follow; none of them is evaluated.
MORE_PROMPTS = {
    "first": "Say the first word of the input.",
    "last": "Say the last word of the input.",
    "twice": "Say the input twice.",
    "count": "Count the words of the input.",
    "question": "Say yes if the input is a question, else no.",
}
INSTRUCTIONS = PROMPTS | MORE_PROMPTS


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One thing that can be said, and what there is to say about it."""

    text: str
    task: str  # spoken_qa, translation, emotion, or words: random ones
    answer: str  # the task's reference
    kind: str  # within the task
    reply: str  # of a helpful assistant: a sentence of four to nine words


def sentences() -> list[Sentence]:
    """All of them, in a fixed order, each text once."""
    found = [*_questions(), *_translations(), *_emotions()]
    assert len({s.text for s in found}) == len(found)
    return found


def _questions() -> list[Sentence]:
    n = NUMBERS
    sums = [(f"{n[a]} plus {n[b]}", n[a + b]) for a in range(13) for b in range(13) if a + b <= 20]
    differences = [
        (f"{n[a]} minus {n[b]}", n[a - b]) for a in range(21) for b in range(min(a, 10) + 1)
    ]
    neighbours = [pair for seq in (n, DAYS) for pair in itertools.pairwise(seq)]
    kinds = {  # question, answer, and the answer as a sentence
        "sum": [(f"what is {a}", b, f"{a} is {b}") for a, b in sums],
        "difference": [(f"what is {a}", b, f"{a} is {b}") for a, b in differences],
        "opposite": [
            (f"what is the opposite of {a}", b, f"the opposite of {a} is {b}")
            for p in OPPOSITES for a, b in (p, p[::-1])
        ],
        "capital": [
            (f"what is the capital of {a}", b, f"the capital of {a} is {b}") for a, b in CAPITALS
        ],
        "country": [(f"where is {b}", a, f"{b} is in {a}") for a, b in CAPITALS],
        "colour": [(f"what colour is {a}", b, f"the colour of {a} is {b}") for a, b in COLOURS],
        "sound": [(f"what does the {a} say", b, f"the {a} says {b}") for a, b in SOUNDS],
        "next": [
            (f"what comes after {a}", b, f"after {a} comes {b}")
            for a, b in (*neighbours, (DAYS[-1], DAYS[0]))
        ],
        "before": [(f"what comes before {b}", a, f"before {b} comes {a}") for a, b in neighbours],
    }  # fmt: skip
    return [Sentence(q, "spoken_qa", a, k, r) for k, rows in kinds.items() for q, a, r in rows]


def _translations() -> list[Sentence]:
    kinds = {  # English, German, and the reply
        "is": [
            (f"the {n} is {a}", f"{NOUNS[n][0]} ist {ADJECTIVES[a]}", f"so the {n} is {a}")
            for n in NOUNS for a in ADJECTIVES
        ],
        "does": [
            (f"the {n} {v}", f"{NOUNS[n][0]} {INTRANSITIVE[v]}", f"so the {n} {v}")
            for n in ANIMATE for v in INTRANSITIVE
        ],
        "i": [
            (f"i {v} the {n}", f"ich {TRANSITIVE[v]} {NOUNS[n][1]}", f"so you {v} the {n}")
            for n in NOUNS for v in TRANSITIVE
        ],
    }  # fmt: skip
    return [Sentence(e, "translation", g, k, r) for k, rows in kinds.items() for e, g, r in rows]


def _emotions() -> list[Sentence]:
    return [
        Sentence(said.format(thing), "emotion", label, label, answer.format(thing))
        for label, patterns in FEELINGS.items()
        for said, answer in patterns
        for thing in THINGS
    ]


def reply(sentence: Sentence, instruction: str | None) -> str:
    """What the language model answers to `sentence` under INSTRUCTIONS[instruction] (None: none).

    Asked for a translation that it does not know or an emotion that is not there, it says so.
    """
    words, asked = sentence.text.split(), sentence.task == "spoken_qa"
    answers = {
        "spoken_qa": sentence.answer if asked else sentence.reply,
        "translation": sentence.answer if sentence.task == "translation" else "unknown",
        "emotion": sentence.answer if sentence.task == "emotion" else "Neutral",
        "repeat": sentence.text,
        "first": words[0],
        "last": words[-1],
        "twice": f"{sentence.text} {sentence.text}",
        "count": NUMBERS[len(words)],
        "question": "yes" if asked else "no",
        None: sentence.reply,
    }
    return answers[instruction]


def spoken_words() -> list[str]:
    """Every word that is ever spoken, sorted."""
    return sorted({word for s in sentences() for word in s.text.split()})


def written_words() -> list[str]:
    """Every word of the language model: spoken ones, answers, instructions, labels."""
    texts = [
        f"{s.text} {s.answer} {s.reply}" for s in (*sentences(), random_words(random.Random(0)))
    ]
    texts += [*LABELS, "unknown", "yes", "no"]
    texts += [re.sub(r"([.,'])", r" \1 ", prompt) for prompt in INSTRUCTIONS.values()]
    return sorted({word.lower() for text in texts for word in text.split()})


def random_words(rng: random.Random) -> Sentence:
    """Two to five random words: speech that cannot be guessed from the words before."""
    text = " ".join(rng.choices(spoken_words(), k=rng.randint(2, 5)))
    return Sentence(text, "words", "", "words", f"did you say {text}")
