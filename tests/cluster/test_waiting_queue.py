"""Who is served next, and who makes way: tenants share one engine by tokens."""

import time
from collections import deque

import msgspec
import pytest

from cluster.scheduling.account import INPUT_WEIGHT, OUTPUT_WEIGHT
from cluster.scheduling.adapters import AdapterRoom
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.fairness import Fairness, Policy
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request, Sequence
from cluster.scheduling.waiting_queue import WaitingQueue
from model.batch import StepOutput
from tests.cluster.test_engine import PROMPTS, naive
from tests.conftest import MakeEngine, request


def of(tenant: str, name: str, tokens: int = 10, max_tokens: int = 16, **more: object) -> Request:
    return msgspec.structs.replace(request(name, [5] * tokens, max_tokens), tenant=tenant, **more)  # type: ignore[arg-type]


def queue_of(*requests: Request, slack: float = 0.0, policy: Policy = "fcfs") -> WaitingQueue:
    queue = WaitingQueue(Fairness(max_num_seqs=8, num_blocks=100, slack=slack, policy=policy), AdapterRoom(0))
    for arrival, request_ in enumerate(requests):
        queue.add(Sequence(request_, arrival))
    return queue


def serve(queue: WaitingQueue, tokens: int | None = None) -> str:
    """Take who is next and compute all of its prompt, or so many tokens; returns its name."""
    seq = queue.next()
    assert seq is not None
    queue.serve(seq)
    seq.charge(0, tokens or seq.num_tokens)
    return seq.request_id


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = queue_of(*(of("", str(i)) for i in range(5)))
    assert queue.num_tokens == 50
    assert [serve(queue) for _ in range(5)] == list("01234")
    assert (len(queue), queue.num_tokens, queue.next()) == (0, 0, None)


def test_the_longest_goes_first_where_that_is_asked_for() -> None:
    """Of a tenant's equally urgent requests."""
    lengths = {"a": 8, "b": 64, "c": 8, "d": 32, "f": 16}
    requests = [of("", name, max_tokens=n) for name, n in lengths.items()]
    urgent = of("", "u", max_tokens=4, priority=-1)
    queue = queue_of(*requests, urgent, policy="longest_first")
    assert queue.remove("f") is not None
    assert [serve(queue) for _ in range(5)] == ["u", "b", "d", "a", "c"]
    assert len(queue) == 0


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "unrab"), ("longest_first", "urnba")])
def test_streams_from_elsewhere_go_on_before_others_begin(policy: Policy, order: str) -> None:
    """Somebody reads them. What has tokens already is as long as what is left of it."""
    new = [of("", "a", max_tokens=20), of("", "b", max_tokens=64)]
    resumed = [of("", name, max_tokens=80, output_ids=[5] * n) for name, n in (("n", 78), ("r", 70))]
    urgent = of("", "u", max_tokens=4, priority=-1)
    queue = queue_of(*new, *resumed, urgent, policy=policy)
    assert "".join(serve(queue) for _ in range(5)) == order


def test_tenants_share_whoever_is_longest() -> None:
    """The other one's requests are all longer: that gives it nothing."""
    queue = queue_of(
        *(of("long", f"l{i}", max_tokens=64) for i in range(40)), *(of("short", f"s{i}") for i in range(40)),
        policy="longest_first",
    )  # fmt: skip
    served = [serve(queue)[0] for _ in range(40)]
    assert served.count("s") == 20


def test_tokens_are_shared_not_requests() -> None:
    """Long prompts of one, short ones of the other: in the end both had as many tokens."""
    queue = queue_of(*(of("long", f"l{i}", 60) for i in range(10)), *(of("short", f"s{i}", 10) for i in range(60)))
    served = [serve(queue) for _ in range(35)]
    assert sum(name[0] == "l" for name in served) == 5
    assert sum(name[0] == "s" for name in served) == 30


