"""The last stage's memory of how each running sequence's tokens are drawn, and the drawing of a step's tokens.

Legend: R rows of logits (one per token that is sampled), N rows that follow rules, V vocabulary, S slots.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model import sampling
from model.batch import Batch, Int32Array, Rules
from model.sampling import Draws, RowLogprobs, Sampled, likeliest, uniforms
from model.transfer import all_to_device, to_device

log = logging.getLogger(__name__)

MOST_TIMES = 32_767  # that a token is counted: 16 bits
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
KEPT = np.dtype(
    [("seed", "u8"), ("top_k", "i8"), ("logprobs", "i4"), ("banned_until", "i4"), ("num_seen", "i4"), ("counts", "?")]
    + [(name, "f8") for name in FLOATS]
)


class SeenTokens:
    """The distinct tokens of each slot, and how often each stands in the output: what penalties look at.

    On the device, where sampled tokens are counted without the host's knowing them. Dense counts make it safe to look
    at any token: a list of those that came need only have them all, and may have others, as a former owner's.
    """

    def __init__(self, num_slots: int, vocab_size: int, most: int, device: torch.device) -> None:
        """`most` tokens a sequence has at most."""
        self._vocab, self._most = vocab_size, min(most, vocab_size)
        # 0: it did not come; otherwise 1 + how often in the output. 2 bytes per slot and word of the vocabulary.
        self._counts = torch.zeros(num_slots, vocab_size, dtype=torch.int16, device=device)
        self._ids = torch.zeros(num_slots, self._most + 1, dtype=torch.int32, device=device)  # one more: overwritten
        self._num_ids = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def begin(self, rules: list[Rules]) -> list[int]:
        """New sequences with what they have seen; returns how many distinct tokens that are."""
        slots = np.array([one.slot for one in rules])
        ids, seen = zip(*(_seen_before(one, self._vocab) for one in rules), strict=True)
        sizes = np.array([len(part) for part in ids])
        each = np.repeat(slots, sizes)
        within = np.arange(len(each)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        flat = np.concatenate(ids)
        arrays = [slots, sizes, each * self._vocab + flat, np.concatenate(seen), each * (self._most + 1) + within, flat]
        slots_, sizes_, where, counts, places, listed = all_to_device(arrays, torch.int64, self._counts.device)
        self._counts.index_fill_(0, slots_, 0)
        self._counts.view(-1).index_copy_(0, where, counts.to(torch.int16))
        self._ids.view(-1).index_copy_(0, places, listed.int())
        self._num_ids.index_copy_(0, slots_, sizes_)
        found: list[int] = sizes.tolist()
        return found

    def look(self, slots: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For `slots` [N]: tokens [N, width], among which are all that came, and their counts."""
        ids = self._ids[:, : min(width, self._most)].index_select(0, slots).long()
        return ids, self._counts.view(-1)[slots.unsqueeze(1) * self._vocab + ids].int()

    def count(self, slots: torch.Tensor, tokens: torch.Tensor, stays: torch.Tensor) -> None:
        """One token more for each of `slots` [N] where it `stays` [N]."""
        where = slots * self._vocab + tokens
        before = self._counts.view(-1)[where].int()
        num_ids = self._num_ids[slots]
        self._ids.view(-1)[slots * (self._most + 1) + num_ids] = tokens.int()
        self._num_ids[slots] = num_ids + (stays & (before == 0))
        after = torch.where(stays, before.clamp(min=1) + 1, before)
        self._counts.view(-1)[where] = after.clamp(max=MOST_TIMES).to(torch.int16)


