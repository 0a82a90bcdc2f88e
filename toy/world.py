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
FEELINGS = {
    "Anger": ["you broke my {}", "you stole my {}", "do not touch my {}", "give back my {}"],
    "Sadness": ["i lost my {}", "i miss my {}", "my {} is gone", "i cry for my {}"],
    "Joy": ["i love my new {}", "i won a new {}", "my {} makes me smile", "what a lovely {}"],
    "Surprise": ["wow is this my {}", "wow a free {}", "i never expected a {}", "wow what a {}"],
    "Disgust": ["your {} smells awful", "yuck my {} is rotten", "yuck what a {}", "this {} stinks"],
    "Fear": ["help my {} burns", "i am scared of the {}", "a ghost is in my {}", "i fear the {}"],
    "Neutral": ["the {} is here", "there is a {}", "this is a {}", "i bring the {}"],
}
COMMENTS = {
    "Anger": "please calm down",
    "Sadness": "sorry to hear that",
    "Joy": "great",
    "Surprise": "really",
    "Disgust": "that sounds awful",
    "Fear": "stay calm",
    "Neutral": "okay",
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


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One thing that can be said: text, task, reference, and its kind within the task."""

    text: str
    task: str  # spoken_qa, translation or emotion
    answer: str
    kind: str


def sentences() -> list[Sentence]:
    """All of them, in a fixed order, each text once."""
    found = [*_questions(), *_translations(), *_emotions()]
    assert len({s.text for s in found}) == len(found)
    return found


def _questions() -> list[Sentence]:
    n = NUMBERS
    sums = [(f"what is {n[a]} plus {n[b]}", n[a + b]) for a in range(13) for b in range(13)
            if a + b <= 20]  # fmt: skip
    differences = [(f"what is {n[a]} minus {n[b]}", n[a - b]) for a in range(21)
                   for b in range(min(a, 10) + 1)]  # fmt: skip
    kinds = {
        "sum": sums,
        "difference": differences,
        "opposite": [
            (f"what is the opposite of {a}", b) for p in OPPOSITES for a, b in (p, p[::-1])
        ],
        "capital": [(f"what is the capital of {a}", b) for a, b in CAPITALS],
        "country": [(f"where is {b}", a) for a, b in CAPITALS],
        "colour": [(f"what colour is {a}", b) for a, b in COLOURS],
        "sound": [(f"what does the {a} say", b) for a, b in SOUNDS],
        "next": [(f"what comes after {a}", b) for seq in (n, [*DAYS, DAYS[0]])
                 for a, b in itertools.pairwise(seq)],
        "before": [(f"what comes before {b}", a) for seq in (n, DAYS)
                   for a, b in itertools.pairwise(seq)],
    }  # fmt: skip
    return [Sentence(q, "spoken_qa", a, kind) for kind, qa in kinds.items() for q, a in qa]


def _translations() -> list[Sentence]:
    be = [
        (f"the {n} is {a}", f"{NOUNS[n][0]} ist {ADJECTIVES[a]}") for n in NOUNS for a in ADJECTIVES
    ]
    do = [
        (f"the {n} {v}", f"{NOUNS[n][0]} {INTRANSITIVE[v]}") for n in ANIMATE for v in INTRANSITIVE
    ]
    see = [
        (f"i {v} the {n}", f"ich {TRANSITIVE[v]} {NOUNS[n][1]}") for n in NOUNS for v in TRANSITIVE
    ]
    kinds = {"is": be, "does": do, "i": see}
    return [Sentence(e, "translation", g, kind) for kind, eg in kinds.items() for e, g in eg]


def _emotions() -> list[Sentence]:
    return [
        Sentence(pattern.format(thing), "emotion", label, label)
        for label, patterns in FEELINGS.items()
        for pattern in patterns
        for thing in THINGS
    ]


def reply(sentence: Sentence, instruction: str | None) -> str:
    """What the language model answers to `sentence` under PROMPTS[instruction] (None: none).

    Asked for a translation that it does not know or an emotion that is not there, it says so.
    """
    if instruction == "repeat":
        return sentence.text
    if instruction == "translation":
        return sentence.answer if sentence.task == "translation" else "unknown"
    if instruction == "emotion":
        return sentence.answer if sentence.task == "emotion" else "Neutral"
    if sentence.task == "spoken_qa":
        return sentence.answer
    return COMMENTS[sentence.answer if sentence.task == "emotion" else "Neutral"]


def spoken_words() -> list[str]:
    """Every word that is ever spoken, sorted."""
    return sorted({word for s in sentences() for word in s.text.split()})


def written_words() -> list[str]:
    """Every word of the language model: spoken ones, answers, instructions, labels."""
    texts = [s.text + " " + s.answer for s in sentences()]
    texts += [*COMMENTS.values(), *LABELS, "unknown"]
    texts += [p.replace(".", " .").replace(",", " ,").replace("'", " ' ") for p in PROMPTS.values()]
    return sorted({word.lower() for text in texts for word in text.split()})


def random_words(rng: random.Random) -> str:
    """Two to five random words: speech that cannot be guessed from the words before."""
    return " ".join(rng.choices(spoken_words(), k=rng.randint(2, 5)))
