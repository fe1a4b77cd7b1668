"""The scheduler under whatever may come, as a generator of cases: nothing hangs, the books are right after every step,
every request ends, and what it says is a function of it alone."""

import random
from collections import deque
from dataclasses import dataclass, field

import msgspec
import pytest

from cluster.errors import StageDied
from cluster.pipeline import max_in_flight
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.fairness import Policy
from cluster.scheduling.host_tier import HostTier
from cluster.scheduling.scheduler import Scheduler, SchedulerStats
from cluster.scheduling.sequence import AdapterRef, Request, TokenEvent
from cluster.scheduling.waiting_queue import OVERTAKEN
from model.batch import Batch, Copied, Copies, LateMasks
from model.sampling_params import SamplingParams
from model.text.constraint import Constraint
from tests.cluster.fake_stages import VOCABULARY, FakeMatcher, FakeStages, emptied, said
from tests.conftest import request

QUICK, LONG = 100, 2000  # cases of `make test`, of `make test-long`
STEPS_PER_TOKEN = 12  # that a case may take at most for each token there is to compute


@dataclass
class Case:
    """What happens, all drawn from one seed."""

    rng: random.Random
    depth: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    policy: Policy
    prefix_caching: bool
    abort_rate: float
    restart_rate: float
    mask_rate: float  # how many of the masks that are missing are made between two looks
    lethal: bool  # whether the stages die of what some request makes them compute
    wrong_rate: float | None  # of drafted tokens; None: nothing is drafted
    num_drafted: int | None
    host_places: int = 0  # of copies of blocks; 0: there is no host tier
    damage_rate: float = 0.0  # how often some of them are damaged or lost, or all cached content is forgotten
    max_adapters: int = 0  # slots for adapters; 0: nobody has one
    adapters: str = ""  # that there are: letters
    load_rate: float = 1.0  # how many of those that are wanted have been read between two looks
    requests: list[Request] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)  # request -> tokens after which its matcher fails
    constrained: set[str] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return sum(len(r.token_ids) + r.sampling.max_tokens for r in self.requests)