def test_a_weight_is_a_larger_share() -> None:
    queue = queue_of(*(of("a", f"a{i}", weight=3.0) for i in range(40)), *(of("b", f"b{i}") for i in range(40)))
    served = [serve(queue)[0] for _ in range(40)]
    assert served.count("a") == 30


def test_idleness_buys_nothing() -> None:
    queue = queue_of(*(of("busy", f"a{i}") for i in range(100)))
    for _ in range(50):
        serve(queue)
    for i in range(50):
        queue.add(Sequence(of("late", f"b{i}"), 1000 + i))
    served = [serve(queue)[0] for _ in range(20)]
    assert served.count("b") == 10, "it shares from now on; it does not catch up"


def test_leaving_does_not_clear_the_account() -> None:
    queue = queue_of(*(of("a", f"a{i}", 100) for i in range(3)), *(of("b", f"b{i}", 10) for i in range(60)))
    for _ in range(3):
        seq = next(s for s in queue if s.request.tenant == "a")
        queue.remove(seq.request_id)
        seq.charge(0, 100)
    queue.add(Sequence(of("a", "again", 10), 500))
    assert {serve(queue)[0] for _ in range(25)} == {"b"}


def test_priorities_come_first_and_the_preempted_come_back_to_the_head() -> None:
    queue = queue_of(of("a", "normal"), of("b", "urgent", priority=-1), of("a", "batch", priority=5), of("a", "second"))
    assert serve(queue) == "urgent"
    first = queue.remove("normal")
    assert first is not None
    queue.push(first.again())
    assert [serve(queue) for _ in range(3)] == ["normal", "second", "batch"]


def test_what_is_computed_again_is_not_charged_again() -> None:
    queue = queue_of(of("a", "x", 10))
    seq = queue.remove("x")
    assert seq is not None
    account = queue.account(seq)
    seq.charge(0, 10)
    seq.token_ids.append(7)
    seq.charge(10, 1)
    paid = 10 * INPUT_WEIGHT + OUTPUT_WEIGHT
    assert account.counter == paid
    again = seq.again(num_paid_tokens=11)
    again.charge(0, 11)
    assert account.counter == paid
    again.charge(11, 1)
    assert account.counter == paid + OUTPUT_WEIGHT
    resumed = Sequence(of("a", "y", 10).resume([1, 2, 3]))
    resumed.account = account
    resumed.charge(0, 13)
    assert account.counter == paid + OUTPUT_WEIGHT, "another engine was paid for this one"


def test_between_near_counters_the_one_that_holds_less_is_next() -> None:
    queue = queue_of(of("a", "a"), of("b", "b"), slack=100.0)
    a, b = (queue.account(seq) for seq in queue)
    a.counter, a.num_running, b.counter, b.num_running = 10.0, 4, 60.0, 1
    assert serve(queue) == "b"
    b.counter = 500.0
    queue.add(Sequence(of("b", "b2"), 9))
    assert serve(queue) == "a"


class Bare:
    """A scheduler without a model: every sampled token is 7."""

    def __init__(self, max_num_seqs: int = 8, num_blocks: int = 400) -> None:
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4, prefix_caching=False),
            depth=2,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
            max_model_len=512,
        )
        self.in_flight: deque[object] = deque()
        self.finished: list[str] = []

    def steps(self, count: int) -> None:
        for _ in range(count):
            while len(self.in_flight) <= 2 and (batch := self.scheduler.schedule()) is not None:
                self.in_flight.append(batch)
            self.scheduler.check()
            if self.in_flight:
                done = self.in_flight.popleft()
                output = StepOutput(done.epoch, done.step_id, [7] * len(done.sample_rows), {})  # type: ignore[attr-defined]
                events = self.scheduler.update(done, output)  # type: ignore[arg-type]
                self.finished += [event.request_id for event in events if event.finish_reason]

    def running(self, tenant: str) -> int:
        return sum(a.num_running for a in self.scheduler._waiting.accounts if a.tenant == tenant)


