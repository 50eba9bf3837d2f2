r"""Two bare answers -> whether they are equal.

Read in turn, and the first that can read both decides: as text, as quantities (an exact fraction, and a unit where one is
given), as lists, as words, and as LaTeX by math_verify (latex_equality.py). Nothing is rounded here: 0.33 is not 1/3; and
nothing is worked out where the true answer is a quantity: 9*2 is not 18, nor 2^{10} 1024.

    a unit       may be missing on one side (GSM8K's answers are bare numbers): "72 apples" and "$72" are 72. Two units of
                 one kind are converted, 1 hour is 60 minutes, and 5 cm is not 5 m.
    a percentage is its number of hundredths, or, against a bare number, that number: 50% is 0.5, and 50.
    a list       has no order unless one of the two has brackets: "1, 2" is "2, 1", and (1, 2) is neither (2, 1) nor "2, 1".
"""

import re
from dataclasses import replace

from trl_recipes.latex_equality import latex_agrees
from trl_recipes.quantities import Quantity, is_unit, read_quantity


MOST_CHARACTERS = 500  # a longer answer is equal as text only; no benchmark has one
MOST_ITEMS = 30  # of a list
WRAPPERS = re.compile(
    r"^(?:\*\*?|__|`)?(?:\$\$?(?P<a>[^$]+)\$\$?|\\\((?P<b>.+)\\\)|\\\[(?P<c>.+)\\\])(?:\*\*?|__|`)?$", re.DOTALL
)
SPACES = re.compile(r"(?<!\\)\\[ ,;:]|\\q?quad\b|~|\s+")
NOTHING = re.compile(
    r"\\!|\\displaystyle|\\(?:left|right)(?![a-zA-Z])|\\(?:[bB]igg?[lr]?)(?![a-zA-Z])|(?<=\d)\\,(?=\d{3})"
)
FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|operatorname)\s*\{([^{}]*)\}")
DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\N{DEGREE SIGN}|\\degree\b")
COMMAND = re.compile(r"\\[a-zA-Z]+")
WORD = re.compile(r"[A-Za-z]{2,}")
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi max min lim mod gcd lcm frac begin end "
    "pmatrix bmatrix matrix vmatrix array cases".split()
)
# What models write in Unicode or as in a programming language.
SPELLINGS = {
    **{"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{INFINITY}": r"\infty ", "\N{GREEK SMALL LETTER PI}": r"\pi "},
    **{"\N{SUPERSCRIPT TWO}": "^2", "\N{SUPERSCRIPT THREE}": "^3", "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}"},
    **{"\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}", "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}"},
    **{r"\varnothing": r"\emptyset", "\N{EMPTY SET}": r"\emptyset", "\N{IDEOGRAPHIC FULL STOP}": "."},
    **{"{,}": ",", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\$": "$", r"\%": "%"},
}
ROOT = re.compile(r"(?:\N{SQUARE ROOT}|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|(\w+))")
ABOUT = re.compile(r"^(?:\\approx\b|\\sim\b|\N{ALMOST EQUAL TO}|=)\s*")
CHOICE = re.compile(r"^[({]?\s*([A-J])\s*[)}]?(?:[.:)]|$)\s*(.*)$", re.DOTALL)
BRACKETS = {"(": ")]", "[": ")]", r"\{": (r"\}",)}
AND_OR = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")
THOUSANDS_IN_LIST = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?=, |$)")
VARIABLE = re.compile(
    r"^(?:m?\\angle\s*)?\\?[A-Za-z](?:_\{?\w{1,5}\}?|\w{0,15})'?(?:\(\w\))?\s*(?:=|\\in\b)\s*(?=[^=]*$)"
)
MALFORMED = re.compile(r"--|\+\+|(?:^|[^_^\d])\d+ \d")  # which math_verify reads as something
ARITHMETIC = re.compile(
    r"^(?=[^=]*\d\s*(?:[+\-*/×÷]|\\times|\\cdot|\\div))(?:[\d\s.,+\-*/×÷()$%]|\\times|\\cdot|\\div)+=\s*(?=[^=]*$)"
)
UNIT_BEHIND = re.compile(r"(?<=[^\s,])\s*\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}(?:\s*\^\{?[23]\}?)?$")
IN_BASE = re.compile(r"^([0-9A-F]+)_\{?(\d+)\}?$")
LETTER = re.compile(r"[A-Za-z]")


