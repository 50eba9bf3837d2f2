r"""The words of an answer -> an exact number and its unit: `$1,234.50`, `72 apples`, `-\frac{1}{2}`, `2.5 \times 10^{3} m`."""

import re
from dataclasses import dataclass
from fractions import Fraction


# Longer digit strings are no answers, and Python refuses to convert thousands of digits.
DIGITS = r"[0-9]{1,100}"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]{{0,100}})?|\.{DIGITS})"
THOUSANDS = re.compile(
    r"(?<![0-9,.])[0-9]{1,3}(,[0-9]{3})+(?!,?[0-9])|^[^\d\s]{0,3}[1-9][0-9]{0,2}( [0-9]{3})+(?![ ]?[0-9/])"
)
# A fraction of LaTeX is written a/b first, and a repeating decimal as a fraction.
PART = rf"\s*(?:\{{\s*(-?)\s*({DECIMAL})\s*\}}|([0-9]))"
FRACTION = re.compile(rf"\\frac{PART}{PART}")
REPEATING = re.compile(
    r"([0-9]{0,20})\.([0-9]{0,20})(?:\\overline\s*\{([0-9]{1,20})\}|\\dot\s*\{([0-9])\})(?:\.\.\.|\\ldots)?"
)
NUMBER = re.compile(
    rf"""(?P<mixed>(?P<whole>{DIGITS})\s+(?:and\s+)?(?P<over>{DIGITS})/(?P<under>{DIGITS})(?![\d/.]))
    |(?P<power>10\s*\^\s*\{{?\s*(?P<power_of_ten>[+-]?\d{{1,3}})\s*\}}?(?!\d))
    |(?P<numerator>{DECIMAL})(?:
        \s*/\s*(?P<denominator>{DECIMAL})(?![\d/])
        |[eE](?P<e>[+-]?\d{{1,3}})(?!\d)
        |\s*(?:\\times|\\cdot|\*|x|×|·)\s*10\s*(?:\^|\*\*)\s*\{{?\s*(?P<times>[+-]?\d{{1,3}})\s*\}}?(?!\d))?""",
    re.VERBOSE,
)
CURRENCIES = {"$": "dollar", "£": "pound sterling", "€": "euro", "¥": "yen", "₹": "rupee", "US$": "dollar"}
SIGNS = re.compile(r"^(?P<sign>[+-]?)\s*(?P<currency>US\$|[$£€¥₹])?\s*(?P<inner>[+-]?)\s*(?=[\d.])")
# A minus is a sign after "is" or "="; after another word it may be a difference.
BEFORE = re.compile(
    r"^[A-Za-z]{2}[A-Za-z' ]{0,100}?(?:\s*[:=]\s*|\bis\s+|\s+(?![-+])|(?=[$£€¥₹]))(?=[-+$£€¥₹.\d]|US\$)"
)
UNIT = re.compile(
    r"^[A-Za-zµ°/][A-Za-zµ°'’ ./-]{0,100}(?:\^\s*\{?[23]\}?|[²³])?(?:\s*/\s*[A-Za-z]{1,10}(?:\^\s*\{?[23]\}?|[²³])?)?$|^$"
)
# What turns the number beside it into another one.
CHANGES_BEFORE = re.compile(
    r"\b(?:not|no|less|more|fewer|than|least|most|minus|negative|under|over|below|above|half|twice|or|between|step|part|case"
    r"|problem|question|example|method|plus|times|divided|sqrt|log|ln|exp|sin|cos|tan|pi)\b",
    re.IGNORECASE,
)
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALE = re.compile(rf"^({'|'.join(SCALES)})\b", re.IGNORECASE)
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SPELLED = {word: value for value, word in enumerate(ONES.split())}
SPELLED |= {word: 10 * value for value, word in enumerate(TENS.split(), start=2)}
SPELLED_NUMBER = re.compile(
    rf"^(?:({'|'.join(TENS.split())})[- ]({'|'.join(ONES.split()[1:10])})|({'|'.join(SPELLED)}))\b(?!-)", re.IGNORECASE
)
ORDINAL_STEMS = "four fif six seven eigh nin ten eleven twelf " + " ".join([*ONES.split()[13:], "twentie", "thirtie"])
CHANGES_AFTER = re.compile(
    rf"\b(?:{'|'.join([*SPELLED, *SCALES])}|(?:{'|'.join(ORDINAL_STEMS.split())}|hundred|thousand|million|billion)ths?|thirds?"
    r"|half|halves|not|or|and|with|maybe|over|divided|multiplied|times(?! (?:as|a|per)\b|$)|plus|minus|less|than|root|sqrt"
    r"|squared|cubed|power|factorial|choose|point|remainder|mod|base|pi|log|ln|sin|cos|tan|mil|mn|bn|lakh|crore|quadrillion)\b"
    r"|^[A-Za-z]$|^[a-z][ /*+-]",
    re.IGNORECASE,
)
TIME = re.compile(r"^(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:([ap])\.?\s?m\.?)?$", re.IGNORECASE)
# unit -> (what it measures, how many of the smallest)
UNITS: dict[str, tuple[str, Fraction | int]] = {
    **dict.fromkeys(("mm", "millimeter", "millimetre"), ("length", 1)),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), ("length", 10)),
    **dict.fromkeys(("m", "meter", "metre"), ("length", 1000)),
    **dict.fromkeys(("km", "kilometer", "kilometre"), ("length", 10**6)),
    **dict.fromkeys(("in", "inch", "inche"), ("length", Fraction(254, 10))),
    **dict.fromkeys(("ft", "foot", "feet"), ("length", Fraction(3048, 10))),
    **dict.fromkeys(("yd", "yard"), ("length", Fraction(9144, 10))),
    **dict.fromkeys(("mi", "mile"), ("length", 1609344)),
    **dict.fromkeys(("mg", "milligram"), ("mass", 1)),
    **dict.fromkeys(("g", "gram"), ("mass", 1000)),
    **dict.fromkeys(("kg", "kilogram"), ("mass", 10**6)),
    **dict.fromkeys(("ml", "milliliter", "millilitre"), ("volume", 1)),
    **dict.fromkeys(("l", "liter", "litre"), ("volume", 1000)),
    **dict.fromkeys(("s", "sec", "second"), ("time", 1)),
    **dict.fromkeys(("min", "minute"), ("time", 60)),
    **dict.fromkeys(("h", "hr", "hour"), ("time", 3600)),
    "day": ("time", 86400),
    "week": ("time", 604800),
    **dict.fromkeys(("lb", "pound"), ("weight", 16)),
    **dict.fromkeys(("oz", "ounce"), ("weight", 1)),
    "cent": ("dollars", 1),
    **dict.fromkeys(("dollar", "usd", "buck"), ("dollars", 100)),
    **dict.fromkeys(("euro", "eur"), ("euros", 1)),
    "pound sterling": ("pounds sterling", 1),
    "yen": ("yen", 1),
    "rupee": ("rupees", 1),
    "degree": ("angle", 180),
    "mph": ("length per time", Fraction(1609344, 3600)),
    **dict.fromkeys(("kmh", "kph"), ("length per time", Fraction(10**6, 3600))),
}
PER = re.compile(r"\s*/\s*|\s*\bper\s+")


