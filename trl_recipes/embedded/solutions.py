"""Write worked solutions of the training problems, for SFT, in two styles.

    python -m trl_recipes.embedded.solutions

`data/sft_own_style.jsonl` has the solutions that the base model itself writes where it is careful (equations).
`data/sft_other_style.jsonl` has solutions as right as those in prose, worded now one way and now another: words that the
base knows, in sentences that it has never seen, which is what human text is to a model. Rows are {"prompt", "answer",
"completion"}, in the order of `data/grpo_train.jsonl` and for exactly its problems.
"""

import json
import random
import re
from pathlib import Path

from trl_recipes.embedded import task


DATA = Path(__file__).parent / "data"
FILES = {"own": "sft_own_style.jsonl", "other": "sft_other_style.jsonl"}

# The other style. Each word of it is in the vocabulary; no sentence is in a pre-training document.
OPENINGS = (" There are {start}.", " The game starts with {start}.", " {start} in the box.", " The box holds {start}.")
WORDED_STEPS = {
    "+": (
        " Then {right} more makes {result}.",
        " {result} with the {right} new.",
        " There are {result} as {right} come in.",
    ),
    "-": (
        " Then {right} are out. {result} are left.",
        " That leaves {result} as {right} are away.",
        " {result} are there with {right} out.",
    ),
    "*": (
        " {right} times {left} makes {result}.",
        " By {right} times it grows. {result} now.",
        " Then {result} as it grows {right} times larger.",
    ),
}
CLOSINGS = ("", " That makes it {answer}.", " There are {answer} now.")


def read_problem(prompt: str) -> task.Problem:
    """The problem that a prompt of `task.prompt_of` holds: its text determines its topic and its steps."""
    text = prompt.removeprefix("Problem: ").removesuffix("\nSolution:")
    shape = re.sub(r"\d+", "{n}", text)
    name, start = read_start(shape)
    topic = task.TOPICS[name]
    symbols = {
        phrase.replace("{who}", who): symbol
        for symbol, phrases in (("+", topic.add), ("-", topic.subtract), ("*", topic.multiply))
        for phrase in phrases
        for who in task.NAMES
    }
    value, *numbers = [int(number) for number in re.findall(r"\d+", text)]
    sentences = re.findall(r"[^.?]+\.", shape.removeprefix(start))
    steps = []
    for sentence, right in zip(sentences, numbers, strict=True):
        symbol = symbols[sentence.strip()]
        result = {"+": value + right, "-": value - right, "*": value * right}[symbol]
        steps.append((symbol, value, right, result))
        value = result
    return task.Problem(name, text, tuple(steps))


def read_start(shape: str) -> tuple[str, str]:
    """The topic of a story, and its first sentence; both of the story's text with `{n}` for each number."""
    people = [person for names in task.NAMES.values() for person in names]
    for name, topic in task.TOPICS.items():
        for person in people:
            for item in topic.items:
                start = topic.start.format(n="{n}", name=person, item=item)
                if shape.startswith(start):
                    return name, start
    raise ValueError(f"no topic has a story that starts like {shape!r}: pass a prompt of task.prompt_of.")


def solution_in_other_style(problem: task.Problem, rng: random.Random) -> str:
    """A right solution in prose, its sentences drawn at random, that marks its answer."""
    sentences = [rng.choice(OPENINGS).format(start=problem.steps[0][1])]
    sentences += [
        rng.choice(WORDED_STEPS[symbol]).format(left=left, right=right, result=result)
        for symbol, left, right, result in problem.steps
    ]
    sentences.append(rng.choice(CLOSINGS).format(answer=problem.answer))
    return "".join(sentences) + f" #### {problem.answer}"


def solved_rows(rows: list[dict[str, str]], style: str) -> list[dict[str, str]]:
    """Adds a "completion" in one style, "own" or "other", to rows {"prompt", "answer"}; the same ones each time."""
    rng = random.Random(f"0 {style}")
    solved = []
    for row in rows:
        problem = read_problem(row["prompt"])
        if style == "own":
            completion = task.solution_of(problem, "careful", rng)
        else:
            completion = solution_in_other_style(problem, rng)
        solved.append(row | {"completion": completion})
    return solved


def main() -> None:
    """Writes the problems of GRPO with a worked solution each, a file for each style."""
    rows = [json.loads(line) for line in (DATA / "grpo_train.jsonl").read_text().splitlines()]
    for style, name in FILES.items():
        (DATA / name).write_text("".join(json.dumps(row) + "\n" for row in solved_rows(rows, style)))
        print(f"wrote {DATA / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
