"""Variants of a model and problems -> an answer to each, verdicts on them, and what they add up to: accuracies and differences.

Decodings:

    greedy    the likeliest token each time, one answer a problem
    sampled   one sample a problem at temperature 1, drawn as training draws its own when it scores: with one seed for all
              batches, so that after an interruption it is drawn anew from the start, and is the same
    samples   n samples a problem, with a seed for each batch, which an interrupted run takes up again

An answer depends on its batch by a rounding error, and so a batch is always the same problems, however often a run is
interrupted: one that is on disk in part is asked for again, and is the same on the same machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from trl_recipes.answer_log import Answer, AnswerLog
from trl_recipes.answers import is_correct
from trl_recipes.paired import accuracy, difference
from trl_recipes.variants import BASE, ZERO, Sampling, Variant


GREEDY, SAMPLED, SAMPLES = "greedy", "sampled", "samples"
LEVELS = ("strict", "lenient")


@dataclass(frozen=True)
class Plan:
    """What to ask for.

    Args:
        sampled (`bool`): whether to measure "sampled".
        samples (`int`): samples of "samples" a problem; 0 for none.
        sampling ([`Sampling`]): of these.
        seed (`int`): of these.
    """

    sampled: bool = False
    samples: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0

    @property
    def decodings(self) -> dict[str, int]:
        """Samples a problem, by decoding."""
        wanted = {GREEDY: 1, SAMPLED: int(self.sampled), SAMPLES: self.samples}
        return {decoding: count for decoding, count in wanted.items() if count}


def evaluate(variants: Sequence[Variant], problems: Sequence[dict], plan: Plan, log: AnswerLog) -> None:
    """
    Asks each variant for all that `log` does not hold yet.

    Args:
        variants (`Sequence[Variant]`):
            From variants.py.
        problems (`Sequence[dict]`):
            `{"prompt": str or list of messages, "answer": str}`.
        plan ([`Plan`]):
            How often, and how.
        log ([`AnswerLog`]):
            Takes the answers. The global random state is left untouched.
    """
    for variant in variants:
        with variant.active():
            for decoding, count in plan.decodings.items():
                answer_all(variant, decoding, count, problems, plan, log, progress=f"{variant.name}, {decoding}")


def answer_all(
    variant: Variant,
    decoding: str,
    count: int,
    problems: Sequence[dict],
    plan: Plan,
    log: AnswerLog,
    *,
    sampled_seed: int = 0,
    progress: str | None = None,
) -> None:
    """Fills the log with the answers of one variant, which is active, and decoding; `sampled_seed` is that of "sampled"."""
    asked = [(problem, sample) for problem in range(len(problems)) for sample in range(count)]

    def is_there(part: list[tuple[int, int]]) -> bool:
        return all((variant.name, decoding, *key) in log.answers for key in part)

    if is_there(asked):
        return
    sampling = {GREEDY: None, SAMPLED: Sampling(), SAMPLES: plan.sampling}[decoding]
    starts = range(0, len(asked), variant.batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(sampled_seed)
        for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
            part = asked[start : start + variant.batch_size]
            if decoding != SAMPLED and is_there(part):
                continue
            if decoding == SAMPLES:
                torch.manual_seed(seed_of_batch(plan.seed, start))
            completions = variant.complete([problems[problem]["prompt"] for problem, _ in part], sampling)
            log.add(
                Answer(variant.name, decoding, problem, sample, completion)
                for (problem, sample), completion in zip(part, completions, strict=True)
            )


def seed_of_batch(seed: int, start: int) -> int:
    """A torch seed for the batch that starts at an index, unlike that of any other batch and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:8]) >> 1


def summarize(variants: Sequence[str], problems: Sequence[dict], plan: Plan, log: AnswerLog) -> dict:
    """
    What the answers add up to.

    Args:
        variants (`Sequence[str]`):
            Names, the one asked for first.
        problems (`Sequence[dict]`):
            Those that were answered.
        plan ([`Plan`]), log ([`AnswerLog`]):
            Of [`evaluate`], which has run.

    Returns:
        `dict`: "variants", `{name: {decoding: {"strict", "lenient"}}}` with means and standard errors; "difference",
        the first minus the base, `{decoding: {"strict", "lenient"}}`; and "changed_by_zero_adapter", how many greedy answers
        of the zero adapter are not the base's. The last two are `None` without these.
    """

    def answers(variant: str, decoding: str) -> list[list[Answer]]:
        samples = range(plan.decodings[decoding])
        return [[log.answers[variant, decoding, problem, n] for n in samples] for problem in range(len(problems))]

    judged = {
        (variant, decoding, level): [
            [is_correct(answer.completion, problem["answer"], lenient=level == "lenient") for answer in samples]
            for samples, problem in zip(answers(variant, decoding), problems, strict=True)
        ]
        for variant in variants
        for decoding in plan.decodings
        for level in LEVELS
    }

    measured = {
        variant: {
            decoding: {level: asdict(accuracy(judged[variant, decoding, level])) for level in LEVELS}
            for decoding in plan.decodings
        }
        for variant in variants
    }
    gain = changed = None
    if BASE in variants:
        gain = {
            decoding: {
                level: asdict(difference(judged[variants[0], decoding, level], judged[BASE, decoding, level]))
                for level in LEVELS
            }
            for decoding in plan.decodings
        }
    if ZERO in variants:
        pairs = zip(completions_of(answers(ZERO, GREEDY)), completions_of(answers(BASE, GREEDY)), strict=True)
        changed = sum(ours != theirs for ours, theirs in pairs)
    return {"variants": measured, "difference": gain, "changed_by_zero_adapter": changed}


def completions_of(answers: Sequence[Sequence[Answer]]) -> list[str]:
    """The texts of the first answer to each problem."""
    return [samples[0].completion for samples in answers]


def greedy_completions(variant: str, problems: int, log: AnswerLog) -> list[str]:
    """The greedy answers of a variant, in the order of the problems."""
    return [log.answers[variant, GREEDY, problem, 0].completion for problem in range(problems)]
