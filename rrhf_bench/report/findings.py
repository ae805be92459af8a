"""The sentences of a report, made from its numbers and its experiment file: nothing here knows a result beforehand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Decoding
from rrhf_bench.report.comparisons import BestOfNLearner, Comparison, best_of_n_learners, comparisons
from rrhf_bench.report.health import health_sentences
from rrhf_bench.report.table import Cell, Column, Missing, Table, deciding_digits, interval, markdown, number
from rrhf_bench.report.tables import accuracy, samples_as
from rrhf_bench.report.view import DECODING_WORDS, MEASURE_WORDS, View, changed
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import ONLINE_KL, REVIEWS_KL, CandidateSettings, MethodSettings

MANY = 8  # rows beyond which a sentence names the first and the last only


def standing(experiment: Experiment) -> str:
    """What kind of numbers these are."""
    if experiment.data.source == "toy":
        return (
            "These are numbers of the embedded world: a small model trained from scratch on generated dialogues, a "
            "reward model trained on noisy labels, and a gold reward that knows the truth. They are not comparable "
            "with the paper's, which are of 7B models on HH; only the order of methods and the shape of curves are."
        )
    if experiment.data.source == "toy-reviews":
        return (
            "These are numbers of the embedded film reviews: a small model trained from scratch on generated text, and "
            "a sentiment classifier as its reward. They are not comparable with the paper's on IMDB; only the order of "
            "methods is."
        )
    scratch = [
        words
        for words, model in (("policy", experiment.policy), ("reward model", experiment.reward_model))
        if model.from_scratch
    ]
    if scratch:
        return (
            f"The {' and the '.join(scratch)} of this run {'are small models' if scratch[1:] else 'is a small model'} "
            "trained from scratch on the data's own text. "
            "The numbers show that the comparison runs on these data. They say little about the methods at scale, and "
            "they are not comparable with the paper's."
        )
    return (
        "The published numbers are of LLaMA and Alpaca 7B under Dahoas/gptj-rm-static. Unless policy and reward "
        "model are those, values are not comparable with the paper's; the order of methods may be."
    )


def findings(view: View) -> list[str]:
    """What holds and what is inside noise, as Markdown sentences."""
    compared = comparisons(view)
    learners = best_of_n_learners(view)
    told = compared
    if len(view.methods) > MANY:  # what each row gained in reward; the table of differences has the rest
        told = [c for c in compared if c.measure == "reward" and c.b in view.policies]
    return [
        *health_sentences(view),
        *(sentence for b in dict.fromkeys(c.b for c in told) for sentence in _against(view, told, b)),
        *trades(compared),
        *_learners(view, learners),
        *_accuracies(view),
    ]


def _against(view: View, compared: Sequence[Comparison], b: str) -> Iterator[str]:
    """Yield one sentence per decoding and measure: the rows that are higher than ``b``, lower, inside noise, and those
    that were compared without a verdict."""
    for decoding in view.decodings:
        for measure in view.measures:
            family = [c for c in compared if (c.b, c.decoding, c.measure) == (b, decoding, measure)]
            parts = []
            for words in ("higher", "lower", "inside noise", "one seed", "exploratory"):
                some = [c for c in family if c.standing == words]
                some.sort(key=lambda c: -_value(c))
                words = "one seed, no verdict" if words == "one seed" else words
                parts += [f"{words}: {_list(list(map(_difference, some)))}"] if some else []
            if parts:
                where = f"{MEASURE_WORDS[measure]}, {DECODING_WORDS[decoding]}"
                yield f"Against **{markdown(b)}** on the {where}, {'; '.join(parts)}."


def _list(parts: Sequence[str]) -> str:
    """All of them, or of many, which are in order, their number and the first and the last."""
    return ", ".join(parts) if len(parts) <= MANY else f"{len(parts)} rows, from {parts[0]} to {parts[-1]}"


def _difference(c: Comparison) -> str:
    """Return the difference with its interval, at as many digits as it takes to show on which side of 0 each end lies;
    with the adjusted p if there is a verdict, and what could have been detected if the difference is inside noise."""
    assert isinstance(c.estimate, Estimate)
    found = c.estimate
    digits = deciding_digits((found.value, found.low, found.high), 2, 0.0)
    text = f"{markdown(c.a)} by {_signed(found.value, digits)} {interval(found.low, found.high, digits)}"
    if c.p is None:
        return text
    words = [f"p {_p_words(c.p)}"]
    if c.verdict == "inside noise" and c.detectable is not None:
        words.append(f"detectable: {number(c.detectable, 2)}")
    return f"{text} ({', '.join(words)})"


def _p_words(p: float) -> str:
    """Return p with the digit that decides whether it is below 0.05."""
    return "< 0.001" if p < 0.001 else number(p, deciding_digits((p,), 3, 0.05))


def trades(compared: Sequence[Comparison]) -> Iterator[str]:
    """Yield the rows that beat another on the proxy and lose to it on the gold reward, by verdict on both."""
    gold = {(c.a, c.b, c.decoding): c.verdict for c in compared if c.measure == "gold"}
    beaten: dict[tuple[str, Decoding], list[str]] = defaultdict(list)
    for c in compared:
        if c.measure == "reward" and c.verdict == "higher" and gold.get((c.a, c.b, c.decoding)) == "lower":
            beaten[c.a, c.decoding].append(c.b)
    if len(beaten) > MANY:
        for decoding in dict.fromkeys(decoding for _, decoding in beaten):
            some = [markdown(a) for a, where in beaten if where == decoding]
            yield (
                f"**{len(some)} rows over-optimise the proxy** ({DECODING_WORDS[decoding]}): each is higher than "
                f"another row on the proxy and lower on gold: {', '.join(some)}."
            )
        return
    for (a, decoding), rows in beaten.items():
        yield (
            f"**{markdown(a)} over-optimises the proxy** ({DECODING_WORDS[decoding]}): it is higher than "
            f"{markdown(' and '.join(rows))} on the proxy and lower on gold."
        )


def _learners(view: View, learners: Sequence[BestOfNLearner]) -> Iterator[str]:
    """Yield a sentence for each row, or for many rows one per decoding. Eq. 7 is tested by a claim alone
    (``best_of_n_learner``, an equivalence test), so these sentences give intervals and no verdict."""
    found = [learner for learner in learners if isinstance(learner.paired_gap, Estimate)]
    if len({learner.row for learner in found}) <= MANY:
        yield from map(_learner, found)
        return
    for decoding in view.decodings:
        some = [learner for learner in found if learner.decoding == decoding]
        some.sort(key=lambda learner: _gap(learner).value)
        if some:
            yield (
                f"Eq. 7 ({DECODING_WORDS[decoding]}, exploratory): the best candidate on the same evaluation prompts "
                f"minus the row's reward runs, over {len(some)} rows, from {_gap_words(some[0])} "
                f"({markdown(some[0].row)}) to {_gap_words(some[-1])} ({markdown(some[-1].row)})."
            )


def _gap(learner: BestOfNLearner) -> Estimate:
    assert isinstance(learner.paired_gap, Estimate)
    return learner.paired_gap


def _gap_words(learner: BestOfNLearner) -> str:
    gap = _gap(learner)
    digits = deciding_digits((gap.value, gap.low, gap.high), 2, 0.0)
    return f"{_signed(gap.value, digits)} {interval(gap.low, gap.high, digits)}"


def _learner(learner: BestOfNLearner) -> str:
    way = learner.way
    head = f"Eq. 7: **{markdown(learner.row)}** ({DECODING_WORDS[learner.decoding]}, exploratory)"
    if not isinstance(way, Missing):
        head += f" stands at {100 * way:.0f}% of the way from the mean to the maximum of its training candidates"
    return f"{head}. The best candidate on the same evaluation prompts minus its reward is {_gap_words(learner)}."


def _accuracies(view: View) -> Iterator[str]:
    shares = {row: share for row in view.rows if isinstance(share := accuracy(view, row), Estimate)}
    if len(shares) > MANY:
        shares = dict(sorted(shares.items(), key=lambda item: -item[1].value))
    parts = [
        f"{markdown(row)} {100 * share.value:.1f}% {interval(100 * share.low, 100 * share.high, 1)}"
        for row, share in shares.items()
    ]
    if parts:
        yield f"As a reward model, p_i orders held-out pairs as their labels do in: {_list(parts)}."


def _value(c: Comparison) -> float:
    return c.estimate.value if isinstance(c.estimate, Estimate) else 0.0


def _signed(value: float, digits: int) -> str:
    text = number(value, digits)
    return text if text.startswith("-") or float(text.replace(",", "")) == 0 else f"+{text}"


def rows_table(view: View) -> Table:
    """What each row is: where it starts, what it is trained on, and what its method does otherwise than by default."""
    columns = (
        Column("row"),
        Column("method"),
        Column("starts from"),
        Column("in the part of"),
        Column("samples as"),
        Column("candidates"),
        Column("k", 0),
        Column("settings beside the defaults"),
    )
    rows = []
    for row in view.rows:
        settings = view.methods.get(row)
        kind = Cell(view.kind(row)) if settings else Cell("initial policy")
        part = Cell.of(view.part(row) or Missing("its initial policy is in no part of the paper's"))
        if settings is None:
            none = Cell.of(Missing("an initial policy is not trained here"))
            rows.append((Cell(row), kind, Cell(_source(view.experiment, row)), part, *[none] * 4))
            continue
        k = view.experiment.responses(settings) if "candidates" in settings.requires else None
        words = ", ".join(f"{key} {_plain(value)}" for key, value in changed(settings).items())
        untrained = Missing("it is not trained on candidates")
        sources = Cell.of(untrained if k is None else _sources_words(settings))
        counted = Cell.of(untrained if k is None else k)
        rows.append(
            (
                Cell(row),
                kind,
                Cell(view.initial(row)),
                part,
                samples_as(view, row),
                sources,
                counted,
                Cell(words or "none"),
            )
        )
    notes = (
        "In the part of: the initial policy of the paper whose published rows stand beside. Samples as: the paper's "
        "name for where the candidates come from. k: candidates a prompt.",
    )
    return Table("rows", "The rows", columns, tuple(rows), notes, view.records.arena)


def departures_table(view: View) -> Table:
    """Where the experiment file differs from the paper's settings, option by option."""
    columns = (Column("option"), Column("the paper"), Column("this run"), Column("rows"))
    rows: dict[_Setting, list[str]] = defaultdict(list)
    for setting in _shared_settings(view):
        rows[setting].append("all")
    for initial in view.policies:
        part, source = view.part(initial), _source(view.experiment, initial)
        paper = _PARTS[part] if part else "a model tuned on reviews" if view.reviews else "none"
        rows[f"initial policy: {initial}", paper, source] += view.rows_from(initial) or [initial]
    for row, settings in view.methods.items():
        kept = _method_settings(settings, view.sampling_policy(row))
        for setting in _of_reviews(kept) if view.reviews else kept:
            rows[setting].append(row)
    differing = tuple(
        (Cell(option), Cell(paper), Cell(here), Cell(", ".join(names)))
        for (option, paper, here), names in rows.items()
        if paper != here
    )
    notes = (
        "The paper's settings: arXiv 2304.05302v2 "
        + (
            "Appendix D, as far as it goes; the PPO of Table 10 is not described there. "
            if view.reviews
            else "sections 4.1 and 4.2, and where it is silent its released code and the trlX example that it names "
            "for PPO. "
        )
        + "Options that agree are left out.",
    )
    return Table("departures", "Departures from the paper", columns, differing, notes, view.records.arena)


