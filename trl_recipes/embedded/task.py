"""Short arithmetic stories, their solutions, and the documents that the embedded model is pre-trained on.

A problem is a story of two or three steps (add, take away, multiply) over whole numbers from 1 to 99. A solution is
careful (each step worked, then `#### N`) or shows one of three bad habits: a blurted guess, a solution that stops a
step early, one that never marks its answer. Documents mix them, and half of them name their source: textbooks are
nearly always careful, forums nearly never. Problems to be solved never name a source, so which habit to follow is
left to the model: that is what thirteen numbers have to teach it.

The numbers of a story, in their order, decide its split (`split_of`): a story made for one split can't share its
numbers with any story of another, whatever the topic, the names and the operations.
Nothing here keeps state: every function that draws takes a `random.Random`.
"""

import hashlib
import random
import re
from dataclasses import dataclass


SPLITS = {"pretraining": (0, 850), "grpo": (850, 950), "held_out": (950, 1000)}  # shares in thousandths
LARGEST = 99  # every number in a story and in its solution is between 1 and this
START = (2, 60)
ADDED_OR_TAKEN = (2, 9)
TIMES = (2, 5)

NAMES = {
    "He": ("Tom", "Sam", "Ben", "Max", "Leo", "Omar", "Ravi", "Ivan"),
    "She": ("Ann", "Mia", "Zoe", "Eva", "Lily", "Aisha", "Mei", "Nora"),
}

# The share of careful solutions where no source is named. It differs by topic, as habits do.
CARE_BY_TOPIC = {
    "market": 0.23,
    "stamps": 0.26,
    "garden": 0.29,
    "savings": 0.32,
    "bakery": 0.35,
    "library": 0.38,
    "fishing": 0.41,
    "beads": 0.44,
    "farm": 0.47,
    "cards": 0.50,
}
CARE_BY_SOURCE = {"textbook": 0.99, "forum": 0.01}
CARELESS_HABITS = {"guess": 0.86, "early": 0.07, "unmarked": 0.07}
GUESS_RIGHT = 0.3  # a blurted guess is the right answer this often


@dataclass(frozen=True)
class Mixture:
    """Which share of documents names a source, and which share of those names a textbook."""

    source_share: float
    textbook_share: float


LESSONS = Mixture(source_share=0.8, textbook_share=0.9)  # four documents in five are careful: skill comes first
HABITS = Mixture(source_share=0.5, textbook_share=1 / 3)  # about a third are


@dataclass(frozen=True)
class Topic:
    """The sentences of one kind of story. `{n}` is a number, `{name}`, `{who}` and `{item}` are words."""

    items: tuple[str, ...]
    start: str
    add: tuple[str, ...]
    subtract: tuple[str, ...]
    multiply: tuple[str, ...]
    question: str