def case(seed: int) -> Case:
    rng = random.Random(seed)
    block_size, longest = rng.choice([1, 2, 3, 4, 8, 16]), rng.choice([3, 12, 40])
    max_tokens = rng.choice([1, 4, 20])
    least = -(-(longest + max_tokens) // block_size)
    made = Case(
        rng,
        depth=rng.choice([1, 1, 2, 2, 3, 4, 6, 16]),
        block_size=block_size,
        num_blocks=least * rng.choice([1, 1, 2, 4, 20]) + rng.randrange(3),
        max_num_seqs=rng.choice([1, 2, 3, 4, 8, 16]),
        max_num_batched_tokens=rng.choice([2, 5, 16, 64, 512]),
        policy=rng.choice(["fcfs", "longest_first"]),
        prefix_caching=rng.random() < 0.7,
        abort_rate=rng.choice([0.0, 0.0, 0.05]),
        restart_rate=rng.choice([0.0, 0.0, 0.02]),
        mask_rate=rng.choice([1.0, 0.5, 0.1]),
        lethal=rng.random() < 0.2,
        wrong_rate=[None, 0.0, 0.1, 0.5, 1.0][seed % 5],
        num_drafted=[None, 1, 2, 4, 8][seed // 5 % 5],
    )
    if seed % 2:
        made.max_adapters, made.adapters = rng.choice([1, 1, 2, 3]), rng.choice(["x", "xyz", "stuvwxyz"])
        made.load_rate = rng.choice([1.0, 0.5, 0.1])
    stems = [[rng.randrange(VOCABULARY) for _ in range(longest)] for _ in range(2)]
    tenants, priorities = rng.choice(["a", "ab", "abc"]), rng.choice([[0], [0], [0, 0, 5, -1]])
    for i in range(rng.randint(3, 24)):
        _add_request(made, str(i), stems, tenants, priorities, longest, max_tokens)
    return made


def _add_request(
    made: Case, name: str, stems: list[list[int]], tenants: str, priorities: list[int], longest: int, max_tokens: int
) -> None:
    rng, sampling = made.rng, dict[str, object]()
    if rng.random() < 0.3:
        sampling |= {"temperature": 0.8, "top_k": rng.randrange(9)}
    if rng.random() < 0.2:
        sampling |= {"presence_penalty": 0.5}
    if rng.random() < 0.3:
        sampling |= {"stop_token_ids": tuple(rng.sample(range(VOCABULARY), 6)), "min_tokens": rng.randint(0, 1)}
    if rng.random() < 0.2:
        made.constrained.add(name)
        sampling["constraint"] = Constraint("regex", "see FakeMatcher", ())
        if rng.random() < 0.2:
            made.failing[name] = rng.randint(0, max_tokens)
    length = 1 if rng.random() < 0.35 else rng.randint(1, longest)
    prompt = rng.choice(stems)[: rng.randint(0, length)]
    prompt = prompt + [rng.randrange(VOCABULARY) for _ in range(length - len(prompt))]
    made.requests.append(
        Request(
            request_id=name,
            token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=rng.randint(1, max_tokens), seed=rng.randrange(9), **{"temperature": 0.0, **sampling}  # type: ignore[arg-type]
            ),
            tenant=rng.choice(tenants),
            weight=rng.choice([1.0, 1.0, 4.0]),
            priority=rng.choice(priorities),
            adapter=AdapterRef(rng.choice(made.adapters), "") if made.adapters and rng.random() < 0.7 else None,
        )
    )  # fmt: skip


class Replay:
    """Drafts what will be said, but for some tokens."""

    def __init__(self, answers: dict[str, list[int]], wrong_rate: float, rng: random.Random) -> None:
        self._answers, self._wrong_rate, self._rng = answers, wrong_rate, rng

    def drafter(self, request: Request) -> "Replay | None":
        if self._rng.random() < 0.2:
            return None
        return Replay({"": [*request.token_ids, *self._answers[request.request_id]]}, self._wrong_rate, self._rng)

    def draft(self, token_ids: list[int], most: int) -> list[int]:
        told = self._answers[""]
        assert token_ids == told[: len(token_ids)]
        draft = told[len(token_ids) :][: most if self._rng.random() < 0.9 else self._rng.randint(0, most)]
        return [(t + 1) % VOCABULARY if self._rng.random() < self._wrong_rate else t for t in draft]


class Run:
    """The scheduler and stages of a case, driven as the engine drives them, and what comes out."""

    def __init__(self, made: Case) -> None:
        self.case, self.rng = made, made.rng
        self.expected = {r.request_id: said(r, r.request_id in made.constrained) for r in made.requests}
        self.host = HostTier(made.host_places, self.rng.choice([1, 3, 50]), made.depth) if made.host_places else None
        self.scheduler = Scheduler(
            BlockManager(made.num_blocks, made.block_size, made.prefix_caching, self.host),
            depth=made.depth,
            max_num_seqs=made.max_num_seqs,
            max_num_batched_tokens=made.max_num_batched_tokens,
            max_model_len=1000,
            policy=made.policy,
            max_adapters=made.max_adapters,
        )
        if made.wrong_rate is not None:
            answers = {name: answer for name, (answer, _) in self.expected.items()}
            self.scheduler.speculate(Replay(answers, made.wrong_rate, random.Random(0)), made.num_drafted)
        doomed = self.rng.sample(made.requests, 2) if made.lethal else []
        self.lethal = {self.rng.choice(self.expected[r.request_id][1]) for r in doomed}
        self.ends = {name: self._end(name, *expected) for name, expected in self.expected.items()}
        self.stages = FakeStages(made.num_blocks, made.block_size, made.max_num_seqs, self.lethal)
        self.deaths = 0
        self.matchers: dict[str, FakeMatcher] = {}
        self.events: dict[str, list[TokenEvent]] = {r.request_id: [] for r in made.requests}
        self.aborted: set[str] = set()
        self._to_come = deque(made.requests)
        self._in_flight: deque[tuple[Batch, Batch]] = deque()  # as scheduled, and as the stages got it
        self._copies: deque[tuple[int, Copies]] = deque()  # behind so many batches of those in flight
        self._arriving: list[Copies] = []  # what comes in: at any time
        self._said: list[Copied] = []  # by the stages, not heard yet
        self._late: dict[int, LateMasks] = {}

    def _end(self, name: str, answer: list[int], cache: list[int]) -> tuple[int, str | None]:
        """How many tokens it says, and of what it fails."""
        num_prompt = len(cache) - len(answer)
        computed = next((i for i, entry in enumerate(cache[:-1]) if entry in self.lethal), len(cache))
        tokens = max(0, computed - num_prompt + 1)
        fails_after = self.case.failing.get(name, len(answer))
        if fails_after < min(tokens, len(answer)):
            return fails_after, "no mask"
        return (tokens, "a stage died 3 times") if tokens < len(answer) else (len(answer), None)

    def run(self) -> None:
        steps, bound = 0, 50 + STEPS_PER_TOKEN * self.case.num_tokens
        while self._to_come or self.scheduler.has_work:
            steps += 1
            assert steps < bound, f"not done after {steps} steps"
            self._disturb()
            self.step()

    def step(self) -> None:
        """Fill the pipeline, and take the oldest result."""
        while len(self._in_flight) < max_in_flight(self.case.depth) and self._schedule():
            pass
        made, copied, loaded = self._make_masks(), self._copy(), self._load_adapters()
        if not self._in_flight:
            some = self._to_come or made or copied or loaded
            assert some or not self.scheduler.has_work, "nothing is computed any more"
        elif not self._in_flight[0][0].awaited or self._in_flight[0][0].step_id in self._late:
            self._finish()
        elif self.rng.random() < 0.05:
            self.scheduler.give_up_masks(self._in_flight[0][0].step_id)
        self.scheduler.check()

    def _schedule(self) -> bool:
        batch = self.scheduler.schedule()
        if batch is not None:
            assert 0 < batch.num_tokens <= max(self.case.max_num_batched_tokens, 1)
            self._in_flight.append((batch, emptied(batch)))
        if (copies := self.scheduler.copies()) is not None:
            self._copies.append((len(self._in_flight), copies))
        return batch is not None

    def _copy(self) -> bool:
        """What the stages copy now, in their order; what comes in does so when it likes. False if there was nothing."""
        is_busy = bool(self._copies or self._arriving or self._said)
        while self._copies and self._copies[0][0] == 0:
            _, copies = self._copies.popleft()
            self.stages.copy_out(copies)
            self._arriving.append(copies)
        for copies in [c for c in self._arriving if self.rng.random() < 0.5]:
            self._arriving.remove(copies)
            bad = self.stages.copy_in(copies)
            for stage in range(self.case.depth):
                said = bad if stage == self.case.depth - 1 else []
                self._said.append(Copied(copies.epoch, copies.number, stage, said))
        for said_now in [s for s in self._said if self.rng.random() < 0.7]:
            self._said.remove(said_now)
            self.scheduler.copied(said_now)
        return is_busy

    def _finish(self) -> None:
        batch, sent = self._in_flight.popleft()
        self._copies = deque((behind - 1, copies) for behind, copies in self._copies)
        try:
            output = self.stages.run(sent, self._late.pop(batch.step_id, None))
        except StageDied:
            self.deaths += 1
            self.take(self.lose_stages(accuse=True))
        else:
            self.take(self.scheduler.update(batch, output))

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)
            if event.finish_reason is not None:
                self.matchers.pop(event.request_id, None)

    def come(self, likely: float = 1.0) -> None:
        """The next requests: none or some, or all of them."""
        while self._to_come and self.rng.random() < likely:
            new = self._to_come.popleft()
            name = new.request_id
            if name in self.case.constrained:
                seconds = self.rng.choice([1e-4, 0.02, 1.0])
                self.matchers[name] = FakeMatcher(new.output_ids, seconds, self.case.failing.get(name))
            self.scheduler.add(new, self.matchers.get(name))

    def _disturb(self) -> None:
        """Requests come and go, stages are lost."""
        self.come(0.4)
        if self.rng.random() < self.case.abort_rate:
            name = self.rng.choice(self.case.requests).request_id
            if all(new.request_id != name for new in self._to_come):
                self.scheduler.abort(name)
                self.matchers.pop(name, None)
                self.aborted.add(name)
        if self.rng.random() < self.case.damage_rate:
            self._damage()
        if self.rng.random() < self.case.restart_rate:
            self.take(self.lose_stages(accuse=False))

    def _damage(self) -> None:
        """Copies are no longer what they were, or gone with their node; or an operator wants them forgotten."""
        what = self.rng.choice(["some", "some", "all", "forget"])
        for place in [*self.stages.host]:
            if what == "some" and self.rng.random() < 0.2:
                self.stages.host[place] = b"damaged", self.stages.host[place][1]
        if what == "all":
            self.stages.host.clear()
        elif what == "forget":
            self.scheduler.forget_cache()

    def lose_stages(self, accuse: bool) -> list[TokenEvent]:
        for pending in (self._in_flight, self._copies, self._arriving):
            pending.clear()  # but not what they have said: it comes late
        self._late.clear()
        self.stages.forget()
        return self.scheduler.restart(accuse)

    def _make_masks(self) -> bool:
        """Some of those that are missing; False if none was."""
        missing = [matcher for matcher in self.matchers.values() if not matcher.ready]
        for matcher in missing:
            if self.rng.random() < self.case.mask_rate:
                matcher.make()
        while (late := self.scheduler.next_masks()) is not None:
            self._late[late.step_id] = late
        return bool(missing)

    def _load_adapters(self) -> bool:
        """Some of those that are wanted; False if all are there."""
        missing = set(self.case.adapters) - self.scheduler.adapters.held
        self.scheduler.adapters.held |= {name for name in sorted(missing) if self.rng.random() < self.case.load_rate}
        return bool(missing)

    def check(self) -> None:
        """Every request ended, and said what it says alone."""
        if self.host is not None and self.host.num_orders:  # loads of requests that are gone may be under way
            self.take(self.scheduler.restart(accuse=False))
        assert self.scheduler.stats().kv_blocks_used == 0
        for name, events in self.events.items():
            count, error = self.ends[name]
            tokens = [event.token_id for event in events if event.finish_reason != "error"]
            assert tokens == self.expected[name][0][: len(tokens)], f"{name} says something else"
            if name not in self.aborted:
                assert len(tokens) == count, f"{name} did not end as it should"
                assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
                assert (events[-1].error or "")[: len(error or "")] == (error or ""), f"{name}: {events[-1]}"
        # The last token of an answer counts: of one that ends with a stop token it may be computed ahead of that.
        guilty = sum(not self.lethal.isdisjoint(cache) for _, cache in self.expected.values())
        assert self.deaths <= 3 * guilty, f"{self.deaths} deaths for {guilty} requests"