_Setting = tuple[str, str, str]  # option, the paper, this run


def _shared_settings(view: View) -> Iterator[_Setting]:
    experiment = view.experiment
    data, sampling, evaluation = experiment.data, experiment.sampling, experiment.evaluation
    length = "48" if view.reviews else "128"
    if view.reviews:
        yield "data.source", "IMDB", data.source
    else:
        yield "data.source", "hub:Dahoas/rm-static", data.source
        yield "data.train_prompts", "76256", str(data.train_prompts)
        yield "reward_model.source", "Dahoas/gptj-rm-static", experiment.reward_model.source
        yield "perplexity_model.source", "gpt2-medium", experiment.perplexity_model.source
        yield "sampling.cut_at_stop", "false: training replies were not cut at fake turns", _truth(sampling.cut_at_stop)
        yield "evaluation.decoding", "greedy", ", ".join(evaluation.decoding)
    yield "sampling.max_new_tokens", length, str(sampling.max_new_tokens)
    yield "evaluation.max_new_tokens", length, str(evaluation.max_new_tokens)


def _truth(cut: bool) -> str:
    return "true" if cut else "false: training replies were not cut at fake turns"


_PARTS = {
    "LLaMA": "LLaMA 7B",
    "Alpaca": "Alpaca 7B",
    "Alpaca-sft": "Alpaca 7B, tuned on the chosen replies of Dahoas/full-hh-rlhf",
}


