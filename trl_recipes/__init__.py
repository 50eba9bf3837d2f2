"""Recipes: scripts that train and score TinyLoRA adapters with TRL, and the few functions that they share.

    grpo.py, sft.py   the recipes: parse -> data -> model -> trainer -> train -> save -> push, of
        arguments.py, problems.py              what can be set; raw rows -> {"prompt", "answer"}
        recipe_steps.py, held_out.py           the steps that both have; scores before and after
        rewards.py                             a completion and the true answer -> 1.0 or 0.0
        methods.py, lora_xs.py                 what is trained: a TinyLoRA, or one of the paper's baselines
        trainer_setup.py, sharding.py          what a TRL trainer must be checked for; many processes
        rollouts.py, vllm_servers.py, vllm_requests.py    completions from vLLM
        checkpoints.py, resuming.py, ending.py checkpoints that are whole, runs that go on to the bit, and how one ends early
        callbacks.py, reporting.py, publishing.py    progress and curves; what is said at the end; what is pushed
    score.py          share of problems solved; as a script, an evaluation with its controls, of
        score_arguments.py, benchmark_sets.py  what can be set; the benchmarks by name
        answers.py, equal_answers.py, quantities.py, latex_equality.py, latex_worker.py    text -> answer, and equality
        completing.py, variants.py             prompts -> completions: of the adapter, its zero and the base
        answer_log.py, evaluation.py           all of them, on disk as they come
        paired.py, evaluation_report.py        accuracies, differences, tables, the card
    errors.py, yaml_files.py                   what the user can mend, in one line; YAML that nobody vouches for
    sweep.py          many runs, of sweep_file.py (YAML -> runs) and sweep_run.py (a run, its result)
    figures.py        pictures of sweeps, of figure_spec.py, figure_results.py, figure_tables.py and figure_drawing.py

`accelerate launch trl_recipes/grpo.py` puts this folder first on the import path, so no file here may be named like a
standard or installed module (`datasets.py`, `logging.py`, `random.py`, ...).
"""