def with_host_tier(made: Case, seed: int) -> Case:
    """The same, with copies of blocks: many stages are lost, for that is what they are kept for."""
    rng = random.Random(seed)
    made.prefix_caching = True
    made.host_places = rng.choice([1, 3, made.num_blocks, 4 * made.num_blocks])
    made.damage_rate = rng.choice([0.0, 0.05, 0.2])
    made.restart_rate = rng.choice([made.restart_rate, 0.05])
    return made


def fuzz(seeds: range, host: bool = False) -> list[SchedulerStats]:
    found = []
    for seed in seeds:
        run = Run(with_host_tier(case(seed), seed) if host else case(seed))
        try:
            run.run()
            run.check()
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {error}") from error
        found.append(run.scheduler.stats())
    return found


def test_whatever_comes() -> None:
    fuzz(range(QUICK))


def test_whatever_comes_with_a_host_tier() -> None:
    """Not in vain: much is copied back, and much of that was damaged."""
    stats = fuzz(range(QUICK), host=True)
    print(*((s.host_hit_tokens, s.host) for s in stats))
    assert sum(s.host_hit_tokens for s in stats) > 200
    assert sum(s.host.damaged for s in stats) > 15
    assert sum(s.host.evicted for s in stats) > 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_comes_two_thousand_times() -> None:
    fuzz(range(QUICK, LONG))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_comes_two_thousand_times_with_a_host_tier() -> None:
    fuzz(range(QUICK, LONG), host=True)


