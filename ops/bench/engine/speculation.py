"""`caravan bench speculation`: the same streams with and without drafts, on one engine.

On made-up weights streams are told what to say, by a bias on one word each, and drafts replay that with a chosen share
of right tokens: what such weights say by themselves parts in 16 bits at the first close draw, and is not replayed.
On real weights n-grams draft texts of two kinds: those that repeat their prompt, and prose.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from cluster.config import read_model
from cluster.engine import Engine
from cluster.scheduling.ngram import NgramProposer
from cluster.scheduling.sequence import Drafter, Request
from cluster.scheduling.speculation import Proposer
from deployments.config import AppConfig
from model.sampling import uniforms
from model.sampling_params import SamplingParams
from ops.bench import workload
from ops.bench.engine.run import Json, Run, engine_in, own_ray, placed, scheduler_ms
from ops.bench.service.load import percentiles

PROMPT, NEW = 64, 256  # tokens of a stream that is told what to say
TEXT = 300  # tokens that a real model says at most
STORY = (
    "The lighthouse keeper counted the ships every evening. On Monday there were seven, and on Tuesday only three. "
    "On Wednesday a storm came from the west and no ship passed at all, so he polished the great lamp, wrote a letter "
    "to his sister in Lisbon, and went to bed early. On Thursday the sea was calm again and nine ships went by."
)
TEXTS = {
    "edit": f"Rewrite this text with 'ships' replaced by 'boats', and change nothing else:\n\n{STORY}",
    "quote": f"Repeat the following text word for word:\n\n{STORY}",
    "form": "Copy this JSON form three times, for Anna, for Boris and for Clara, with the name filled in:\n\n"
    '{"first_name": "", "country_of_residence": "Portugal", "newsletter": false, "language": "Portuguese"}',
    "story": "Write a story about a dragon who is afraid of heights.",
    "advice": "Explain how to prepare for a long hike in the mountains.",
    "letter": "Write a letter to a friend about your new job in a bakery.",
}
PROSE = ("story", "advice", "letter")


class ReplayDrafter:
    """Says what is known to come, each token with this chance; otherwise one that is not."""

    def __init__(self, recorded: list[int], right: float, seed: int) -> None:
        places = np.arange(len(recorded))
        is_wrong = uniforms(np.full(len(recorded), seed), places) >= right
        self._said = (np.array(recorded) ^ is_wrong).tolist()

    def draft(self, token_ids: list[int], most: int) -> list[int]:
        draft: list[int] = self._said[len(token_ids) : len(token_ids) + most]
        return draft


class ReplayProposer:
    """See `Proposer`. `recorded`: of each request its prompt and what follows."""

    def __init__(self, recorded: Mapping[str, list[int]], right: float) -> None:
        self._recorded, self._right = recorded, right

    def drafter(self, request: Request) -> Drafter | None:
        recorded = self._recorded.get(request.request_id)
        return ReplayDrafter(recorded, self._right, request.sampling.seed) if recorded is not None else None


def serve(engine: Engine, run: Run, requests: list[Request], proposer: Proposer | None, tokens: int | None) -> Json:
    """All of them at once; what a token of a stream takes, and how far drafts went."""
    engine.scheduler.speculate(proposer, tokens)
    run.expect([request.request_id for request in requests])
    for request in requests:
        engine.add(request)
    run.wait()
    done = list(run.requests.values())
    stats = engine.scheduler.stats()
    drafted, right = stats.proposed_tokens.total(), stats.accepted_tokens.total()
    per_token = [1000 * (p.last - p.first) / (p.tokens - 1) for p in done if p.tokens > 1]
    return {
        "ms_per_token": percentiles(per_token)["p50"],
        "output_throughput": round(1000 * len(per_token) / (sum(per_token) / len(per_token)), 1),
        "steps": len(run.reports),
        "tokens_per_step": round(sum(r.num_tokens for r in run.reports) / len(run.reports), 2),
        "scheduler_ms": scheduler_ms(run.reports),
        "drafted": drafted,
        "right": right,
        "by_place": [round(stats.accepted_tokens[i] / n, 3) for i, n in sorted(stats.proposed_tokens.items())],
    }


def compare(engine: Engine, run: Run, requests: list[Request], proposer: Proposer, tokens: int | None) -> Json:
    """Without drafts, with them, and whether the streams are the same."""
    without = serve(engine, run, requests, None, None)
    said = {name: progress.token_ids for name, progress in run.requests.items()}
    drafted = serve(engine, run, requests, proposer, tokens)
    same = sum(said[name] == progress.token_ids for name, progress in run.requests.items())
    return {
        "streams": len(requests),
        "without": without,
        "with": drafted,
        "share_of_time": round(drafted["ms_per_token"] / without["ms_per_token"], 3),
        "share_of_throughput": round(drafted["output_throughput"] / without["output_throughput"], 3),
        "equal_streams": same,
    }


def told_streams(count: int, vocab_size: int) -> list[Request]:
    """Each says a word of its own."""
    requests = []
    for i in range(count):
        how = SamplingParams(max_tokens=NEW, seed=i, temperature=0.0, logit_bias={word_of(i): 100.0})
        prompt = workload.prompt(70_000 + i, PROMPT, vocab_size)
        requests.append(Request(request_id=f"told-{i}", token_ids=prompt, sampling=how))
    return requests


def word_of(index: int) -> int:
    return 100 + 2 * index


def texts(config: AppConfig) -> dict[str, list[int]]:
    """Prompts in the model's own tokens."""
    from model.text.chat import load_chat_template
    from model.text.tokenizer import load_tokenizer
    from model.weights import resolve_path

    path = resolve_path(config.model.path)
    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, tokenizer, config.model.prompt_format)
    if template is None:
        raise ValueError(f"{config.model.path} has no chat template: texts are for chat models")
    return {name: template.encode([{"role": "user", "content": text}]) for name, text in TEXTS.items()}