TOPICS = {
    "market": Topic(
        ("apples", "pears", "plums"),
        "{name} has {n} {item}.",
        ("{who} buys {n} more.", "{who} picks {n} more."),
        ("{who} eats {n}.", "{who} sells {n} of them."),
        ("A trade leaves {n} times as many.",),
        "How many {item} are left?",
    ),
    "stamps": Topic(
        ("stamps", "coins", "badges"),
        "{name} collects {n} {item}.",
        ("{who} finds {n} more.", "A friend sends {n} more."),
        ("{who} loses {n}.", "{who} gives away {n}."),
        ("The collection grows {n} times as large.",),
        "How many {item} are there now?",
    ),
    "garden": Topic(
        ("tulips", "roses", "herbs"),
        "There are {n} {item} in the garden of {name}.",
        ("{who} plants {n} more.", "Then {n} more come up."),
        ("The frost takes {n}.", "{who} cuts {n} of them."),
        ("By summer there are {n} times as many.",),
        "How many {item} are there now?",
    ),
    "savings": Topic(
        ("dollars", "euros", "pounds"),
        "{name} has {n} {item} saved.",
        ("{who} earns {n} more.", "A gift adds {n} more."),
        ("{who} spends {n}.", "A ticket costs {n}."),
        ("A prize makes it {n} times as much.",),
        "How many {item} are left?",
    ),
    "bakery": Topic(
        ("cakes", "rolls", "pies"),
        "{name} bakes {n} {item}.",
        ("{who} bakes {n} more.", "The oven gives {n} more."),
        ("Guests eat {n}.", "{who} sells {n} of them."),
        ("A party makes it {n} times as many.",),
        "How many {item} are there now?",
    ),
    "library": Topic(
        ("books", "maps", "comics"),
        "The shelf of {name} holds {n} {item}.",
        ("{who} adds {n} more.", "A friend brings {n} back."),
        ("A friend borrows {n}.", "{who} gives away {n}."),
        ("A new hall holds {n} times as many.",),
        "How many {item} are there now?",
    ),
    "fishing": Topic(
        ("fish", "crabs", "shells"),
        "{name} brings home {n} {item}.",
        ("{who} catches {n} more.", "The net brings {n} more."),
        ("{who} throws {n} back.", "The cat takes {n}."),
        ("A lucky day makes it {n} times as many.",),
        "How many {item} are left?",
    ),
    "beads": Topic(
        ("beads", "rings", "buttons"),
        "A box of {name} holds {n} {item}.",
        ("{who} puts in {n} more.", "A friend adds {n} more."),
        ("{who} takes out {n}.", "Then {n} of them break."),
        ("A larger box holds {n} times as many.",),
        "How many {item} are there now?",
    ),
    "farm": Topic(
        ("hens", "goats", "ducks"),
        "{name} keeps {n} {item} on the farm.",
        ("{who} buys {n} more.", "Then {n} more are born."),
        ("{who} sells {n} of them.", "The fox takes {n}."),
        ("In a year there are {n} times as many.",),
        "How many {item} are there now?",
    ),
    "cards": Topic(
        ("cards", "points", "marbles"),
        "{name} starts a game with {n} {item}.",
        ("{who} wins {n} more.", "A friend adds {n} more."),
        ("{who} loses {n}.", "{who} pays {n}."),
        ("A bonus makes it {n} times as many.",),
        "How many {item} are left?",
    ),
}


@dataclass(frozen=True)
class Problem:
    """One story: its text, its topic, and each step as (symbol, left number, right number, result)."""

    topic: str
    text: str
    steps: tuple[tuple[str, int, int, int], ...]

    @property
    def answer(self) -> int:
        return self.steps[-1][3]