def _of_reviews(settings: Iterable[_Setting]) -> Iterator[_Setting]:
    """The settings that Appendix D gives for IMDB, or Eqs. 1 to 5 for all data."""
    same = ("variant", "rank_weight", "sft_weight", "margin", "batch_prompts", "weight_decay")
    for option, paper, here in settings:
        if option == "rrhf: epochs":
            yield option, "5", here
        elif option.startswith("rrhf: refresh"):
            yield option, "every 128 steps", here
        elif option.startswith("rrhf: reward_kl"):
            of_reviews = f"none, or {REVIEWS_KL:g}"
            yield option, of_reviews, of_reviews if here in (paper, f"{REVIEWS_KL:g}") else here
        elif option.removeprefix("rrhf: ") in same:
            yield option, paper, here


def _source(experiment: Experiment, initial: str) -> str:
    policy = experiment.policies.get(initial, experiment.policy)
    if policy.trained_by is not None:
        return f"what the row {policy.trained_by} trained, first seed"
    return policy.source


def _method_settings(settings: MethodSettings, policy: str | None) -> Iterator[_Setting]:
    """``policy``: the sampling policy of the paper that the row follows."""
    samples = "model" in (settings.sources or ())
    for key, paper in _PAPER.get(settings.kind, {}).items():
        here = getattr(settings, key)
        if settings.kind == "rrhf" and ((key == "n" and not samples) or (key == "sources" and policy is not None)):
            continue  # P and D are the paper's as well
        yield f"{settings.kind}: {key}", paper, ", ".join(here) if isinstance(here, tuple) else _plain(here)
    if settings.kind == "rrhf" and samples:
        # The paper's temperature of 0.8 has no effect on beams (sampling/beam.py), so it is no departure.
        online = " while training (OP-k)" if settings.refresh is not None else ""
        yield f"rrhf: candidates{online}", _search_words(4, 4, 1.0), _candidates_words(settings)
    if settings.refresh is not None:
        yield "rrhf: refresh (k of OP-k)", "every 32 of about 3575 steps", f"every {settings.refresh} steps"
        yield "rrhf: reward_kl (of OP-k)", "none, or 0.01", _reward_kl(settings.reward_kl)
    if settings.rounds is not None:
        paper = f"{settings.rounds}" if settings.rounds <= 3 else "at most 3"
        yield "rrhf: rounds (n of IP-n)", paper, str(settings.rounds)
    if settings.scored_by not in (None, "reward model"):
        yield f"{settings.kind}: scored_by", "reward model", str(settings.scored_by)