def test_every_token_that_is_computed_is_charged() -> None:
    """Prompts and what follows, of two tenants in the same batches; the last token of an answer is not computed."""
    bare = Bare()
    for tenant, count in (("a", 3), ("b", 1)):
        for i in range(count):
            bare.scheduler.add(of(tenant, f"{tenant}{i}", tokens=10, max_tokens=16))
    bare.steps(80)
    assert len(bare.finished) == 4
    charged = {account.tenant: account.counter for account in bare.scheduler._waiting.accounts}
    one = 10 * INPUT_WEIGHT + 15 * OUTPUT_WEIGHT
    assert charged == {"a": 3 * one, "b": one}


def test_a_full_engine_makes_way_up_to_an_equal_share() -> None:
    bare = Bare(max_num_seqs=8)
    for i in range(20):
        bare.scheduler.add(of("greedy", f"g{i}", max_tokens=400))
    bare.steps(10)
    assert bare.running("greedy") == 8
    bare.scheduler.add(of("small", "s0", max_tokens=400))
    bare.steps(1)
    assert bare.running("small") == 1, "within one step, though every slot was taken and every sequence in flight"
    for i in range(1, 20):
        bare.scheduler.add(of("small", f"s{i}", max_tokens=400))
    bare.steps(20)
    assert (bare.running("greedy"), bare.running("small")) == (4, 4)
    before = bare.scheduler.stats().preemptions
    bare.steps(100)
    assert bare.scheduler.stats().preemptions == before == 4, "once shared, nobody is pushed around any more"


def test_a_new_weight_holds_for_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's weight was changed while its requests wait and run: `schedule` still comes to an end."""
    bare = Bare(max_num_seqs=4)
    preempt, preempted = bare.scheduler._preempt, []

    def counted(seq: Sequence) -> None:
        preempted.append(seq.request_id)
        assert len(preempted) < 50, "the two tenants displace each other for ever"
        preempt(seq)

    monkeypatch.setattr(bare.scheduler, "_preempt", counted)
    for i, (tenant, weight) in enumerate(zip("baaabbb", (4.0, 1.0, 4.0, 1.0, 4.0, 1.0, 4.0), strict=True)):
        bare.scheduler.add(of(tenant, str(i), max_tokens=30, weight=weight))
        bare.steps(1)
    assert {a.tenant: a.weight for a in bare.scheduler._waiting.accounts} == {"a": 1.0, "b": 4.0}
    bare.steps(300)
    assert len(bare.finished) == 7


def test_kv_room_is_shared_too() -> None:
    bare = Bare(max_num_seqs=64, num_blocks=200)
    for i in range(8):
        bare.scheduler.add(of("greedy", f"g{i}", 80, max_tokens=60))
    bare.steps(20)
    held = bare.scheduler.stats().kv_blocks_used
    assert held > 150
    bare.scheduler.add(of("small", "s", 80, max_tokens=10))
    bare.steps(12)
    assert "s" in bare.finished or bare.running("small") == 1
    assert bare.scheduler.stats().preemptions > 0


def test_urgent_requests_displace_others_of_the_same_tenant() -> None:
    bare = Bare(max_num_seqs=2)
    for name in ("one", "two"):
        bare.scheduler.add(of("a", name, max_tokens=100, priority=5))
    bare.steps(5)
    bare.scheduler.add(of("a", "urgent", max_tokens=5))
    bare.scheduler.add(of("a", "later", max_tokens=5, priority=9))
    bare.steps(30)
    assert bare.finished == ["urgent"]
    bare.steps(300)
    assert bare.finished[1] == "one", "who made way for it comes before what arrived later"
    assert len(bare.finished) == 4


