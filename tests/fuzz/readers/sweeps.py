"""Files of YAML (yaml_files.py), of sweeps and figures (sweep_file.py, figure_spec.py), and tables of results (figure_results.py)."""

from pathlib import Path

from fuzz.harness import Reader, workplace

from trl_recipes.errors import RecipeError
from trl_recipes.figure_results import Results
from trl_recipes.figure_spec import read_figures
from trl_recipes.sweep_file import load_sweep
from trl_recipes.yaml_files import read_yaml


ROOT = Path(__file__).parents[3]
BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (name, name, *[name - 1] * 8)
    for name in range(ord("b"), ord("p"))
)
MERGED = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [*%c, *%c, *%c, *%c]}\n" % (name, name, *[name - 1] * 4) for name in range(ord("b"), ord("x"))
)
ITSELF = b"a: &a [*a]\nb: &b {c: *b}\n"
DEEP = b"[" * 20_000
LONG_NAME = b"extends: base.yaml\ngrid: {ti" + b"9" * 10_000 + b": [1]}\n"
YAML = (
    *(
        b"&a ",
        b"*a ",
        b"<<: ",
        b"!!python/object/apply:os.system [id]",
        b"!!int ",
        b"!!float x",
        b"!!bool x",
        b"!!binary x",
    ),
    *(
        b"!!timestamp x",
        b"2024-99-99",
        b"1:99:99",
        b"!!set {a, b}",
        b"!!omap [a]",
        b"? [a]\n: b\n",
        b"- ",
        b"---\n",
        b"|\n ",
        b"%YAML 9",
    ),
    *(b"0x", b".inf", b".nan", b"~", b"{a: 1}", b"[1, 2]", b"1_000"),
)
RECIPE = b"""
model_name_or_path: user/base
dataset_name: user/data
prompt_template: "{question}"
tinylora_tie: '{"mlp": ".*mlp.*"}'
tinylora_u: 2
chat: false
env: {FUZZED: "1"}
"""
SWEEP = b"""
reproduces: "Figure 1"
left_open: [a, b]
recipe: grpo
config: trl_recipes/configs/embedded_grpo.yaml
options: {max_steps: 40}
points: {"13": {tinylora_n_tie: 4}, "49": {tinylora_n_tie: 1, learning_rates: [0.1]}}
learning_rates: [0.01, 0.03]
seeds: [0, 1]
choose: {seeds: [100], options: {}}
evaluate: [math500]
reported: {"13": 0.907}
"""
GRID = b"""
extends: base.yaml
grid: {tinylora_u: [1, 4], tinylora_n_tie: [1, 2]}
reported: {}
"""
ROWS = b"""point,stage,learning_rate,seed,chosen,trained_parameters,problems,folder,configuration,greedy_after
13,measure,0.01,0,True,13,100,a,"{}",0.5
13,measure,0.01,1,True,13,100,b,"{}",0.6
"""
CURVE = b"step,reward\n1,0.5\n2,0.75\n"


def written(name: str, data: bytes) -> Path:
    path = workplace() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_sweep(data: bytes) -> None:
    written("sweeps/base.yaml", SWEEP)
    sweep = load_sweep(written("sweeps/changed.yaml", data), ROOT)
    for run in sweep.first_runs():
        assert not run.folder.is_absolute() and ".." not in run.folder.parts and str(run)


def read_rows(data: bytes) -> None:
    written("results/sweep/results.csv", data)
    results = Results(workplace() / "results")
    runs = results.select(["sweep"], {"point": ["13"]}, "figure")
    assert runs["greedy_after"].dropna().between(0, 1).all() if "greedy_after" in runs else True


def read_curve(data: bytes) -> None:
    written("curve/reward_curve.csv", data)
    Results(workplace()).curve(workplace() / "curve", "reward")


READERS = [
    Reader(
        "yaml",
        lambda data: read_yaml(written("file.yaml", data)),
        (RecipeError,),
        lambda: [RECIPE, SWEEP, GRID, ITSELF, BOMB[:400]],
        YAML,
        found=(BOMB, MERGED, ITSELF, DEEP),
    ),
    Reader("sweep", read_sweep, (RecipeError,), lambda: [SWEEP, GRID], YAML, found=(BOMB, LONG_NAME)),
    Reader(
        "figures",
        lambda data: read_figures(written("figures.yaml", data)),
        (RecipeError,),
        lambda: [(ROOT / "trl_recipes/sweeps/embedded/figures.yaml").read_bytes()],
        YAML,
        found=(BOMB,),
    ),
    Reader(
        "results",
        read_rows,
        (RecipeError,),
        lambda: [ROWS],
        (b"inf", b'"', b"1e400", b"measure", b"True"),
        is_slow=True,
    ),
    Reader(
        "curve",
        read_curve,
        (RecipeError,),
        lambda: [CURVE],
        (b"inf", b"nan", b'"', b"\x0b"),
        (b"\x0btep,reward\n1,0.5\n", b"step,reward,reward\n1,2,0.75\n"),
        is_slow=True,
    ),
]
