"""Candidates rated by a judge as a stage: what it writes, leaves behind when it fails, and asks again."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rrhf_bench.errors import ConfigError, DataError, StoreError
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.pipeline import scheduler
from rrhf_bench.pipeline.judging import JOURNALS, judge_candidates, judge_identity
from rrhf_bench.pipeline.stage_graph import Stage
from rrhf_bench.pipeline.store import Store
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.rewards.toy_judge import ToyJudge
from rrhf_bench.settings.experiment import JudgeTable, RuntimeSettings
from rrhf_bench.settings.judge import JudgeSettings
from tests.judge_endpoints import Faulty, Reply, endpoints, rate_by_length, vllm_endpoint

LAST = "\n\nAssistant: Yes.\n\nHuman: How do I bake bread?\n\nAssistant:"  # a question of the embedded world
PAIRS = [Preference(Prompt(f"\n\nHuman: {name}?{LAST}"), " good", " bad") for name in ("one", "two", "three", "four")]
SOURCES = ("weak", "model", "chosen")


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Any]]:
    with endpoints() as start:
        yield start


@pytest.fixture
def closed() -> Iterator[str]:
    """The URL of a port on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


def table(url: str, **changes: Any) -> JudgeTable:
    quick = {"retries": 2, "backoff": 0.001, "timeout": 20.0, "concurrency": 1, "structured": "none"}
    return JudgeTable(source="endpoint", endpoint=JudgeSettings(base_url=url, model="m", **(quick | changes)))


def put(store: Store, stage: Stage, name: str, records: list[Any]) -> Stage:
    with store.new_artifact(stage.key, {}) as folder:
        write_jsonl(folder / name, records)
    return stage


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def judging(store: Store) -> Callable[[JudgeTable], Stage]:
    """The stage over candidates that are in the store: two weak samples, one of the policy, the chosen reply."""
    prompts = put(store, Stage("prompts", "prompts", {}, {}, ""), "train.jsonl", PAIRS)
    inputs = {"prompts": prompts}
    for name, texts in {"weak": (" a", " bb"), "model": (" ccc",)}.items():
        rows = [Candidates(pair.prompt, tuple(Response(text, "model", "eos") for text in texts)) for pair in PAIRS]
        sample = Stage(name, "sample", {"name": name}, {"prompts": prompts}, "")
        inputs[f"candidates {name}"] = put(store, sample, "candidates.jsonl", rows)

    def stage(judge: JudgeTable) -> Stage:
        settings = {"identity": judge_identity(judge), "sources": list(SOURCES)}
        recorded = {"judge": judge.model_dump(mode="json")}
        return Stage("ratings", "judge", settings, inputs, "", recorded=recorded)

    return stage


def make(store: Store, stage: Stage) -> Path:
    scheduler.make(stage, store, RuntimeSettings(device="cpu"), "transformers", lambda done, total: None)
    return store.folder(stage.key)