def undisturbed(requests: list[Request], depth: int, wrong_rate: float | None = None) -> Case:
    return Case(
        random.Random(0), depth, block_size=4, num_blocks=600, max_num_seqs=64, max_num_batched_tokens=256,
        policy="fcfs", prefix_caching=True, abort_rate=0.0, restart_rate=0.0, mask_rate=1.0, lethal=False,
        wrong_rate=wrong_rate, num_drafted=4, requests=requests,
    )  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 11, 17])
def test_who_kills_its_stages_is_found_among_64_and_ends_alone(depth: int, position: int) -> None:
    """By a token of its prompt, the first that it says, or a later one."""
    prompts = [[i, *range(11)] for i in range(65)]
    run = Run(undisturbed([request(str(i), prompt, max_tokens=20) for i, prompt in enumerate(prompts)], depth))
    guilty = "62"
    run.lethal |= {run.expected[guilty][1][position]}
    run.ends[guilty] = (max(0, position - 11), "a stage died 3 times")
    run.stages = FakeStages(600, 4, 64, run.lethal)
    run.run()
    run.check()
    assert run.deaths == 3
    assert [name for name, events in run.events.items() if events[-1].error] == [guilty]


def test_a_death_that_nobody_is_to_blame_for_costs_a_few_steps() -> None:
    """Suspects are computed once more, each for itself; whoever arrives meanwhile does not wait for that."""
    run = Run(undisturbed([request(str(i), [i] * 9, max_tokens=40) for i in range(32)], depth=2))
    steps = 0
    run.come()
    while not all(len(events) > 10 for events in run.events.values()):
        run.step()
    run.take(run.lose_stages(accuse=True))
    run.scheduler.add(request("new", [7] * 30, max_tokens=2))
    run.events["new"] = []
    while not run.events["new"]:
        run.step()
        steps += 1
    assert steps < 12
    while any(seq.num_deaths for seq in run.scheduler._running):
        run.step()
        steps += 1
    assert steps < 100