def answers_agree(found: str, gold: str) -> bool:
    """Says whether two bare answers are equal; see the module's docstring."""
    found, gold = normalise(found), normalise(gold)
    if found == gold:
        return True
    if not found or not gold or max(len(found), len(gold)) > MOST_CHARACTERS:
        return False
    found, gold = without_label(found, gold), without_label(gold, found)
    plain_found, plain_gold = unwrap(found), unwrap(gold)
    if squeezed(plain_found) == squeezed(plain_gold):
        return True
    quantity, gold_quantity = read_quantity(plain_found), read_quantity(plain_gold)
    if gold_quantity is not None:  # then a sum, a power or a list that comes to it is work left undone
        return quantity is not None and quantity.agrees(gold_quantity)
    in_base, gold_in_base = IN_BASE.match(squeezed(plain_found)), IN_BASE.match(squeezed(plain_gold))
    if in_base is not None and gold_in_base is not None:
        return in_base.groups() == gold_in_base.groups()
    verdict = lists_agree(plain_found, plain_gold)
    if verdict is not None:
        return verdict
    if is_words(plain_found) or is_words(plain_gold):
        return words_of(plain_found) == words_of(plain_gold)
    return expressions_agree(found, gold)


def normalise(answer: str) -> str:
    """Drops what does not change an answer: dollars and asterisks around it, sizes of brackets, kinds of minus and space."""
    answer = ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", answer)
    answer = NOTHING.sub("", answer)
    for spelling, usual in SPELLINGS.items():
        answer = answer.replace(spelling, usual)
    answer = SPACES.sub(" ", answer).strip(' *`"').rstrip(".").strip()
    wrapped = WRAPPERS.match(answer)
    if wrapped is not None:
        answer = next(group for group in wrapped.groups() if group is not None).strip().rstrip(".").strip()
    answer = ABOUT.sub("", DEGREES.sub(" degrees", answer).strip(' *`"'))
    return re.sub(r"^(?:\{([^{}]*)\}|\[([^][,]*)\])$", r"\1\2", answer)


def quantity_of(answer: str) -> Quantity | None:
    """Reads a number, with or without a unit; None for anything else."""
    return read_quantity(unwrap(normalise(answer)))


def has_words(text: str) -> bool:
    """Whether there are words in it that are no mathematics."""
    return any(word.lower() not in FUNCTIONS for word in WORD.findall(COMMAND.sub(" ", text)))


def unwrap(answer: str) -> str:
    r"""Takes `\text{...}` and its like off, with a space on both sides."""
    return FONT.sub(r" \1 ", answer).strip()


def squeezed(answer: str) -> str:
    """What two spellings of one answer have in common: no spaces but between digits, and no braces around one character."""
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer))


def without_label(answer: str, other: str) -> str:
    """Drops what may stand on one side only: a variable (x = 5), the letter of a choice (C) 5, a sum before its result."""
    if "=" not in other and r"\in" not in other:
        answer = ARITHMETIC.sub("", VARIABLE.sub("", answer))
    choice, of_other = CHOICE.match(unwrap(answer)), CHOICE.match(unwrap(other))
    if choice is None:
        return answer
    letter, rest = choice.groups()
    if of_other is not None and not of_other[2]:
        return letter
    return unwrap(answer) if not rest else rest if read_quantity(rest) is not None else answer


def is_words(answer: str) -> bool:
    """Whether an answer is a word or several, such as "Evelyn" or "not enough information"; AB and xy are not."""
    return (
        re.fullmatch(r"[A-Za-z][A-Za-z' -]*[A-Za-z]\)?", answer.lstrip("(")) is not None
        and has_words(answer)
        and (len(answer) > 3 or answer.lower() in ("yes", "no", "odd", "one", "two", "six", "ten"))
    )


