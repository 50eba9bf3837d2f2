"""Every reader takes a changed input, for what it says where that is checked, or refuses it, within harness.py's bounds."""

import pytest
from fuzz.harness import fuzz, quick_and_long
from fuzz.readers.all import READERS, reader_of


@quick_and_long(1, 20)
@pytest.mark.parametrize("name", READERS)
def test_a_changed_input_is_read_as_it_is_or_refused(
    name: str, examples: int, at_random: bool, record_property
) -> None:
    reader = reader_of(name)
    examples *= 20 if reader.is_slow else 100
    record_property("inputs fuzzed", fuzz(reader, examples, at_random))