@dataclass(frozen=True)
class Quantity:
    """A number and its unit.

    Args:
        value (`Fraction`): the number, exactly.
        unit (`tuple[str, Fraction]`, *optional*): what it measures, and how many of the smallest unit of that kind.
        is_percentage (`bool`): whether `value` counts hundredths.
        words (`frozenset[str]`): the unit as it was written, without the s of the plural; empty where there is none.
    """

    value: Fraction
    unit: tuple[str, Fraction] | None = None
    is_percentage: bool = False
    words: frozenset[str] = frozenset()

    def agrees(self, gold: "Quantity") -> bool:
        """Whether it is the same as the true one."""
        if self.is_percentage != gold.is_percentage:
            percentage, number = (self, gold) if self.is_percentage else (gold, self)
            return number.value in (percentage.value, percentage.value / 100)
        if self.unit is None or gold.unit is None:  # "72 apples left" are "72 apples", and 5 boys no 5 girls
            return self.value == gold.value and (self.words <= gold.words or gold.words <= self.words)
        return self.unit[0] == gold.unit[0] and self.value * self.unit[1] == gold.value * gold.unit[1]

    def __str__(self) -> str:
        return str(self.value)


def read_quantity(answer: str) -> Quantity | None:
    """Reads `-3`, `72.0`, `.5`, `1/2`, `1 1/2`, `$1,000`, `50%`, `72 apples left` or `two`; None for anything else.

    Args:
        answer (`str`): without dollars around it and without commands for fonts.
    """
    time = TIME.match(answer)
    if time is not None:
        hours, minutes, seconds, half = time.groups()
        if int(minutes) > 59 or int(seconds or 0) > 59:
            return None
        of_day = 3600 * int(hours) + 60 * int(minutes) + int(seconds or 0)
        return Quantity(Fraction(of_day), (f"time of day {half.lower()}m", Fraction(1)) if half else None)
    answer = plain_digits(answer)
    before = BEFORE.match(answer)
    if before is not None:
        if CHANGES_BEFORE.search(before.group()):
            return None
        answer = answer[before.end() :]
    found = read_signed(answer) or read_spelled(answer)
    if found is None:
        return None
    value, currency, rest = found
    aside = re.search(r"\s*\(([A-Za-z -]{1,50})\)$", rest)
    if aside is not None:  # 18 (eighteen), 18 (dollars)
        said = read_spelled(aside[1])
        if not is_unit(aside[1]) and (said is None or said[0] != value or not is_unit(said[2])):
            return None
        rest = rest[: aside.start()]
    scale = SCALE.match(rest)
    if scale is not None:
        value, rest = value * SCALES[scale[1].lower()], rest[scale.end() :].strip()
    if rest.startswith("%") or re.match(r"per ?cent\b", rest):
        rest = re.sub(r"^(?:%|per ?cent)\s*", "", rest)
        return Quantity(value, None, True) if is_unit(rest) else None
    if rest in CURRENCIES:
        currency, rest = CURRENCIES[rest], ""
    if not is_unit(rest):
        return None
    if currency:
        rest = f"{currency} {rest}" if PER.match(rest) else currency
    return Quantity(value, unit_of(rest), words=words_of_unit(rest))


