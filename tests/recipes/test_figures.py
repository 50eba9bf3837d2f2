"""figures.py and figure_spec.py: which figures are drawn, and what is said of the others."""

import sys
from pathlib import Path

import pytest
import yaml
from recipes.made_up_sweeps import TINY, points, run, write_sweep, write_tiny

from trl_recipes import figures
from trl_recipes.arguments import RecipeError
from trl_recipes.figure_drawing import draw
from trl_recipes.figure_results import Results
from trl_recipes.figure_spec import read_figures
from trl_recipes.figure_tables import table_of


ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweeps(tmp_path) -> Path:
    return write_tiny(tmp_path / "sweeps")


def call_main(monkeypatch, tmp_path: Path, content: dict, sweeps: Path) -> None:
    file = tmp_path / "figures.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["--figures", file, "--sweeps", sweeps, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    figures.main()


def test_a_figure_whose_sweeps_are_not_there_waits_and_the_others_are_drawn(sweeps, tmp_path, monkeypatch, capsys):
    write_sweep(sweeps, "choosing", [run("1", 1, 100, 0.5, stage="choose")])
    (sweeps / "empty").mkdir()
    (sweeps / "empty" / "results.csv").touch()
    waits = {"x": {"sweeps": ["tiny", "absent", "choosing", "empty"]}}
    content = {
        "figure_1": {"kind": "points", "title": "t", "series": waits},
        "figure_2": {"kind": "points", "title": "t", "series": TINY},
    }
    call_main(monkeypatch, tmp_path, content, sweeps)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "figure_1: not drawn, no measured run yet of absent, choosing, empty"
    assert len(out) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figure_2.csv", "figure_2.png"]
    with pytest.raises(RecipeError, match="nothing to draw in"):
        call_main(monkeypatch, tmp_path, {"figure_1": content["figure_1"]}, sweeps)


def test_an_error_in_one_figure_does_not_keep_the_others(sweeps, tmp_path, monkeypatch, capsys):
    wrong = {"x": {"sweeps": ["tiny"], "where": {"option:tinylora_u": 5}}}
    content = {
        "wrong": {"kind": "points", "title": "t", "series": wrong},
        "right": {"kind": "points", "title": "t", "series": TINY},
    }
    with pytest.raises(RecipeError, match="not drawn: wrong"):
        call_main(monkeypatch, tmp_path, content, sweeps)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("wrong: series 'x': no measured run of tiny has {'option:tinylora_u': 5}")
    assert (tmp_path / "out" / "right.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Input should be a valid dictionary"),
        ("figure_1: [", "is not valid YAML"),
        ("../figure_1: {kind: curves, title: t, series: {a: {sweeps: [b]}}}", "String should match pattern"),
        ("a: {kind: pie, title: t}", "a: Input tag 'pie' found using 'kind' does not match"),
        ("a: {kind: points, title: t, serie: {}}", "a: serie: Extra inputs are not permitted"),
        ("a: {kind: points, title: t}", "a: Value error, no series"),
        (
            "a: {kind: points, title: t, series: {b: {sweeps: []}}}",
            "a: series: b: sweeps: List should have at least 1",
        ),
        ("a: {kind: points, title: t, series: {b: {sweeps: [c], each: point}}}", "`each` and {value}"),
        ("a: {kind: smallest_update, title: t, models: {m: {sweeps: [c]}}}", "a: models: m: model_parameters: Field"),
    ],
)
def test_a_mistake_in_the_file_of_figures_is_named_with_its_place(tmp_path, content, message):
    file = tmp_path / "figures.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError) as error:
        read_figures(file)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_of_figures_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no file of figures"):
        read_figures(tmp_path / "absent.yaml")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(sweeps, tmp_path, monkeypatch):
    figure, out = points(TINY), tmp_path / "out"
    table = table_of(figure, Results(sweeps))
    picture = draw(figure, table)
    figures.save(picture, table, out, "name")
    old = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture, "savefig", full_disk)
    with pytest.raises(RecipeError, match="name cannot be written"):
        figures.save(picture, table.iloc[:1], out, "name")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == old
    with pytest.raises(RecipeError, match="cannot be written"):
        figures.save(picture, table, out / "name.csv", "name")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trl_recipes/sweeps").glob("*/figures.yaml")), ids=lambda p: p.parent.name
)
def test_the_figures_that_come_along_are_readable(path):
    assert read_figures(path)
