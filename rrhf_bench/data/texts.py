"""Labelled texts from the hub or from files, each parted into a prompt and the reply that follows it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rrhf_bench.data.rows import cluster_field, format_counts, open_rows, text_field
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import excerpt
from rrhf_bench.records import Prompt

WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A prompt, and the one reply that the data set has to it."""

    prompt: Prompt
    reply: str
    label: str  # as in the data; a policy is not trained on it
    ended: bool = True  # False if the reply was cut
    cluster: str | None = None  # as in ``Preference``


@dataclass(frozen=True, slots=True)
class TextData:
    """Texts in file order. ``rows`` = ``kept`` + ``too_short``; the other counts are of rows kept."""

    texts: tuple[LabelledText, ...]
    counts: Mapping[str, int]
    identity: str  # as PreferenceData's


def load_texts(
    source: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    prompt_words: int = 48,
    reply_words: int | None = None,
) -> TextData:
    """Return texts with a label, each split into a prompt and the reply that follows it in the data set.

    The source is one of ``load_preferences``; rows are ``{"text", "label"}`` (stanfordnlp/imdb), the label text or a
    whole number, and perhaps a ``cluster``. The prompt is the first ``prompt_words`` words, split on white space, the
    reply the rest, its leading white space included, or its first ``reply_words`` words. 48 words are some 64 tokens of
    GPT-2, the prompt of arXiv 2304.05302 Appendix D, whose completions of 48 tokens are some 36 words.

    Counts: ``rows``, ``kept``, ``too_short`` (texts that end within the prompt); of the rows kept ``duplicate_prompt``,
    ``leading_space`` (white space removed before the first word), ``reply_cut`` and ``label_<label>``.

    Raises DataError as ``load_preferences`` does, and for a size below 1.
    """
    for name, size in {"prompt_words": prompt_words, "reply_words": reply_words}.items():
        if size is not None and size < 1:
            raise DataError(f"{source}: {name} = {size}; expected at least 1")
    rows = open_rows(source, path, split, revision, data_dir)
    counts = Counter(dict.fromkeys(("rows", "kept", "too_short", "duplicate_prompt", "leading_space", "reply_cut"), 0))
    kept: list[LabelledText] = []
    for where, row in rows.rows:
        counts["rows"] += 1
        text, label = text_field(row, "text", where), row.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise DataError(f"{where}: label: found {excerpt(label)}; expected text or a whole number")
        words = list(WORD.finditer(text))
        if len(words) <= prompt_words:
            counts["too_short"] += 1
            continue
        start, end = words[0].start(), words[prompt_words - 1].end()
        last = len(words) if reply_words is None else min(len(words), prompt_words + reply_words)
        cut = last < len(words)
        reply = text[end : words[last - 1].end() if cut else len(text)]
        kept.append(LabelledText(Prompt(text[start:end]), reply, str(label), not cut, cluster_field(row, where)))
        counts["leading_space"] += start > 0
        counts["reply_cut"] += cut
        counts[f"label_{label}"] += 1
    counts["kept"] = len(kept)
    counts["duplicate_prompt"] = len(kept) - len({text.prompt for text in kept})
    if not kept:
        raise DataError(f"{path or source}: no usable text is left; found {format_counts(counts) or 'no rows'}")
    return TextData(tuple(kept), dict(counts), rows.identity())
