"""The error of the recipes, and how much of what somebody else's file says goes into one."""

MOST_SHOWN = 300  # characters of a value
MOST_SAID = 1500  # characters of an error


class RecipeError(ValueError):
    """A mistake in what the user asked for. The scripts print it as one line, without a traceback.

    Of names without end in somebody's file the middle is left out, so that the place and the remedy stay.
    """

    def __init__(self, said: str) -> None:
        super().__init__(said if len(said) <= MOST_SAID else f"{said[: MOST_SAID - 500]}...{said[-500:]}")


def in_one_line(said: object) -> str:
    """What an error or a value says, or its class, without line breaks and not for ever."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def shown(value: object) -> str:
    """A value as it is shown in an error: not all of it where it is long."""
    return in_one_line(repr(value))