def test_whole_groups_are_rated_and_what_could_not_be_is_left_out(serve, store, judging):
    def reply(handler: Faulty, body: dict[str, Any], number: int) -> None:
        if "Human: two?" in body["messages"][0]["content"]:
            handler.say("I like the third.")
        else:
            rate_by_length(handler, body, number)

    server = serve(reply)
    made = make(store, judging(table(server.url)))
    rows = read_jsonl(made / "candidates.jsonl", Candidates)
    assert [row.prompt for row in rows] == [PAIRS[0].prompt, *(pair.prompt for pair in PAIRS[2:])]
    for row in rows:
        assert [(r.source, r.text) for r in row.responses] == [
            ("weak", " a"), ("weak", " bb"), ("model", " ccc"), ("chosen", " good"),
        ]  # fmt: skip
        assert row.scores == (4.0, 5.0, 6.0, 7.0)  # min(letters, 5) + 1 + 1 + 1
    ratings = [json.loads(line) for line in (made / "ratings.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in ratings] == [row.prompt.text for row in rows]
    assert ratings[0]["ratings"][2] == {"relevance": 3, "correctness": 1, "coherence": 1, "safety": 1}
    counts = json.loads((made / "counts.json").read_text())
    assert {name: count for name, count in counts.items() if count} == {
        "prompts": 4, "judged": 3, "dropped": 1, "pairs": 18, "not_ratings": 3,
    }  # fmt: skip
    assert len(server.requests) == 3 + 3


def test_the_embedded_judge_needs_no_server(store, judging):
    made = make(store, judging(JudgeTable()))
    rows = read_jsonl(made / "candidates.jsonl", Candidates)
    unscored = [Candidates(r.prompt, tuple(Response(x.text, x.source, x.finish) for x in r.responses)) for r in rows]
    assert tuple(rows) == ToyJudge().judge(unscored).candidates
    assert not (store.root / JOURNALS).exists()


def test_another_row_asks_only_for_groups_that_were_not_judged(serve, store, judging):
    server = serve(rate_by_length)
    stage = judging(table(server.url))
    make(store, stage)
    other = Stage("others", "judge", stage.settings | {"seed": 1}, stage.inputs, "", recorded=stage.recorded)
    make(store, other)
    assert len(server.requests) == len(PAIRS)
    fewer = Stage("fewer", "judge", stage.settings | {"sources": ["weak", "chosen"]}, stage.inputs, "",
                  recorded=stage.recorded)  # fmt: skip
    make(store, fewer)
    assert len(server.requests) == 2 * len(PAIRS)  # another group beside it is another question


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"base_url": "http://elsewhere/v1"}, True),
        ({"api_key_env": "KEY"}, True),
        ({"concurrency": 9}, True),
        ({"timeout": 1.0}, True),
        ({"retries": 0}, True),
        ({"model": "other"}, False),
        ({"structured": "regex"}, False),
        ({"temperature": 0.5}, False),
        ({"max_tokens": 99}, False),
        ({"attempts": 1}, False),
        ({"seed": 1}, False),
    ],
)
def test_a_key_holds_what_decides_the_ratings_and_nothing_else(judging, changes, same):
    settings = {"base_url": "http://host/v1", "model": "m"}
    one, other = (JudgeTable(source="endpoint", endpoint=JudgeSettings(**s)) for s in (settings, settings | changes))
    assert (judging(one).key == judging(other).key) == same


def test_a_judge_that_answers_prose_is_one_line_that_shows_it(serve, store, judging):
    server = serve(lambda handler, body, number: handler.say("As a language model\nI like them all."))
    with pytest.raises(DataError) as caught:
        make(store, judging(table(server.url)))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "ratings: judge http://127.0.0.1:", "for any of 4 prompts (12 not_ratings)",
        "'As a language model I like them all.'", "structured (now 'none')",
        str(store.root / JOURNALS),
    ):  # fmt: skip
        assert part in message
    with pytest.raises(DataError):
        make(store, judging(table(server.url)))
    assert len(server.requests) == 12  # an answer is an answer: nothing is asked again
    (journal,) = (store.root / JOURNALS).glob("*.jsonl")
    journal.unlink()  # what the message says
    up = serve(rate_by_length)
    make(store, judging(table(up.url)))
    assert len(up.requests) == 4


def test_without_any_response_there_is_nothing_to_judge(store, judging):
    stage = judging(JudgeTable())
    none = Stage("none", "judge", {"sources": ["absent"]}, stage.inputs, "", None, None, stage.recorded)
    with pytest.raises(DataError, match=r"none: none of 4 prompts has a response from absent; add a source"):
        make(store, none)


