"""Stages whose tokens are a hash of what their KV cache holds: a wrong block, slot, count or mask is a wrong token.

They are fed with the real `Batch`, one step after another, as stages work. `said` is what a request must say whatever
happens to it: the same hash, of its tokens alone.
"""

import hashlib

import msgspec
import numpy as np

from cluster.errors import StageDied
from cluster.scheduling.prefix import HASH_BYTES
from cluster.scheduling.sequence import Request
from model.batch import SAMPLED, Batch, Copies, LateMasks, Rules, StepOutput
from model.sampling import uniform

VOCABULARY = 61
GREEDY = Rules(0, 0)
NOWHERE = 10**8  # a block that nobody has
Cells = np.ndarray[tuple[int], np.dtype[np.uint64]]
Table = np.ndarray[tuple[int], np.dtype[np.int32]]


def mixed(*values: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def with_token(context: int, token_id: int, position: int, adapter: str = "") -> int:
    """The key and value of a token: as in a deeper layer they depend on everything before it, and on the adapter."""
    return mixed(context, token_id, position, adapter)


def context_of(kv: Cells) -> int:
    """What attention reads: all keys and values, each at its place."""
    return int((kv * (2 * np.arange(len(kv), dtype=np.uint64) + 1)).sum())


def draw(context: int, position: int, rules: Rules, counts: dict[int, int], mask: bytes) -> int:
    """A token that depends on all that may influence it; `counts`: of what came, how often in the output."""
    drawn = uniform(rules.seed, position) if rules.temperature > 0 else 0.0
    chosen = mixed(context, drawn, rules.temperature, rules.top_k, sorted(counts.items()) if rules.counts else None)
    banned = rules.banned if position < rules.banned_until else ()
    allowed = [t for t in range(VOCABULARY) if t not in banned and (not mask or _bit(mask, t))]
    return allowed[chosen % len(allowed)]


def _bit(mask: bytes, token_id: int) -> bool:
    return token_id // 8 < len(mask) and bool(mask[token_id // 8] >> token_id % 8 & 1)


class FakeStages:
    """One KV cache, and of each slot the newest token, the block table, and how its tokens are drawn."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, kills: set[int]) -> None:
        """`kills`: keys and values whose computation is the stage's death."""
        self._block_size, self._kills = block_size, kills
        self._kv = np.zeros(num_blocks * block_size, np.uint64)
        self._newest = np.zeros(num_slots, np.int32)
        self._tables = np.zeros((num_slots, num_blocks), np.int32)
        self.host: dict[int, tuple[bytes, Cells]] = {}  # by place; it outlives `forget`
        self.forget()

    def forget(self) -> None:
        """The memory is new: whatever is read before it is written is wrong."""
        self._kv[:] = np.arange(len(self._kv), dtype=np.uint64) + np.uint64(10**9)
        self._newest[:] = -7
        self._tables[:] = NOWHERE
        self._rules: dict[int, tuple[Rules, dict[int, int]]] = {}  # by slot, with what has come
        self._adapters: dict[int, str] = {}  # by slot of adapters

    def run(self, batch: Batch, late: LateMasks | None) -> StepOutput:
        masks = batch.masks | (late.masks if late is not None else {})
        assert set(batch.awaited) <= set(masks), "a step is sampled without its mask"
        for rules in batch.rules:
            output = rules.output_ids.tolist()
            self._rules[rules.slot] = rules, {t: output.count(t) for t in [*rules.prompt_ids.tolist(), *output]}
        new_blocks = np.split(batch.new_blocks, np.cumsum(batch.num_new_blocks)[:-1])
        for slot, stop, blocks in zip(batch.slots, batch.num_blocks(self._block_size), new_blocks, strict=True):
            self._tables[slot, stop - len(blocks) : stop] = blocks
        self._adapters |= {placed.slot: placed.digest for placed in batch.placed}
        adapters = [self._adapters[i] if i else "" for i in batch.adapters.tolist()] or [""] * batch.num_seqs
        contexts, at, stays = [], 0, True
        fed = batch.token_ids[np.cumsum(batch.query_lens) - 1].tolist()
        runs = zip(batch.slots, batch.num_computed_tokens, batch.query_lens, adapters, strict=True)
        for slot, start, count, adapter in runs:
            token_ids = [int(self._newest[slot]) if t == SAMPLED else int(t) for t in batch.token_ids[at:][:count]]
            contexts.append(self._compute(self._tables[slot], int(start), token_ids, adapter))
            at += count
        tokens: list[int] = []
        ends = (batch.num_computed_tokens + batch.query_lens).tolist()
        for row, index in enumerate(batch.sample_rows.tolist()):
            slot = int(batch.slots[index])
            rules, counts = self._rules[slot] if row in batch.draws else (GREEDY, {})
            follows = batch.slots[batch.sample_rows[row - 1]] == slot if row else False
            stays = not follows or (stays and tokens[-1] == fed[index])  # it is as if the other tokens were not drawn
            tokens.append(draw(contexts[index], ends[index], rules, counts, masks.get(row, b"")))
            if stays:
                counts[tokens[-1]] = counts.get(tokens[-1], 0) + 1
            self._newest[slot] = tokens[-1] if not follows else -7  # nobody may go on from there unseen
        return StepOutput(batch.epoch, batch.step_id, tokens, {})

    def copy_out(self, copies: Copies) -> None:
        kv = self._kv.reshape(-1, self._block_size)
        for block, place, name in zip(copies.out_blocks, copies.out_places, _hashes(copies.out_hashes), strict=True):
            self.host[int(place)] = name, kv[block].copy()

    def copy_in(self, copies: Copies) -> list[int]:
        """As stages do it: what comes is checked against what it is known by. Returns what is bad."""
        kv, bad = self._kv.reshape(-1, self._block_size), []
        coming = zip(copies.in_places, copies.in_blocks, _hashes(copies.in_hashes), strict=True)
        for i, (place, block, name) in enumerate(coming):
            there = self.host.get(int(place))
            if there is None or there[0] != name:
                bad.append(i)
            kv[block] = there[1] if there is not None and there[0] == name else 77
        return bad

    def _compute(self, table: Table, start: int, token_ids: list[int], adapter: str) -> int:
        """Write the tokens' KV; returns the hash of all there is then, read from the cache."""
        where = np.arange(start + len(token_ids))
        cells = table[where // self._block_size] * self._block_size + where % self._block_size
        for position, token_id in enumerate(token_ids, start):
            written = with_token(context_of(self._kv[cells[:position]]), token_id, position, adapter)
            if written in self._kills:
                raise StageDied(f"token {token_id} at {position}")
            self._kv[cells[position]] = written
        return context_of(self._kv[cells])


def _hashes(joined: bytes) -> list[bytes]:
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]


class FakeMatcher:
    """A constraint that allows every token but some, which depend on those before. Its masks are made when told."""

    def __init__(self, token_ids: list[int], seconds: float, fails_after: int | None) -> None:
        self.ready, self.mask, self.failure, self.seconds = False, b"", None, seconds
        self._token_ids, self._fails_after = list(token_ids), fails_after  # of the answer

    failure: str | None

    def advance(self, token_id: int) -> None:
        self.ready = False
        self._token_ids.append(token_id)

    def make(self) -> None:
        self.mask = mask_of(self._token_ids)
        if self._fails_after is not None and len(self._token_ids) >= self._fails_after:
            self.failure = "no mask"
        self.ready = True


def mask_of(answer: list[int]) -> bytes:
    return hashlib.blake2b(repr(answer).encode(), digest_size=VOCABULARY // 8 + 1).digest()


def said(request: Request, constrained: bool) -> tuple[list[int], list[int]]:
    """The whole answer, computed for this request alone, and the keys and values of prompt and answer."""
    p, tokens = request.sampling, list(request.token_ids)
    adapter = request.adapter.digest if request.adapter is not None else ""
    cache, end = np.zeros(len(tokens) + p.max_tokens, np.uint64), len(tokens)
    for position, token_id in enumerate(tokens):
        cache[position] = with_token(context_of(cache[:position]), token_id, position, adapter)
    answer: list[int] = []
    while len(answer) < p.max_tokens and not (answer and answer[-1] in p.stop_token_ids):
        seen = tokens if p.repetition_penalty != 1.0 else answer
        rules = Rules(
            0, p.seed, p.temperature, p.top_k, banned=p.stop_token_ids, counts=p.needs_counts,
            banned_until=len(request.token_ids) + p.min_tokens,
        )  # fmt: skip
        counts = {t: answer.count(t) for t in seen}
        context = context_of(cache[:end])
        answer.append(draw(context, len(tokens), rules, counts, mask_of(answer) if constrained else b""))
        cache[end] = with_token(context, answer[-1], end, adapter)
        tokens.append(answer[-1])
        end += 1
    return answer, cache[:end].tolist()


def emptied(batch: Batch) -> Batch:
    """As it comes out of the wire: nothing in it is shared with the scheduler that goes on."""
    return msgspec.structs.replace(
        batch,
        **{name: value.copy() for name in batch.__struct_fields__ if hasattr(value := getattr(batch, name), "dtype")},
        masks=dict(batch.masks),
    )
