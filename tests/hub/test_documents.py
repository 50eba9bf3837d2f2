"""Every code block of the documentation, run as it stands, against a Hub on the loopback interface.

A block that is not run says why in its fence (```bash no-run: needs a GPU). hub/pages.py says what is made shorter:
recipes train one step, `make` runs dry.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import yaml
from hub import loopback
from hub.machine import ROOT
from hub.pages import Block, Shell, blocks_of, write_programs
from huggingface_hub import ModelCard
from matplotlib.testing.compare import compare_images
from safetensors.torch import load_file


EMBEDDED = ROOT / "trl_recipes" / "embedded"
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))
PAGES = sorted(
    page
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "model_cards/README.md", "trl_recipes/**/README.md")
    for page in ROOT.glob(pattern)
)
RUNNABLE = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]
# Written in a page for the reader to fill in.
PLACEHOLDERS = {
    "YOUR_MODEL": "trl_recipes/embedded/model",
    "YOUR_FILE.jsonl": "trl_recipes/embedded/data/grpo_train.jsonl",
    "HELD_OUT.jsonl": "trl_recipes/embedded/data/held_out.jsonl",
    "--question_column question": "--question_column prompt",
}
SHORTER = {"max_steps=60": "max_steps=2"}  # of training in Python


@pytest.fixture(scope="module")
def hub() -> Iterator[loopback.Hub]:
    """A Hub that has the embedded model under the names of the documents' base models, and an adapter of it."""
    with loopback.running_hub() as hub:
        base = {path.name: path.read_bytes() for path in (EMBEDDED / "model").iterdir() if path.is_file()}
        hub.repositories = {name: dict(base) for name in ("user/base", "Qwen/Qwen2.5-7B-Instruct")}
        adapter = ROOT / "model_cards" / "embedded_grpo"
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "user/base"}
        hub.repositories["user/adapter"] = {
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": (adapter / "adapter_model.safetensors").read_bytes(),
        }
        yield hub


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder of programs for the shell's PATH."""
    return write_programs(tmp_path_factory.mktemp("warm") / "bin")


@pytest.fixture
def shell(hub, programs, tmp_path) -> Shell:
    """A shell in what looks like a clone."""
    (tmp_path / "home").mkdir()
    (tmp_path / "clone").mkdir()
    return Shell(hub, tmp_path / "clone", programs)


def run_blocks(shell: Shell, blocks: list[Block], shorter: dict[str, str] = SHORTER) -> tuple[str, int]:
    """Run the blocks of a page in their order, Python in one process: what that printed, and how many blocks ran."""
    printed, count = "", 0
    with shell.session() as session:
        for block in blocks:
            if not block.is_run:
                continue
            text = block.text
            for placeholder, value in (PLACEHOLDERS | shorter).items():
                text = text.replace(placeholder, value)
            printed += session.script(text) if block.language == "python" else shell.bash(text)
            count += not block.is_dry
    return printed, count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page):
        if block.is_code:
            assert block.language in ("bash", "python"), f"{page}:{block.line}: {block.language}"
            assert not block.remark or block.reason_not_to_run, f"{page}:{block.line}: {block.remark}"


@pytest.mark.recipe
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run_from_top_to_bottom(shell, page: Path, record_property) -> None:
    blocks = blocks_of(page)
    printed, count = run_blocks(shell, blocks)
    check = CHECKS.get(page.relative_to(ROOT).as_posix())
    if check is not None:
        check(shell, printed)
    record_property("doc blocks run", count)


@pytest.mark.slow  # a minute of training
@pytest.mark.recipe
def test_the_tutorial_learns_what_it_says_that_it_learns(shell) -> None:
    printed, _ = run_blocks(shell, blocks_of(ROOT / "docs" / "tutorial.md"), shorter={})
    share = {name: int(percent) for name, percent in re.findall(r"^([\w ]+): (\d+)%$", printed, re.MULTILINE)}
    assert share["before"] <= 20 and share["after"] >= 90
    assert share["after"] == share["merged"] == share["from the Hub"]


def check_readme(shell: Shell, printed: str) -> None:
    assert "trainable params: 13 ||" in printed and "one row each: torch.Size([3, 3, 184])" in printed
    assert {"adapter_config.json", "README.md"} <= shell.hub.repositories["user/adapter"].keys()
    assert (shell.folder / "outputs" / "mine" / "reward_curve.png").exists()