def test_faults_of_key_and_place_are_one_line(tmp_path, monkeypatch, closed):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    groups = [Candidates(PAIRS[0].prompt, (Response(" a", "model"), Response(" b", "model")))]
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        judge_candidates(table(closed, api_key_env="NO_SUCH_KEY"), groups, tmp_path / JOURNALS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written .*choose another --runs DIR"):
        judge_candidates(table(closed), groups, tmp_path / "file")


TINY = """
name = "tiny"
[data]
source = "files"
path = "{path}"
train_prompts = 8
[policy]
source = "scratch"
scratch = {scratch}
[reward_model]
source = "scratch"
training = {{ epochs = 1 }}
[perplexity_model]
source = "scratch"
scratch = {scratch}
[judge]
source = "endpoint"
endpoint = {{ base_url = "{url}", {judge} }}
[sampling]
backend = "{backend}"
max_new_tokens = 8
[candidates]
recipe = "SP"
n = 1
[sources.other]
model = "sft"
[methods.sft]
epochs = 1
[methods.wombat]
kind = "rrhf"
epochs = 1
candidates = {{ sources = ["other", "model", "chosen"], scored_by = "judge" }}
[evaluation]
prompts = 4
pairs = 4
dev_prompts = 2
curve_points = 1
max_new_tokens = 8
pool_prompts = 1
pool_samples = 2
[runtime]
device = "cpu"
workers = 1
"""
SCRATCH = "{ vocabulary = 300, hidden = 32, layers = 1, heads = 1, ffn = 32, epochs = 1 }"
QUICK = 'model = "m", structured = "none", retries = 1, backoff = 0.001, attempts = 2'

RunCli = Callable[..., str]


@pytest.fixture
def run_tiny(tmp_path, cli, one_thread) -> RunCli:
    """Return a function that runs the tiny experiment with an endpoint and returns the error if the code is 2."""
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(30)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)

    def run(url: str, judge: str = QUICK, backend: str = "transformers") -> str:
        text = TINY.format(path=tmp_path / "pairs.jsonl", scratch=SCRATCH, url=url, judge=judge, backend=backend)
        (tmp_path / "tiny.toml").write_text(text)
        found = cli("run", tmp_path / "tiny.toml", "--runs", tmp_path / "runs", "--json")
        assert found.code in (0, 2), found.err
        return found.err if found.code else ""

    return run


def test_a_run_ends_with_one_line_and_goes_on_when_the_judge_is_there(run_tiny, serve, closed, tmp_path):
    errors = [line for line in run_tiny(closed).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in (
        "ratings of the candidates of wombat, seed 0: judge",
        closed,
        "2 tries",
        "Connection refused",
        "0 of 8",
    ):
        assert part in errors[0]

    server = serve(lambda handler, body, n: rate_by_length(handler, body, n) if n < 5 else handler.send(500, "{}"))
    assert "5 of 8 prompts were judged and are kept in" in run_tiny(server.url)
    store = Store(tmp_path / "runs" / "store")
    before = {path: path.stat().st_mtime_ns for path in store.root.glob("*/manifest.json")}

    up = serve(rate_by_length)
    assert run_tiny(up.url) == ""
    assert len(up.requests) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    stages = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())["stages"]
    trained = next(stage for stage in stages.values() if stage["name"] == "train wombat, seed 0")
    rows = read_jsonl(store.folder(trained["inputs"]["judged"]) / "candidates.jsonl", Candidates)
    assert [response.source for response in rows[0].responses] == ["other", "model", "chosen"]
    counts = (tmp_path / "runs" / "tiny" / "report" / "tables" / "counts.csv").read_text()
    assert '"wombat, seed 0, judge",judged,8' in counts
    assert all(row.scores == tuple(3.0 + min(len(r.text.strip()), 5) for r in row.responses) for row in rows)


@pytest.mark.slow
def test_a_run_with_a_vllm_server_as_judge(run_tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-loopback")
    # At temperature 0 a random model gives everybody the same ratings, and ties rank nothing.
    judge = 'model = "tiny", structured = "regex", temperature = 1.0, api_key_env = "JUDGE_KEY"'
    with vllm_endpoint(tokenizer, tmp_path) as url:
        assert run_tiny(url, judge) == ""
    (ratings,) = (tmp_path / "runs" / "store").glob("*/ratings.jsonl")
    assert len(ratings.read_text().splitlines()) == 8
    report = (tmp_path / "runs" / "tiny" / "report" / "report.md").read_text()
    assert "wombat" in report
    everything = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [path for path in everything if b"sk-loopback" in path.read_bytes()]


def test_who_asks_one_judge_takes_turns_and_nothing_is_asked_twice(serve, tmp_path):
    """Two threads stand for two processes: a file lock holds between any two that opened the file."""
    groups = [Candidates(pair.prompt, (Response(" a", "model"), Response(" bb", "model"))) for pair in PAIRS]
    lock, at_once, most = threading.Lock(), 0, 0

    def slow(handler: Faulty, body: dict[str, Any], number: int) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.05)
        with lock:
            at_once -= 1
        rate_by_length(handler, body, number)

    server = serve(slow)
    judge = table(server.url, concurrency=2)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: judge_candidates(judge, groups, tmp_path / JOURNALS), range(2))
    assert first == second
    assert len(server.requests) == len(PAIRS)
    assert most == 2
