"""A simulated fleet: chats come back to gateways, which send them to engines by the router's real code.

An engine computes prompts one after another, slower for every sequence that decodes beside them, and holds the blocks
that it used last. Gateways know its reports, which come twice a second and late, and digests that are older.
"""

import heapq
import random
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cluster.scheduling.prefix import Chain, Digest, root
from deployments.routing.outlook import Outlook, Prompt, Report

BLOCK = 16
PREFILL_RATE = 7000.0  # 70B FP8 on an H200
STEP_S, SEQUENCE_S = 0.02, 0.00015  # of a step that decodes, alone and for each sequence
REPORT_S, REPORT_LATE_S, DIGEST_S = 0.5, 0.3, 2.0


@dataclass
class Chat:
    """The hashes of all that it will ever say, and how much of it each turn has."""

    shorts: np.ndarray
    turns: list[int]  # tokens of each turn's prompt
    answers: list[int]
    turn: int = 0


@dataclass
class Engine:
    name: str
    blocks: int
    cache: "OrderedDict[int, int]" = field(default_factory=OrderedDict)  # short -> depth
    free_at: float = 0.0
    queue: list[tuple[float, int]] = field(default_factory=list)  # when each prompt will be done, its tokens
    ends: list[float] = field(default_factory=list)  # of sequences that decode
    requests: int = 0

    def held(self, prompt: Prompt) -> int:
        count = 0
        for key in prompt.shorts.tolist():
            if key not in self.cache:
                break
            count += 1
        return count * BLOCK

    def settle(self, now: float) -> None:
        while self.ends and self.ends[0] <= now:
            heapq.heappop(self.ends)
        self.queue = [entry for entry in self.queue if entry[0] > now]

    def first_token(self, prompt: Prompt, now: float) -> float:
        """When it would come."""
        self.settle(now)
        uncached = max(1, prompt.num_tokens - self.held(prompt))
        slower = 1 + len(self.ends) * SEQUENCE_S * PREFILL_RATE / 2048
        return max(now, self.free_at) + uncached / PREFILL_RATE * slower + STEP_S + len(self.ends) * SEQUENCE_S

    def serve(self, prompt: Prompt, chat: Chat, now: float) -> tuple[float, float, int]:
        """Time of the first token, of the last one, and how many tokens were found."""
        at, held = self.first_token(prompt, now), self.held(prompt)
        self.free_at = at - STEP_S
        self.queue.append((self.free_at, max(1, prompt.num_tokens - held)))
        answer = chat.answers[chat.turn]
        end = at + answer * (STEP_S + (len(self.ends) + 1) * SEQUENCE_S)
        heapq.heappush(self.ends, end)
        self.requests += 1
        used = chat.shorts[: (prompt.num_tokens + answer) // BLOCK].tolist()
        for depth in range(len(used), 0, -1):  # a beginning is evicted after what follows it
            self.cache[used[depth - 1]] = depth
            self.cache.move_to_end(used[depth - 1])
        while len(self.cache) > self.blocks:
            self.cache.popitem(last=False)
        return at, end, held

    def report(self, now: float) -> Report:
        self.settle(now)
        tokens = sum(tokens for _, tokens in self.queue)
        return Report(now + 1, tokens, len(self.ends), False, PREFILL_RATE, 1 / SEQUENCE_S / 2)

    def digest(self) -> Digest:
        keys = np.fromiter(self.cache.keys(), np.uint32, len(self.cache))
        return Digest.of(keys, np.fromiter(self.cache.values(), np.int32, len(self.cache)))


@dataclass
class Outcome:
    hit_rate: float
    p50: float
    p95: float
    busiest: float  # engine's requests, compared with the average


def chats(rng: random.Random, count: int, systems: list[list[int]], hot: float) -> list[Chat]:
    made = []
    for _ in range(count):
        system = systems[0] if rng.random() < hot else rng.choice(systems)
        tokens, turns, answers = list(system), [], []
        for _ in range(8):
            tokens += [rng.randrange(32_000) for _ in range(rng.randint(100, 600))]
            turns.append(len(tokens))
            answers.append(rng.randint(50, 250))
            tokens += [rng.randrange(32_000) for _ in range(answers[-1])]
        made.append(Chat(Chain(root()).shorts(tokens, BLOCK), turns, answers))
    return made


def simulate(
    engines: int, gateways: int, *, oracle: bool = False, seed: int = 0, per_engine: int = 50, think_s: float = 7.0,
    seconds: float = 60.0, hot: float = 0.0, blocks: int = 12_000,
) -> Outcome:  # fmt: skip
    rng = random.Random(seed)
    systems = [[rng.randrange(32_000) for _ in range(1024)] for _ in range(4 * engines)]
    fleet = [Engine(f"engine-{i}", blocks) for i in range(engines)]
    names, by_name = [e.name for e in fleet], {e.name: e for e in fleet}
    outlooks = [Outlook(seed=100 + i) for i in range(gateways)]
    events: list[tuple[float, int, Chat]] = []
    for i, chat in enumerate(chats(rng, per_engine * engines, systems, hot)):
        heapq.heappush(events, (rng.uniform(0, 20.0), i, chat))
    first, found, asked, serial, tick = [], 0, 0, len(events), 0
    late: list[tuple[float, list[Report]]] = []
    warm = seconds / 3
    while events and events[0][0] < seconds:
        now, _, chat = heapq.heappop(events)
        while tick * REPORT_S <= now:
            at = tick * REPORT_S
            late.append((at + REPORT_LATE_S, [engine.report(at) for engine in fleet]))
            if tick % int(DIGEST_S / REPORT_S) == 0:
                digests = {engine.name: engine.digest() for engine in fleet}
                for outlook in outlooks:
                    outlook.hold(digests)
            tick += 1
        while late and late[0][0] <= now:
            came, reports = late.pop(0)
            for outlook in outlooks:
                for name, report in zip(names, reports, strict=True):
                    outlook.hear(name, msgspec.structs.asdict(report), came)
        size = chat.turns[chat.turn]
        prompt = Prompt(size, BLOCK, chat.shorts[: size // BLOCK])
        outlook = rng.choice(outlooks)
        if oracle:
            engine = min(fleet, key=lambda e: e.first_token(prompt, now))
        else:
            engine = by_name[names[outlook.rank(names, prompt, now)[0]]]
            outlook.send(engine.name, prompt, now)
        at, end, held = engine.serve(prompt, chat, now)
        if now > warm:
            first.append(at - now)
            found, asked = found + held, asked + size
        chat.turn += 1
        if chat.turn == len(chat.turns):
            chat = chats(rng, 1, systems, hot)[0]
        serial += 1
        heapq.heappush(events, (end + rng.expovariate(1 / think_s), serial, chat))
    p50, p95 = np.quantile(first, [0.5, 0.95]).tolist()
    counts = [engine.requests for engine in fleet]
    return Outcome(found / asked, p50, p95, max(counts) / (sum(counts) / len(counts)))