def bench_speculation(config: AppConfig, batches: list[int], right: float, tokens: int | None) -> Json:
    """Batches of replayed streams on made-up weights, or texts. Raises `ValueError` for what the user must change."""
    vocab_size = min(workload.VOCAB_SIZE, read_model(config.model).vocab_size)
    is_dummy = config.model.load_format == "dummy"
    prompts = {} if is_dummy else texts(config)
    with own_ray(config), placed(config) as group, engine_in(config, group) as (engine, run):
        result: Json = {"tokens": tokens or "auto", "drafts": {"replayed": right} if is_dummy else "ngram"}
        serve(engine, run, told_streams(4, vocab_size), None, None)  # warm
        result["batches"] = []
        for count in batches if is_dummy else []:
            requests = told_streams(count, vocab_size)
            recorded = {r.request_id: [*r.token_ids, *[word_of(i)] * NEW] for i, r in enumerate(requests)}
            result["batches"].append(compare(engine, run, requests, ReplayProposer(recorded, right), tokens))
        result["texts"] = {}
        for name, prompt in prompts.items():
            how = SamplingParams(max_tokens=TEXT, seed=0, temperature=0.0)
            request = Request(request_id=name, token_ids=prompt, sampling=how)
            result["texts"][name] = compare(engine, run, [request], NgramProposer(), tokens)
    return result


def speculation_table(title: str, result: Json) -> Table:
    """For people."""
    shown = Table("streams", "ms/token without", "with", "share of time", "right", "the same", title=title)
    rows: list[tuple[str, Any]] = [(str(one["streams"]), one) for one in result["batches"]]
    for name, one in (*rows, *result["texts"].items()):
        drafted = one["with"]
        shown.add_row(
            name,
            f"{one['without']['ms_per_token']:.2f}",
            f"{drafted['ms_per_token']:.2f}",
            f"{one['share_of_time']:.2f}",
            f"{drafted['right']} of {drafted['drafted']}",
            f"{one['equal_streams']} of {one['streams']}",
        )
    return shown