def test_who_makes_way_gets_the_same_tokens(make_engine: MakeEngine) -> None:
    """A preemption in the middle of a batch: what is in flight is dropped and computed again."""
    engine, collector = make_engine(stages=2, max_num_seqs=3)
    greedy = [msgspec.structs.replace(request(f"g{i}", p, 60), tenant="greedy") for i, p in enumerate(PROMPTS[:5])]
    for each in greedy:
        engine.add(each)
    while not collector.reports:
        time.sleep(0.001)
    small = [msgspec.structs.replace(request(f"s{i}", p, 20), tenant="small") for i, p in enumerate(PROMPTS[4:7])]
    for each in small:
        engine.add(each)
    tokens = collector.wait([each.request_id for each in greedy + small])
    assert [tokens[f"g{i}"] for i in range(5)] == [naive(p, 60) for p in PROMPTS[:5]]
    assert [tokens[f"s{i}"] for i in range(3)] == [naive(p, 20) for p in PROMPTS[4:7]]
    assert engine.scheduler.stats().preemptions > 0


def test_a_request_that_was_never_served_does_not_move_the_clock() -> None:
    """Whoever comes to an empty queue begins where the last one served is, not where one that left would be."""
    queue = queue_of(of("busy", "b0"), of("light", "l0"))
    for account, counter in zip(queue.accounts, (1e6, 50.0), strict=True):
        account.counter = counter
    assert serve(queue) == "l0"
    queue.remove("b0")
    queue.add(Sequence(of("new", "n0"), 10))
    queue.add(Sequence(of("light", "l1"), 11))
    assert [serve(queue) for _ in range(2)] == ["n0", "l1"]


def test_nobody_is_preempted_for_who_is_not_admitted_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant asks for more KV than may be taken from the other: all of the other's go on."""
    bare = Bare(max_num_seqs=64, num_blocks=200)
    for i in range(40):
        bare.scheduler.add(of("many", f"m{i}", tokens=8, max_tokens=200))
    bare.steps(20)
    for i in range(3):
        bare.scheduler.add(of("large", f"l{i}", tokens=380, max_tokens=4))
    make_way, preempt, wasted, gone = bare.scheduler._make_way, bare.scheduler._preempt, list[str](), list[str]()

    def counted() -> None:
        gone.clear()
        make_way()
        if not bare.scheduler.admitted:
            wasted.extend(gone)

    monkeypatch.setattr(bare.scheduler, "_preempt", lambda seq: (gone.append(seq.request_id), preempt(seq)))
    monkeypatch.setattr(bare.scheduler, "_make_way", counted)
    bare.steps(600)
    assert bare.scheduler.stats().preemptions > 0
    assert not wasted, f"{len(wasted)} preempted for nothing"


def test_who_makes_way_is_said_before_anything_is_done() -> None:
    """As many as are needed, the youngest first, of who holds most; or None if the last of them may not be taken."""
    bare = Bare(max_num_seqs=8, num_blocks=60)
    for i in range(7):
        bare.scheduler.add(of("many", f"m{i}", tokens=16, max_tokens=100))
    bare.steps(4)
    running, queue, fairness = bare.scheduler._running, bare.scheduler._waiting, bare.scheduler._fairness
    before = [seq.request_id for seq in running]
    assert len(before) == 7

    def plan(tokens: int, priority: int = 0) -> list[str] | None:
        seq = Sequence(of("few", "f", tokens=tokens, priority=priority), 99)
        queue.add(seq)
        victims = fairness.victims(seq, running.vacancy_for(seq), running, queue.accounts)
        queue.remove("f")
        return None if victims is None else [victim.request_id for victim in victims]

    assert plan(16) == []
    assert plan(100) == ["m6", "m5"]
    assert plan(200) is None, "more than half of the cache"
    assert plan(200, priority=-1) == ["m6", "m5", "m4", "m3", "m2", "m1"]
    assert [seq.request_id for seq in running] == before
    assert bare.scheduler.stats().preemptions == 0
