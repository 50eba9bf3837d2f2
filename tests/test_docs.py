"""The pages of docs/: the API is built without a warning and complete, links lead somewhere, commands are accepted."""

import importlib.util
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pandas
import pytest
from hub.pages import blocks_of
from markdown_it import MarkdownIt
from pdoc.doc import Class, Doc, Function, Module
from trl import ModelConfig

import peft_tinylora
from peft_tinylora import cli
from trl_recipes import grpo, sft
from trl_recipes.arguments import parse
from trl_recipes.score_arguments import ScoreArguments


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "model_cards/**/README.md", "trl_recipes/**/README.md")
    for page in ROOT.glob(pattern)
)
RECIPES = {
    "grpo": grpo.ARGUMENT_CLASSES,
    "sft": sft.ARGUMENT_CLASSES,
    "score": (ScoreArguments, ModelConfig),
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- the API


@pytest.fixture(scope="module")
def build_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(build_api, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pdoc's
        build_api.main(folder)
    return folder


def test_every_public_name_of_the_plugin_has_its_place(site) -> None:
    html = (site / "peft_tinylora.html").read_text()
    for name in peft_tinylora.__all__:
        assert f'id="{name}"' in html, name
    assert "[<code>" not in html and "[`" not in html  # references are links


def test_arguments_are_lists_and_code_is_code(site) -> None:
    html = (site / "peft_tinylora.html").read_text()
    assert "<strong>n_tie (<code>int</code>, <em>optional</em>):</strong>" in html
    assert "Args:" not in html


def test_every_module_of_the_recipes_has_a_page(site) -> None:
    modules = {file.stem for file in (ROOT / "trl_recipes").glob("*.py")} - {"__init__"}
    assert modules == {page.stem for page in (site / "trl_recipes").glob("*.html")} - {"embedded"}


def public(namespace: Module | Class) -> Iterator[Doc]:
    """Modules, classes and functions that are documented, with what is in them."""
    yield namespace
    for member in namespace.own_members if isinstance(namespace, Class) else namespace.members.values():
        if member.name.startswith("_"):
            continue
        if isinstance(member, Function):
            yield member
        elif isinstance(member, Class):
            yield from public(member)


@pytest.mark.parametrize("package", ["peft_tinylora", "trl_recipes"])
def test_every_public_class_and_function_has_a_docstring(build_api, package: str) -> None:
    modules = [Module.from_name(name) for name in build_api.pdoc.extract.walk_specs([package])]
    found = [doc for module in modules for doc in public(module)]
    assert len(found) > 40
    assert [doc.fullname for doc in found if not doc.docstring.strip()] == []


# --- the numbers of choosing.md


def measured(figure: int, series: str, places: list, column: str = "mean") -> list[float]:
    """Numbers of the left panel of a figure's CSV, in the order of the places on its axis."""
    rows = pandas.read_csv(ROOT / f"docs/figures/figure_{figure}.csv")
    rows = rows[(rows["panel"] == 0) & (rows["series"] == series)].set_index("x")
    return [float(rows.loc[place, column]) for place in places]


def test_choosing_has_the_measured_numbers() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text()
    counts, all_weights = [1, 4, 13, 49, 196], [1_057_664]
    expected = {
        "here, Figure 1": measured(1, "TinyLoRA", counts) + measured(1, "full", all_weights),
        "spread over draws here (standard deviation)": measured(1, "TinyLoRA", counts, "standard_deviation")
        + measured(1, "full", all_weights, "standard_deviation"),
        "here, Figure 7, 13 numbers (u=1)": measured(7, "u = 1", [1, 2, 4, 8]),
        "here, Figure 7, 52 numbers (u=4)": measured(7, "u = 4", [1, 2, 4, 8]),
    }
    for first, values in expected.items():
        [cells] = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", text, re.MULTILINE)
        shown = [float(re.search(r"\d\.\d+", cell).group()) for cell in cells.split("|")]
        assert shown == pytest.approx(values, abs=0.006), first
    rates = measured(1, "TinyLoRA", [1, 4, 7, 196], "learning_rate") + measured(
        1, "full", all_weights, "learning_rate"
    )
    [cells] = re.findall(r"^\| GRPO, 50 steps \|(.*)\|$", text, re.MULTILINE)
    assert [float(cell.split()[0]) for cell in cells.split("|")] == rates


# --- links and commands of all pages


def anchors_of(page: Path) -> set[str]:
    """What the headings of a page are called in links to them, as GitHub does it."""
    tokens = MarkdownIt().parse(page.read_text())
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for token in MarkdownIt().parse(page.read_text()):
        for child in token.children or []:
            target = str(child.attrGet("href") or child.attrGet("src") or "")
            if not target or re.match(r"\w+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{name_of(page)}: {target}"
            assert not anchor or anchor in anchors_of(file), f"{name_of(page)}: {target}"


def test_every_page_of_docs_is_in_the_index_and_every_picture_on_a_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
    pictures = list((ROOT / "docs" / "how_it_works").glob("*.png"))
    text = (ROOT / "docs" / "how_it_works.md").read_text()
    assert pictures
    for picture in pictures:
        assert f"(how_it_works/{picture.name})" in text and picture.stat().st_size <= 150_000, picture.name


def commands_of(program: str, pages: Sequence[Path] = PAGES) -> list[str]:
    """All commands of a program in the bash blocks of pages, also of those that no test can run."""
    text = "\n".join(block.text for page in pages for block in blocks_of(page) if block.language == "bash")
    return re.findall(rf"{program}([^\n#]*)", text.replace("\\\n", " "))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL 1.16 sets it
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_take_every_command(recipe: str, tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("output_dir: outputs/mine\nuse_cpu: true\nbf16: false\n")
    commands = commands_of(rf"trl_recipes/{recipe}\.py")
    assert commands
    for command in commands:
        words = [str(config) if word == "..." or word.endswith(".yaml") else word for word in shlex.split(command)]
        parse(RECIPES[recipe], recipe, words)


def test_the_readme_and_the_serving_page_have_commands() -> None:
    """So that the patterns by which commands are found still find them."""
    assert commands_of(r"trl_recipes/\w+\.py", [ROOT / "README.md"])
    serving = re.findall(r"trl_recipes/(\w+)\.py ", (ROOT / "docs" / "serving.md").read_text())
    assert serving == ["grpo", "grpo", "score"]
    assert len(commands_of(r"trl_recipes/\w+\.py", [ROOT / "docs" / "serving.md"])) == len(serving)


def test_the_command_line_takes_every_command() -> None:
    commands = commands_of(r"(?m:^)peft-tinylora ")
    assert len(commands) >= 10
    for command in commands:
        cli.make_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_make_targets_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    files = re.findall(
        r"\b((?:trl_recipes|peft_tinylora|tests|benchmarks|docs)/[\w/.-]+\.(?:py|yaml|jsonl|md))\b", text
    )
    for file in files:
        assert (ROOT / file).exists(), file
    assert (targets and files) or page != ROOT / "README.md"  # which has both