def words_of(answer: str) -> str:
    """Words as they are compared: no case, no spaces, no article."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(?:the|a|an) ", "", answer.lower()))


def lists_agree(found: str, gold: str) -> bool | None:
    """Compares two lists item by item, in any order where neither has brackets other than braces; None where they are none."""
    (items, brackets), (gold_items, gold_brackets) = items_of(found), items_of(gold)
    if min(len(items), len(gold_items)) < 2 or max(len(items), len(gold_items)) > MOST_ITEMS:
        return None
    if r"\pm" in found + gold:  # an item may be several
        return None
    if len(items) != len(gold_items) or (brackets and gold_brackets and brackets != gold_brackets):
        return False
    if {brackets, gold_brackets} - {"", r"\{\}"}:
        return all(answers_agree(item, gold_item) for item, gold_item in zip(items, gold_items, strict=True))
    left = list(gold_items)
    for item in items:
        match = next((gold_item for gold_item in left if answers_agree(item, gold_item)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def items_of(answer: str) -> tuple[list[str], str]:
    """Splits a list at its outer commas and "and": its items and its brackets; one item where it is no list."""
    brackets = ""
    for opening, closings in BRACKETS.items():
        closing = next((closing for closing in closings if answer.endswith(closing)), None)
        if closing is not None and answer.startswith(opening) and encloses(answer[len(opening) : -len(closing)]):
            answer, brackets = answer[len(opening) : -len(closing)], opening + closing
            break
    answer = AND_OR.sub(", ", answer)
    if ", " in answer:  # then the other commas are those of thousands
        answer = THOUSANDS_IN_LIST.sub(lambda number: number.group().replace(",", ""), answer)
    items, depth, start = [], 0, 0
    for position, character in enumerate(answer):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ",;":
            items.append(answer[start:position].strip())
            start = position + 1
    items.append(answer[start:].strip())
    return [item for item in items if item], brackets


def encloses(inside: str) -> bool:
    """Whether the brackets around this belong together: (1, 2) and not (1, 2), (3, 4)."""
    depth = 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def expressions_agree(found: str, gold: str) -> bool:
    """Compares two expressions by math_verify, where both are mathematics throughout."""
    found, gold = as_latex(found), as_latex(gold)
    if not found or not gold or MALFORMED.search(found) or found.count("=") > max(1, gold.count("=")):
        return False
    if has_words(found) or has_words(gold):
        if letters_of(found) != letters_of(gold):
            return False
        found, gold = braced(found), braced(gold)  # xy is x times y where both sides are made of the same letters
    return squeezed(found) == squeezed(gold) or latex_agrees(found, gold)


def letters_of(text: str) -> set[str]:
    """The letters in it that are no command's."""
    return set(LETTER.findall(COMMAND.sub(" ", text)))


def braced(text: str) -> str:
    """Letters as factors, in braces: math_verify takes "hr" for hours, and "ac" at the end of a term for a unit."""
    return re.sub(
        r"(?<![\\A-Za-z])[A-Za-z]+(?!\s*_)",
        lambda run: run[0] if run[0] in {"e", "i", *FUNCTIONS} else "".join(f"{{{letter}}}" for letter in run[0]),
        text,
    )


def as_latex(answer: str) -> str:
    r"""What math_verify reads well: no unit behind, "and" and "or" as commas, a number as a number."""
    quantity = read_quantity(unwrap(answer))
    if quantity is not None and "=" not in answer:
        return str(replace(quantity, unit=None))
    answer = AND_OR.sub(",", answer)
    answer = UNIT_BEHIND.sub(lambda unit: "" if is_unit(unit[1].strip()) else unit[0], answer)
    answer = re.sub(r"(?<=[\w)}]) ?degrees\b", "", answer)
    answer = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", unwrap(answer))
    return answer.replace("$", "").replace("%", r"\%").replace("**", "^").replace("*", r" \cdot ").strip()