def words_of_unit(rest: str) -> frozenset[str]:
    """The words of a unit, without points and the s of the plural."""
    return frozenset(word.removesuffix("s") for word in re.findall(r"[a-zµ]+", rest.lower().replace(".", "")))


def plain_digits(answer: str) -> str:
    """Writes fractions as a/b and numbers without thousands separators."""

    def of_repeating(number: re.Match) -> str:
        whole, fixed, repeated = number[1] or "0", number[2], number[3] or number[4]
        every = int("9" * len(repeated))
        over = int(whole + fixed) * every + int(repeated)
        return f"{over}/{every * 10 ** len(fixed)}"

    def of_fraction(fraction: re.Match) -> str:
        sign, over, over_digit, under_sign, under, under_digit = fraction.groups(default="")
        sign = "-" if sign != under_sign else ""
        return f" {sign}{over or over_digit}/{under or under_digit}"

    answer = THOUSANDS.sub(lambda number: number.group().replace(",", "").replace(" ", ""), answer)
    return FRACTION.sub(of_fraction, REPEATING.sub(of_repeating, answer)).strip().rstrip(".")


def read_signed(answer: str) -> tuple[Fraction, str | None, str] | None:
    """Reads digits at the start: the number, its currency, and what follows."""
    signs = SIGNS.match(answer)
    if signs is None or (signs["sign"] and signs["inner"]):
        return None
    rest = answer[signs.end() :]
    number = NUMBER.match(rest)
    if number is None:
        return None
    try:
        value = value_of(number)
    except ZeroDivisionError:
        return None
    is_negative = "-" in (signs["sign"], signs["inner"])
    currency = CURRENCIES.get(signs["currency"])
    rest = rest[number.end() :]
    # "5x" is no 5 with a unit, and "5kg" is.
    if rest[:1].isalpha() and unit_of(rest) is None:
        return None
    if currency == "dollar" and rest.startswith("$"):  # $72$
        rest = rest[1:]
    return -value if is_negative else value, currency, rest.strip()


def value_of(number: re.Match) -> Fraction:
    """The value of what [`NUMBER`] matched."""
    if number["mixed"]:
        return int(number["whole"]) + Fraction(int(number["over"]), int(number["under"]))
    if number["power"]:
        return Fraction(10) ** int(number["power_of_ten"])
    value = Fraction(number["numerator"])
    if number["denominator"]:
        return value / Fraction(number["denominator"])
    return value * Fraction(10) ** int(number["e"] or number["times"] or 0)


def read_spelled(answer: str) -> tuple[Fraction, None, str] | None:
    """Reads a number below a hundred in words at the start, as [`read_signed`] does digits."""
    spelled = SPELLED_NUMBER.match(answer)
    if spelled is None:
        return None
    value = sum(SPELLED[word.lower()] for word in spelled.groups() if word)
    return Fraction(value), None, answer[spelled.end() :].strip()


def is_unit(rest: str) -> bool:
    """Whether what follows a number leaves it the number it is."""
    return UNIT.match(rest) is not None and (unit_of(rest) is not None or CHANGES_AFTER.search(rest) is None)


def unit_of(rest: str) -> tuple[str, Fraction] | None:
    """Returns what a unit measures, and how many of the smallest it is; None for "apples" and what else has no kind."""
    known = [simple_unit(part) for part in PER.split(rest.strip())]
    parts = [part for part in known if part is not None]
    if len(parts) > 2 or len(parts) < len(known):
        return None
    kind, size = parts[0]
    return (kind, size) if len(parts) == 1 else (f"{kind} per {parts[1][0]}", size / parts[1][1])


def simple_unit(rest: str) -> tuple[str, Fraction] | None:
    """The same of a unit that is no rate."""
    if re.fullmatch("[A-KM-Z]", rest.strip()):  # 5 M are no meters
        return None
    name = " ".join(rest.lower().strip(" .").split())
    squared = re.fullmatch(r"(?:square |sq\.? ?)?([a-zµ]+)(?:\s*(?:\^\s*\{?([23])\}?|([²³])))?", name)
    if squared is None and name not in UNITS:
        return None
    base = name if squared is None else squared[1]
    known = UNITS.get(base) or UNITS.get(base.removesuffix("s")) or UNITS.get(base.removesuffix("es"))
    if known is None:
        return None
    kind, size = known
    power = 1
    if squared is not None:
        power = int((squared[2] or squared[3] or "1").replace("²", "2").replace("³", "3"))
        power = 2 if name.startswith("sq") else power
    return (kind, Fraction(size)) if power == 1 else (f"{kind}^{power}", Fraction(size**power))
