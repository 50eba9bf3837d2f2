"""Recipes: scripts that train and score TinyLoRA adapters with TRL, and the few functions that they share.

    arguments.py      what can be set, from YAML or the command line
    problems.py       raw rows -> {"prompt", "answer"}
    rewards.py        a completion and the true answer -> 1.0 or 0.0
    trainer_setup.py  the base model, the adapter's config, and what a TRL trainer must be checked for
    callbacks.py      progress in the terminal, the reward curve as CSV and PNG
    score.py          fraction of problems solved; as a script, an evaluation with its controls, made of
        benchmark_sets.py                      the benchmarks by name
        answers.py, equal_answers.py, quantities.py, latex_equality.py, latex_worker.py    text -> answer, and equality
        completing.py, variants.py             prompts -> completions: of the adapter, its zero and the base
        answer_log.py, evaluation.py           all of them, on disk as they come
        paired.py, evaluation_report.py        accuracies, differences, tables, the card
    grpo.py           the recipe: parse -> data -> model -> trainer -> train -> save

`accelerate launch trl_recipes/grpo.py` puts this folder first on the import path, so no file here may be named like a
standard or installed module (`datasets.py`, `logging.py`, `random.py`, ...).
"""