def check_tutorial(shell: Shell, printed: str) -> None:
    assert "trainable params: 13 ||" in printed
    assert re.findall(r"^([\w ]+): \d+%$", printed, re.MULTILINE) == ["before", "after", "merged", "from the Hub"]
    assert "user/plums" in shell.hub.repositories and "user/base" in shell.hub.repositories
    facts = json.loads((shell.folder / "outputs" / "plums_recipe" / "adapter_config.json").read_text())
    assert (facts["u"], facts["n_tie"]) == (1, 4)
    assert (
        "my_rewards.right, my_rewards.shows_its_work" in (shell.folder / "outputs/plums_recipe/README.md").read_text()
    )


def check_pictures(shell: Shell, printed: str) -> None:
    """The pictures in the repository are those that the command draws."""
    drawn = {path.name: path for path in (shell.folder / "docs" / "how_it_works").glob("*.png")}
    there = {path.name: path for path in (ROOT / "docs" / "how_it_works").glob("*.png")}
    assert drawn.keys() == there.keys() and len(there) == 5
    is_as_drawn = matplotlib.__version__.startswith("3.11.")  # other releases place texts a pixel apart
    for name, path in drawn.items():
        assert path.stat().st_mtime > there[name].stat().st_mtime  # drawn, and not only copied
        assert not is_as_drawn or compare_images(str(there[name]), str(path), tol=5) is None


CHECKS = {
    "README.md": check_readme,
    "docs/tutorial.md": check_tutorial,
    "docs/how_it_works.md": check_pictures,
}


def test_every_check_and_every_placeholder_is_of_a_page() -> None:
    assert CHECKS.keys() <= {page.relative_to(ROOT).as_posix() for page in RUNNABLE}
    text = "\n".join(block.text for page in RUNNABLE for block in blocks_of(page) if block.is_run)
    for placeholder in PLACEHOLDERS | SHORTER:
        assert placeholder in text, placeholder


def test_the_cards_are_of_the_three_ways_of_training() -> None:
    assert [card.name for card in CARDS] == ["embedded_grpo", "embedded_grpo_4bit", "embedded_sft"]


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_says_what_is_in_its_folder(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and {"tinylora", "trl"} <= set(card.data.tags)
    [vectors] = load_file(folder / "adapter_model.safetensors").values()
    numbers = re.findall(r"[+-]\d\.\d{6}", card.text.partition("## The trained numbers")[2].partition("## Use")[0])
    assert numbers == [f"{value:+.6f}" for value in vectors.flatten().tolist()] and len(numbers) == 13
    assert f"({(folder / 'adapter_model.safetensors').stat().st_size} bytes)" in card.text
    for name in re.findall(r"\(([\w.]+\.png)\)", card.text):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    table = dict(re.findall(r"\| (greedy|sampled) \| [\d.]+% \| ([\d.]+)% \|", card.text))
    assert {name: f"{100 * results[f'accuracy, {name}']:.1f}" for name in table} == table and len(table) == 2
    listed = (ROOT / "model_cards" / "README.md").read_text()
    assert re.search(rf"\[{folder.name}\].*\| {table['greedy']}% \|.*\| {table['sampled']}% \|", listed)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["tinylora_u"] == 1


@pytest.mark.recipe
@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_every_code_block_of_a_card_runs_and_the_export_answers_as_the_adapter_does(
    shell, folder: Path, record_property
) -> None:
    before = (shell.folder / "model_cards" / folder.name / "adapter_model.safetensors").read_bytes()
    answers = []
    blocks = [block for block in blocks_of(folder / "README.md") if block.is_code]
    for block in blocks:
        if block.language == "python":  # each in a process of its own: the second must not need this package
            answers.append(shell.python(block.text))
        else:
            shell.bash(block.text)
    assert len(blocks) == 5 and len(answers) == 2 and answers[0].strip() and answers[0] == answers[1]
    again = shell.folder / "model_cards" / folder.name
    assert (again / "adapter_model.safetensors").read_bytes() != before
    assert json.loads((again / "adapter_config.json").read_text())["u"] == 1
    record_property("doc blocks run", len(blocks))