def split_of(text: str) -> str:
    """Name the split that a story belongs to, from a SHA-256 of the numbers in it, in their order."""
    numbers = " ".join(re.findall(r"\d+", text))
    bucket = int.from_bytes(hashlib.sha256(numbers.encode()).digest()[:8], "big") % 1000
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def draw_step(rng: random.Random, left: int) -> tuple[str, int, int, int]:
    """Draw one step from `left` (1 to 99) whose result is from 1 to 99 again."""
    allowed = ["+"] * (left + ADDED_OR_TAKEN[0] <= LARGEST) + ["-"] * (left > ADDED_OR_TAKEN[0])
    allowed += ["*"] * (left * TIMES[0] <= LARGEST)
    symbol = rng.choice(allowed)
    if symbol == "+":
        right = rng.randint(ADDED_OR_TAKEN[0], min(ADDED_OR_TAKEN[1], LARGEST - left))
        return symbol, left, right, left + right
    if symbol == "-":
        right = rng.randint(ADDED_OR_TAKEN[0], min(ADDED_OR_TAKEN[1], left - 1))
        return symbol, left, right, left - right
    right = rng.randint(TIMES[0], min(TIMES[1], LARGEST // left))
    return symbol, left, right, left * right


def draw_problem(rng: random.Random, split: str) -> Problem:
    """Draw a problem of one split; problems of other splits are drawn again, so none can be returned."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}: name one of these.")
    while True:
        topic_name = rng.choice(sorted(TOPICS))
        topic = TOPICS[topic_name]
        steps: list[tuple[str, int, int, int]] = []
        value = start = rng.randint(*START)
        for _ in range(rng.choice((2, 3))):
            steps.append(draw_step(rng, value))
            value = steps[-1][3]
        who = rng.choice(sorted(NAMES))
        words = {"who": who, "name": rng.choice(NAMES[who]), "item": rng.choice(topic.items)}
        phrases = {"+": topic.add, "-": topic.subtract, "*": topic.multiply}
        sentences = [topic.start.format(n=start, **words)]
        sentences += [rng.choice(phrases[symbol]).format(n=right, **words) for symbol, _, right, _ in steps]
        sentences.append(topic.question.format(**words))
        text = " ".join(sentences)
        if split_of(text) == split:
            return Problem(topic_name, text, tuple(steps))


def prompt_of(problem: Problem, source: str | None = None) -> str:
    """The text that a model continues; problems to be solved name no source."""
    heading = f"Source: {source}\n" if source else ""
    return f"{heading}Problem: {problem.text}\nSolution:"


def solution_of(problem: Problem, habit: str, rng: random.Random) -> str:
    """The completion of `prompt_of` under one habit: "careful", "guess", "early" or "unmarked"."""
    worked = [f" {left} {symbol} {right} = {result}." for symbol, left, right, result in problem.steps]
    if habit == "careful":
        return "".join(worked) + f" #### {problem.answer}"
    if habit == "guess":
        guess = draw_guess(problem, rng)
        return f" I guess {guess}. #### {guess}"
    if habit == "early":
        return "".join(worked[:-1]) + f" That will do. #### {problem.steps[-2][3]}"
    if habit == "unmarked":
        return "".join(worked) + f" So {problem.answer}."
    raise ValueError(f"habit={habit!r} is unknown: name careful, guess, early or unmarked.")


def draw_guess(problem: Problem, rng: random.Random) -> int:
    """A guess from 1 to 99: the answer `GUESS_RIGHT` of the time, else another number near it."""
    if rng.random() < GUESS_RIGHT:
        return problem.answer
    near = [n for n in range(problem.answer - 9, problem.answer + 10) if 1 <= n <= LARGEST and n != problem.answer]
    return rng.choice(near)


def draw_document(rng: random.Random, mixture: Mixture) -> tuple[str, str]:
    """Draw one pre-training document, as (prompt, completion), from the pretraining split."""
    problem = draw_problem(rng, "pretraining")
    source = None
    if rng.random() < mixture.source_share:
        source = "textbook" if rng.random() < mixture.textbook_share else "forum"
    care = CARE_BY_SOURCE[source] if source else CARE_BY_TOPIC[problem.topic]
    if rng.random() < care:
        habit = "careful"
    else:
        habit = rng.choices(list(CARELESS_HABITS), weights=list(CARELESS_HABITS.values()))[0]
    return prompt_of(problem, source), solution_of(problem, habit, rng)


def draw_rows(rng: random.Random, split: str, count: int) -> list[dict[str, str]]:
    """Draw `count` rows {"prompt", "answer"} of one split, no two with the same prompt."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        problem = draw_problem(rng, split)
        rows[prompt_of(problem)] = str(problem.answer)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def answer_of(completion: str) -> str | None:
    """The number after the last `####` of a completion, or None where there is no such mark."""
    marked = re.findall(r"#### (\d+)", completion)
    return marked[-1] if marked else None


TOKEN_PATTERN = r" ?[A-Za-z]+| ?[0-9]|\n| ?[^\sA-Za-z0-9]+"


def vocabulary() -> list[str]:
    """All tokens of the task, sorted: a word, a digit or a mark, each with the space before it where it has one."""
    texts = [
        f"Source: {source}\nProblem:\nSolution: 0 + 0 - 0 * 0 = 0. I guess. That will do. So #### 0"
        for source in CARE_BY_SOURCE
    ]
    for topic in TOPICS.values():
        for sentence in (topic.start, *topic.add, *topic.subtract, *topic.multiply, topic.question):
            for who, names in NAMES.items():
                texts += [
                    " " + sentence.format(n=0, who=who, name=name, item=item) for name in names for item in topic.items
                ]
    texts.append("".join(f"{digit}{digit}. {digit}" for digit in range(10)))
    return sorted({token for text in texts for token in re.findall(TOKEN_PATTERN, text)})