def with_adapter(name: str, adapter: str, tokens: int = 20, tenant: str = "a") -> Request:
    made = request(name, [1, 2, 3], max_tokens=tokens)
    return msgspec.structs.replace(made, adapter=AdapterRef(adapter, "") if adapter else None, tenant=tenant)


def test_who_waits_for_a_slot_holds_nobody_up() -> None:
    """Of two adapters and one slot the second waits; what comes after it, without one or with the first, does not."""
    requests = [with_adapter("0", "x", 200), with_adapter("1", "y"), with_adapter("2", ""), with_adapter("3", "x")]
    made = undisturbed(requests, depth=2)
    made.max_adapters, made.adapters = 1, "xy"
    run = Run(made)
    run.scheduler.adapters.held |= {"x", "y"}
    run.come()
    while len(run.events["3"]) < 20 or len(run.events["2"]) < 20:
        run.step()
    assert not run.events["1"]
    assert len(run.events["0"]) < 100
    run.run()
    run.check()


def test_who_has_been_overtaken_often_gets_a_slot() -> None:
    """A stream of requests with one adapter, of which always one runs: the other one's turn comes all the same."""
    requests = [with_adapter(str(i), "x", 6 + i % 5) for i in range(3)] + [with_adapter("late", "y", 4)]
    requests += [with_adapter(str(i), "x", 6 + i % 5) for i in range(3, 400)]
    made = undisturbed(requests, depth=1)
    made.max_adapters, made.adapters, made.max_num_seqs = 1, "xy", 3
    run = Run(made)
    run.scheduler.adapters.held |= {"x", "y"}
    run.come()
    while not run.events["late"]:
        run.step()
    done = sum(bool(events) and events[-1].finish_reason is not None for events in run.events.values())
    assert OVERTAKEN <= done <= OVERTAKEN + 10
    run.run()
    run.check()


def test_a_new_version_does_not_meet_the_blocks_of_the_old_one() -> None:
    """Nor those of no adapter: the same prompt, one after another, each of which finds its own again."""
    made = undisturbed([], depth=1)
    made.max_adapters, made.adapters = 2, "xy"
    run = Run(made)
    run.scheduler.adapters.held |= {"x", "y"}
    hits = []
    for i, adapter in enumerate(["", "x", "y", "", "x", "y"]):
        one = msgspec.structs.replace(with_adapter(str(i), adapter), token_ids=list(range(40)))
        run.expected[one.request_id], run.events[one.request_id] = said(one, False), []
        run.scheduler.add(one)
        before = run.scheduler.stats().prefix_hit_tokens
        while run.scheduler.has_work:
            run.step()
        assert [e.token_id for e in run.events[one.request_id]] == run.expected[one.request_id][0]
        hits.append(run.scheduler.stats().prefix_hit_tokens - before)
    assert hits == [0, 0, 0, 36, 36, 36]