def _seen_before(rules: Rules, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct tokens that came already, and 1 + how often each in the output."""
    ids, times = np.unique(np.concatenate((rules.prompt_ids, rules.output_ids)), return_counts=True)
    seen = times + ~np.isin(ids, rules.prompt_ids)  # the prompt's are said once each
    known = (ids >= 0) & (ids < vocab_size)
    return ids[known].astype(np.int64), np.minimum(seen[known], MOST_TIMES)


@dataclass(frozen=True, slots=True)
class Rows:
    """Those of a step that follow rules."""

    rows: Int32Array  # [N] of the logits
    slots: Int32Array  # [N]
    positions: Int32Array  # [N] where the token that is drawn will stand
    fed: Int32Array  # [N] the token that each follows, as the host knows it
    places: Int32Array  # [N] among those of their sequence: what is behind the first follows drafted tokens
    masks: list[bytes]

    @classmethod
    def of(cls, batch: Batch, masks: dict[int, bytes]) -> "Rows":
        runs = batch.sample_rows[batch.draws]
        slots, number = batch.slots[runs], np.arange(len(runs), dtype=np.int32)
        first = np.append(True, slots[1:] != slots[:-1])
        places = number - np.maximum.accumulate(np.where(first, number, 0))
        positions = (batch.num_computed_tokens + batch.query_lens)[runs]
        fed = batch.token_ids[batch.sample_tokens[batch.draws]]
        return cls(batch.draws, slots, positions, fed, places, [masks.get(row, b"") for row in batch.draws.tolist()])

    def part(self, which: npt.NDArray[np.intp]) -> "Rows":
        rows, slots, positions = self.rows[which], self.slots[which], self.positions[which]
        masks = [self.masks[i] for i in which.tolist()]
        return Rows(rows, slots, positions, self.fed[which], self.places[which], masks)

    def turns(self, counts: npt.NDArray[np.bool_]) -> list["Rows"]:
        """What is drawn together, in order: of those that look at what came each row after the one before it."""
        if not self.places.any():
            return [self]
        turn = np.where(counts, self.places, 0)
        return [self.part(np.flatnonzero(turn == i)) for i in range(int(turn.max()) + 1)]


class Drawn:
    """The tokens of a step, row by row."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens  # [R]
        self.stays = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)  # [R] what is before it was right
        self.logprobs: list[RowLogprobs] = []
        self.errors: dict[int, str] = {}

    def staying(self, rows: torch.Tensor, drawn: Rows) -> torch.Tensor:
        """[N] Which of `rows`, those of `drawn`, follow tokens that were drawn: the others' are not taken."""
        if drawn.places.any():
            fed = to_device(drawn.fed, torch.int64, rows.device)
            self.stays[rows] = self.stays[rows - 1] & (self.tokens[rows - 1] == fed)
        return self.stays[rows]


