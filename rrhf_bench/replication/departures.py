"""Departures from the RRHF paper: the options in which an experiment file differs from the paper's settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from rrhf_bench.replication.counterparts import RRHF, part_of, writes_reviews
from rrhf_bench.report.rows import candidates_words, plain_words, search_words, source_words
from rrhf_bench.report.table import Cell, Column, Table
from rrhf_bench.report.view import View
from rrhf_bench.settings.candidates import ONLINE_KL, REVIEWS_KL, recipe_of
from rrhf_bench.settings.methods import MethodSettings, candidates_of


def departures_table(view: View) -> Table:
    """Return where the experiment file differs from the paper's settings, option by option."""
    columns = (Column("option"), Column("the paper"), Column("this run"), Column("rows"))
    rows: dict[_Setting, list[str]] = defaultdict(list)
    for setting in _shared_settings(view):
        rows[setting].append("all")
    for initial in view.policies:
        part, source = part_of(view, initial), source_words(view.experiment, initial)
        paper = _PARTS[part] if part else "a model tuned on reviews" if writes_reviews(view) else "none"
        rows[f"initial policy: {initial}", paper, source] += view.rows_from(initial) or [initial]
    for row, settings in view.methods.items():
        kept = _method_settings(settings)
        for setting in _of_reviews(kept) if writes_reviews(view) else kept:
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
            if writes_reviews(view)
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
    length = "48" if writes_reviews(view) else "128"
    if writes_reviews(view):
        yield "data.source", "IMDB", data.source
    else:
        yield "data.source", "hub:Dahoas/rm-static", data.source
        yield "data.train_prompts", "76256", str(data.train_prompts)
        yield "reward_model.source", "Dahoas/gptj-rm-static", experiment.reward_model.source
        yield "perplexity_model.source", "gpt2-medium", experiment.perplexity_model.source
        uncut = "false: training replies were not cut at fake turns"
        yield "sampling.cut_at_stop", uncut, "true" if sampling.cut_at_stop else uncut
        yield "evaluation.decoding", "greedy", ", ".join(evaluation.decoding)
    yield "sampling.max_new_tokens", length, str(sampling.max_new_tokens)
    yield "evaluation.max_new_tokens", length, str(evaluation.max_new_tokens)


_PARTS = {
    "LLaMA": "LLaMA 7B",
    "Alpaca": "Alpaca 7B",
    "Alpaca-sft": "Alpaca 7B, tuned on the chosen replies of Dahoas/full-hh-rlhf",
}


def _of_reviews(settings: Iterable[_Setting]) -> Iterator[_Setting]:
    """Yield the settings that Appendix D gives for IMDB, or Eqs. 1 to 5 for all data."""
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


def _method_settings(settings: MethodSettings) -> Iterator[_Setting]:
    """Yield the settings of a row that the paper gives."""
    how = candidates_of(settings)
    policy = None if how is None else recipe_of(how.model_copy(update={"permute_rewards": False}))
    samples = how is not None and "model" in how.sources
    for key, paper in _PAPER.get(settings.kind, {}).items():
        of_candidates = how is not None and key in ("n", "sources")
        if of_candidates and ((key == "n" and not samples) or (key == "sources" and policy is not None)):
            continue  # P and D are the paper's as well
        here = getattr(how if of_candidates else settings, key)
        yield f"{settings.kind}: {key}", paper, ", ".join(here) if isinstance(here, tuple) else plain_words(here)
    if how is None or settings.kind != RRHF:
        return
    if samples:
        # The paper's temperature of 0.8 has no effect on beams (sampling/beam.py), so it is no departure.
        online = " while training (OP-k)" if how.refresh else ""
        yield f"rrhf: candidates{online}", search_words(4, 4, 1.0), candidates_words(how)
    if how.refresh:
        yield "rrhf: refresh (k of OP-k)", "every 32 of about 3575 steps", f"every {how.refresh} steps"
        paper = "none, or 0.01"
        yield "rrhf: reward_kl (of OP-k)", paper, paper if how.reward_kl in (0.0, ONLINE_KL) else f"{how.reward_kl:g}"
    if how.rounds > 1:
        paper = f"{how.rounds}" if how.rounds <= 3 else "at most 3"
        yield "rrhf: rounds (n of IP-n)", paper, str(how.rounds)
    if how.scored_by != "reward model":
        yield "rrhf: scored_by", "reward model", how.scored_by
    if how.permute_rewards:
        yield "rrhf: permute_rewards", "false", "true"


_PAPER: Mapping[str, Mapping[str, str]] = {
    "rrhf": {
        "variant": "paper", "rank_weight": "1", "sft_weight": "1", "margin": "0", "sources": "model, chosen, rejected",
        "n": "4", "lr": "2e-05", "schedule": "linear", "epochs": "3", "batch_prompts": "64", "weight_decay": "0",
        "max_length": "192",
    },
    "ppo": {
        "lr": "8e-06", "schedule": "constant", "kl": "adaptive", "kl_coefficient": "0.05", "value_coefficient": "1",
        "reward_scale": "running", "missing_eos": "none", "eps": "1e-08", "rollouts": "64", "update_epochs": "4",
        "weight_decay": "1e-06",
    },
    "best_of_n": {"n": "4"},
}  # fmt: skip
