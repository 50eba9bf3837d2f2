r"""A text -> the answer in it, twice: strictly, as training rewards it, and leniently, as a reader would find it.

    strict     what the text marks: the line after its last `####` (GSM8K's mark) that begins no heading, or the inside of
               its last balanced `\boxed{}`, whichever comes last. A text with neither has no answer: a model that computes the right
               number and does not say which one it is has not solved the problem, and is told so.
    lenient    the strict answer; without one, what follows "A:", "Answer:" or "the answer is"; without that, the last
               number of the text.

How much of a model's accuracy is finding the mark, and how much is the arithmetic, is the difference between the two.
Whether two answers are equal is [`equal_answers`]'s business.
"""

import re

from trl_recipes.equal_answers import answers_agree, has_words, quantity_of
from trl_recipes.errors import RecipeError


ANSWER_MARK = "####"
# `####` is a heading of Markdown too.
HEADING = re.compile(
    r"^\W*(?:step|part|case|method|problem|question|example)\b|^\W*\d{1,2}[.)]\s+[A-Za-z]|:\W*$", re.IGNORECASE
)
LABEL = re.compile(r"^[*_\s]*(?:the\s+)?(?:final\s+)?answer[*_\s]*(?::|=|$)[*_\s]*", re.IGNORECASE)
LONGEST_LINE = 500  # characters; a longer one is no answer to any problem
BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[{}]|[{}]")
MOST_READ = 20_000  # characters at the end of a text in which an unmarked answer is looked for
SAID = re.compile(
    r"(?P<short>^\W{0,8}A\W{0,4}:)|\banswer\b(?:\W{0,8}[:=]|[^\n:=.]{0,60}?\b(?:is|be)\b)[\s*_:=]*",
    re.IGNORECASE | re.MULTILINE,
)
LONGEST_PHRASE = 300  # characters
MATH = re.compile(
    r"\$\$(?P<a>[^$]{1,300})\$\$|\$(?! )(?P<b>[^$\n]{1,300})(?<! )\$(?!\d)|\\\((?P<c>.{1,300}?)\\\)|\\\[(?P<d>.{1,300}?)\\\]",
    re.DOTALL,
)
END_OF_PHRASE = re.compile(r"[.;!](?:\s|$)|\n|,? \b(?:because|since|as|so|which|where|when|after|for)\b")
LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-\N{MINUS SIGN}])?(?:\\?[$£€¥])?(?:\\[dt]?frac\{-?\d{1,50}\}\{\d{1,50}\}"
    r"|(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d{1,100})(?:\.\d{1,100})?(?:/\d{1,50})?|\.\d{1,100})(?: ?\\?%)?"
)
STARTS_AS_NUMBER = re.compile(r"\W{0,4}\d")
SHORT_PHRASE = 4  # words; a longer one without a number is not an answer


def is_correct(text: str, gold: str | int | float, lenient: bool = False) -> bool:
    """Says whether the answer of `text` equals `gold`, itself a bare answer or a whole solution."""
    found = lenient_answer(text) if lenient else strict_answer(text)
    return found is not None and answers_agree(found, gold_answer(gold))


def gold_answer(gold: str | int | float) -> str:
    """Returns the bare true answer: what a solution marks, or the value itself where it marks nothing.

    Raises:
        RecipeError: if there is none.
    """
    if gold is None:
        raise RecipeError("a true answer is missing (None): drop such rows from the dataset.")
    text = str(gold).strip()
    marked = strict_answer(text)
    return text if marked is None else marked


def strict_answer(text: str) -> str | None:
    r"""Returns what the text marks: the line of its last `####` or its last `\boxed{}`, whichever comes last."""
    start, boxed = last_box(text)
    end, marked = last_mark(text)
    # A box in the marked line, or after it, is the answer.
    return boxed if boxed is not None and start > end else marked


def last_mark(text: str) -> tuple[int, str | None]:
    """Returns where the last `####` that marks an answer is, and the answer; -1 and None where there is no such mark."""
    end = len(text.rstrip("# \t\n")) if text.rstrip().endswith(ANSWER_MARK) else len(text)  # "#### 18 ####"
    after = ""  # the first line below that is not empty
    for line in reversed(text[:end].split("\n")):
        end -= len(line) + 1
        before, mark, answer = line.rpartition(ANSWER_MARK)
        if mark:
            answer = answer.strip()
            answer = answer if len(answer) > LONGEST_LINE else LABEL.sub("", answer)
            if not answer and is_number(after):
                answer = after
            if answer and not is_heading(answer, after):
                return end + 1 + len(before), answer
        after = line.strip() or after
    return -1, None


def is_number(line: str) -> bool:
    """Whether a line is an answer by itself."""
    return len(line) <= LONGEST_LINE and quantity_of(line) is not None


def is_heading(line: str, after: str) -> bool:
    """Whether a marked line is the heading of what follows: by its form, or because it has no number and is not the end."""
    if len(line) > LONGEST_LINE:
        return False
    return HEADING.search(line) is not None or (
        bool(after) and has_words(line) and re.search(r"\d", line) is None and not is_number(line)
    )


def lenient_answer(text: str) -> str | None:
    """Returns the strict answer, else what the text calls its answer, else its last number; None without a number."""
    marked = strict_answer(text)
    if marked is not None:
        return marked
    text = text.rpartition("</think>")[2][-MOST_READ:]
    for said in reversed(list(SAID.finditer(text))):
        phrase = answer_of_phrase(text[said.end() : said.end() + LONGEST_PHRASE])
        # "A:" may begin a whole solution
        if phrase is not None and not (said["short"] and has_words(phrase) and not STARTS_AS_NUMBER.match(phrase)):
            return phrase
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def answer_of_phrase(phrase: str) -> str | None:
    """Returns the answer that the words after "the answer is" begin with; None where they hold none."""
    phrase = phrase.lstrip(" *_`:")
    math = MATH.match(phrase)
    if math is not None:
        return next(group for group in math.groups() if group is not None).strip()
    phrase = END_OF_PHRASE.split(phrase, maxsplit=1)[0].strip(" *_`")
    number = LAST_NUMBER.search(phrase)
    if number is None:
        return phrase if 0 < len(phrase.split()) <= SHORT_PHRASE else None
    if quantity_of(phrase) is not None or not has_words(phrase):
        return phrase
    after_equals = LAST_NUMBER.search(phrase.rpartition("=")[2])
    return (after_equals or number).group()


def last_box(text: str) -> tuple[int, str | None]:
    r"""Returns where the last `\boxed{...}` (or `\fbox{...}`) whose braces balance starts, and its inside.

    The inside is None where it is empty; -1 and None where there is no such box. One pass, whatever the text.
    """
    found: tuple[int, str | None] = (-1, None)
    open_braces: list[tuple[int, int] | None] = []
    for brace in BRACES.finditer(text):
        if brace["box"]:
            open_braces.append((brace.start(), brace.end()))
        elif brace.group() == "{":
            open_braces.append(None)
        elif brace.group() == "}" and open_braces:
            box = open_braces.pop()
            if box is not None and box[0] > found[0]:
                found = box[0], text[box[1] : brace.start()].strip() or None
    return found