class Changes:
    """Elements of x that are changed and may be put back. None is named twice at once, unless with the same value."""

    def __init__(self, x: torch.Tensor) -> None:
        self._flat = x.view(-1)
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def make(self, where: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Of what stands at `where` in x, row after row."""
        old = self._flat[where]
        self._flat[where] = change(old)
        self._before.append((where, old))

    def undo(self) -> None:
        while self._before:
            where, old = self._before.pop()
            self._flat[where] = old


class Sampler:
    """Draws the tokens of steps, in their order. What a sequence's rules are is told once, with its first draw."""

    def __init__(self, num_slots: int, vocab_size: int, max_model_len: int, device: torch.device) -> None:
        self._device, self._vocab = device, vocab_size
        self._kept: npt.NDArray[Any] = np.zeros(num_slots, KEPT)
        self._bias: dict[int, tuple[Int32Array, list[float]]] = {}  # by slot, of those that have any
        self._banned: dict[int, Int32Array] = {}
        self._unusable: dict[int, str] = {}  # by slot: what is wrong with its rules
        self._seen = SeenTokens(num_slots, vocab_size, max_model_len, device)

    def sample(self, batch: Batch, logits: torch.Tensor, masks: dict[int, bytes]) -> Sampled:
        """One token per row of logits [R, V] float32 (which may be changed): the likeliest, or as its slot's rules say.

        `masks`: by row, bit i, lowest first: token i may be drawn. Logprobs are of the raw logits. A row that cannot be
        sampled is reported in `errors`; the others do not notice.
        """
        self._tell(batch)
        if not len(batch.draws):
            return Sampled(likeliest(logits))
        rows = Rows.of(batch, masks)
        all_draw = len(batch.draws) == len(logits)
        tokens = torch.zeros(len(logits), dtype=torch.int64, device=self._device) if all_draw else likeliest(logits)
        drawn = Drawn(tokens)
        for turn in rows.turns(self._kept["counts"][rows.slots]):
            self._draw_turn(logits, drawn, turn)
        return Sampled(tokens, drawn.logprobs, errors=drawn.errors)

    def _draw_turn(self, logits: torch.Tensor, drawn: Drawn, turn: Rows) -> None:
        """What goes wrong with a row stays its own; a device that has failed is nobody's own."""
        try:
            if not any(slot in self._unusable for slot in turn.slots.tolist()):
                self._draw(logits, drawn, turn)
                return
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("rows could not be sampled together: each is alone")
        for i, (row, slot) in enumerate(zip(turn.rows.tolist(), turn.slots.tolist(), strict=True)):
            if slot in self._unusable:
                drawn.errors[row] = self._unusable[slot]
                continue
            try:
                self._draw(logits, drawn, turn.part(np.array([i])))
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.exception("a row could not be sampled")
                drawn.errors[row] = f"{type(error).__name__} in the sampler"

    def _tell(self, batch: Batch) -> None:
        for one in batch.rules:
            kept, slot = self._kept[one.slot], one.slot
            kept["seed"], kept["logprobs"], kept["banned_until"] = one.seed % 2**64, one.logprobs, one.banned_until
            kept["top_k"] = min(one.top_k or self._vocab, self._vocab)
            kept["counts"] = one.counts
            for name in FLOATS:
                kept[name] = getattr(one, name)
            for sparse in (self._bias, self._banned, self._unusable):
                sparse.pop(slot, None)
            if one.logit_bias:
                self._bias[slot] = np.array(list(one.logit_bias), np.int32), list(one.logit_bias.values())
            if one.banned:
                self._banned[slot] = np.array(one.banned, np.int32)
            unknown = [i for i in (*one.logit_bias, *one.banned) if not 0 <= i < self._vocab]
            if unknown:
                self._unusable[slot] = f"token {unknown[0]} is not among the model's {self._vocab}"
        if counted := [one for one in batch.rules if one.counts]:
            slots, stops = [one.slot for one in counted], batch.num_computed_tokens + batch.query_lens
            first = dict(zip(batch.slots[::-1].tolist(), stops[::-1].tolist(), strict=True))  # place that is drawn
            self._kept["num_seen"][slots] = np.subtract(self._seen.begin(counted), [first[slot] for slot in slots])

    def _draw(self, logits: torch.Tensor, drawn: Drawn, turn: Rows) -> None:
        """Put in what is drawn for these rows."""
        rules, device = self._kept[turn.slots], self._device
        rows, slots = all_to_device([turn.rows, turn.slots], torch.int64, device)
        whole = len(rows) == len(logits) and not any(turn.masks)
        x = logits if whole else logits.index_select(0, rows)
        changes = Changes(x)
        try:
            self._adjust(x, changes, slots, turn, rules)
            chosen = self._choose(x, turn, rules)
        except Exception:
            changes.undo()  # each row is then drawn alone
            raise
        if (rules["logprobs"] >= 0).any():
            changes.undo()
        logprobs = self._logprobs(logits, rows, chosen, turn, rules)
        drawn.tokens[rows] = chosen
        drawn.logprobs += logprobs
        if (counted := np.flatnonzero(rules["counts"])).size:
            at = to_device(counted, torch.int64, device)
            self._seen.count(slots[at], chosen[at], drawn.staying(rows[at], turn.part(counted)))

    def _choose(self, x: torch.Tensor, drawn: Rows, rules: npt.NDArray[Any]) -> torch.Tensor:
        """A token per row of logits x [N, V], in the way of its temperature and filters."""
        random = rules["temperature"] > 0
        filtered = random & ((rules["top_k"] < self._vocab) | (rules["top_p"] < 1) | (rules["min_p"] > 0))
        chosen = likeliest(x) if not random.all() else x.new_zeros(len(x), dtype=torch.int64)
        for draw, which in ((sampling.draw_plain, random & ~filtered), (sampling.draw_filtered, filtered)):
            if which.all():
                chosen = draw(x, _columns(rules, drawn.positions, self._device))
            elif which.any():
                at = to_device(np.flatnonzero(which), torch.int64, self._device)
                chosen[at] = draw(x[at], _columns(rules[which], drawn.positions[which], self._device))
        return chosen

    def _adjust(
        self, x: torch.Tensor, changes: Changes, slots: torch.Tensor, drawn: Rows, rules: npt.NDArray[Any]
    ) -> None:
        """Whatever changes logits x [N, V] before a token is chosen."""
        width = int((rules["num_seen"] + drawn.positions)[rules["counts"]].max(initial=0))
        if width:
            counted = np.flatnonzero(rules["counts"])
            at = to_device(counted, torch.int64, self._device).unsqueeze(1)
            ids, seen = self._seen.look(slots[at.squeeze(1)], width)
            penalties = np.stack([rules[name][counted] for name in ("repetition", "presence", "frequency")])
            columns = to_device(penalties, x.dtype, self._device).unsqueeze(-1)
            changes.make(at * self._vocab + ids, lambda old: sampling.penalised(old, seen, *columns.unbind()))
        biased = [(i, *self._bias[slot]) for i, slot in enumerate(drawn.slots.tolist()) if slot in self._bias]
        if biased:
            places = np.concatenate([i * self._vocab + ids.astype(np.int64) for i, ids, _ in biased])
            added = to_device([value for _, _, values in biased for value in values], x.dtype, self._device)
            changes.make(to_device(places, torch.int64, self._device), lambda old: old + added)
        early = np.flatnonzero(drawn.positions < rules["banned_until"])
        banned = [(i, self._banned[slot]) for i in early.tolist() if (slot := int(drawn.slots[i])) in self._banned]
        if banned:
            places = np.concatenate([i * self._vocab + ids.astype(np.int64) for i, ids in banned])
            changes.make(to_device(places, torch.int64, self._device), lambda old: torch.full_like(old, -torch.inf))
        if masked := [i for i, mask in enumerate(drawn.masks) if mask]:
            sampling.mask(x, masked, [drawn.masks[i] for i in masked])

    def _logprobs(
        self, logits: torch.Tensor, rows: torch.Tensor, chosen: torch.Tensor, drawn: Rows, rules: npt.NDArray[Any]
    ) -> list[RowLogprobs]:
        wanted = np.flatnonzero(rules["logprobs"] >= 0)
        if not wanted.size:
            return []
        at, counts = to_device(wanted, torch.int64, self._device), rules["logprobs"][wanted].tolist()
        values = logits.index_select(0, rows[at]).log_softmax(-1)
        found = sampling.logprobs_of(values, chosen[at], min(max(counts), self._vocab))
        return [RowLogprobs(drawn.rows[wanted].tolist(), counts, found)]


def _columns(rules: npt.NDArray[Any], positions: Int32Array, device: torch.device) -> Draws:
    warm, drawn = np.maximum(rules["temperature"], 1e-5), uniforms(rules["seed"], positions)
    values = np.stack([warm, rules["top_k"], rules["top_p"], rules["min_p"], drawn])
    columns = to_device(values, torch.float64, device).unsqueeze(-1)
    temperature, top_k, top_p, min_p = columns[:4].float().unbind()
    return Draws(temperature, top_k, top_p, min_p, columns[4])
