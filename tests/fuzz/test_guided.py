"""Every reader, fuzzed by what of the package's code an input reaches."""

import pytest
from fuzz.guided import run
from fuzz.readers.all import READERS, reader_of


pytest.importorskip("atheris", reason="atheris is not installed")

RUNS, SLOW_RUNS = 5000, 300


@pytest.mark.slow  # minutes for all readers together
@pytest.mark.parametrize("name", READERS)
def test_what_an_input_reaches_leads_to_no_failure(name: str, record_property) -> None:
    runs = SLOW_RUNS if reader_of(name).is_slow else RUNS
    read = run(name, runs, seed=0)
    assert read >= runs
    record_property("inputs fuzzed", read)