def _reward_kl(value: float | None) -> str:
    return "none, or 0.01" if value in (None, 0.0, ONLINE_KL) else _plain(value)


def _sources_words(settings: CandidateSettings) -> str:
    """Where a row's candidates come from, such as "model (beam search, 4 beams), chosen, rejected"."""
    names = settings.sources or ()
    return ", ".join(f"model ({_candidates_words(settings)})" if name == "model" else name for name in names)


def _candidates_words(settings: CandidateSettings) -> str:
    if settings.strategy == "beam":
        return f"beam search, {settings.beams} beams"
    if settings.strategy == "diverse-beam":
        return _search_words(settings.beams, settings.groups, settings.diversity_penalty)
    words = f"sampling, temperature {_plain(settings.temperature)}, top-p {_plain(settings.top_p)}"
    return f"{words}, top-k {settings.top_k}" if settings.top_k else words


def _search_words(beams: int | None, groups: int | None, penalty: float | None) -> str:
    return f"diverse beam search, {beams} beams in {groups} groups, penalty {_plain(penalty)}"


_PAPER: Mapping[str, Mapping[str, str]] = {
    "rrhf": {
        "variant": "paper", "rank_weight": "1", "sft_weight": "1", "margin": "0", "sources": "model, chosen, rejected",
        "n": "4", "lr": "2e-05", "schedule": "linear", "epochs": "3", "batch_prompts": "64", "weight_decay": "0",
        "max_length": "192",
    },
    "ppo": {
        "lr": "8e-06", "schedule": "constant", "kl": "adaptive", "kl_coefficient": "0.05", "value_coefficient": "1",
        "reward_scale": "running", "missing_eos": "none", "eps": "1e-08", "rollouts": "64", "ppo_epochs": "4",
        "weight_decay": "1e-06",
    },
    "best_of_n": {"n": "4"},
}  # fmt: skip


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
