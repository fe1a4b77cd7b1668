"""A request as the client sent it, the engine's state for it, and what leaves the engine."""

from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.scheduling.account import Account
from cluster.scheduling.prefix import Chain, root
from model.batch import TokenLogprobs
from model.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error"]
MAX_PENDING_TOKENS = 2  # of a sequence: at most one token ahead of what is known
NO_TOKEN = -1  # as the token of an event that has none


class AdapterRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA adapter: what it is, and where its files are on every node with a stage."""

    digest: str  # see model.adapters.AdapterFiles
    path: str


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt to continue. `output_ids` holds what an earlier attempt already emitted (see `resume`)."""

    request_id: str
    token_ids: list[int]  # the prompt
    sampling: SamplingParams
    output_ids: list[int] = []
    tenant: str = ""  # whose it is: tenants share an engine fairly (see waiting_queue.py)
    weight: float = 1.0  # the tenant's share, compared with other tenants'
    priority: int = 0  # lower is more urgent, whoever's it is
    num_prompt_logprobs: int = 0  # an earlier engine has given already
    deaths: int = 0  # in a row, of the engines or stages that had it before: see Scheduler.restart
    cache_salt: str = ""  # only prompts with the same one share cached keys and values
    adapter: AdapterRef | None = None  # what is added to the model for it

    @property
    def chain_root(self) -> bytes:
        """What its keys and values depend on beside its tokens, and who may share them: the one place that says it."""
        return root(self.cache_salt) if self.adapter is None else root(self.cache_salt, self.adapter.digest)

    def resume(self, emitted: list[int]) -> "Request":
        """The same request, to be continued elsewhere after `emitted` tokens: same seed, same budget, same draws."""
        return msgspec.structs.replace(self, output_ids=[*self.output_ids, *emitted])


class Start(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How long it took an engine to begin with a request, by its own clock."""

    queue_s: float  # from its arrival to its first batch
    prefill_s: float  # from there to its first token


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token of one request. The last event of a request carries its `finish_reason`.

    Before the first token come the prompt's logprobs, if asked for: in pieces, with the steps that compute it.

    If that is "error", something went wrong with this request alone: `error` says what, and there is no token.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None  # natural log of the probability before temperature and filters
    top_logprobs: list[tuple[int, float]] | None = None  # (token id, logprob), best first
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache; set on the first event only
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the next prompt tokens, from the second one on; no token
    error: str | None = None
    is_fatal: bool = False  # of an error: stages died of this request
    start: Start | None = None  # with the first token
    was_drafted: bool = False  # the token: it came with the one before it, see speculation.py

    @property
    def has_token(self) -> bool:
        return self.token_id != NO_TOKEN


class Matcher(Protocol):
    """Where a sequence is in its constraint; see model/text/grammar.py."""

    ready: bool  # whether `mask` is that of the next token
    mask: bytes  # see Batch.masks
    failure: str | None  # why there is no mask any more
    seconds: float  # that making a mask takes, of one thread

    def advance(self, token_id: int) -> None:
        """The sequence has one token more. Does not wait."""
        ...


class Drafter(Protocol):
    """Follows a sequence, to say how it may go on; see speculation.py."""

    def draft(self, token_ids: list[int], most: int) -> list[int]:
        """Up to so many tokens that may follow these, all it has: those of the last call and what is new since.

        It may take as long as the new ones take, and never waits.
        """
        ...


class Found:
    """The cached beginning of a sequence that waits, as it was when last looked up."""

    __slots__ = ("blocks", "contents", "copies", "places")

    def __init__(self) -> None:
        self.blocks: NDArray[np.int32] = np.empty(0, np.int32)
        self.contents: NDArray[np.int64] = np.empty(0, np.int64)
        self.places: NDArray[np.int32] = np.empty(0, np.int32)  # in host memory, of what follows
        self.copies: NDArray[np.int64] = np.empty(0, np.int64)  # what these held


class Sequence:
    """The engine's state of one request: its tokens, and what it holds while it runs.

    What changes with every step stands in `Running`, for all of them together: after a pause in which the processor's
    caches have forgotten all objects, a step looks at few of them.
    """

    __slots__ = (
        "account",
        "arrival",
        "block_table",
        "chain",
        "drafter",
        "failure",
        "found",
        "is_greedy",
        "matcher",
        "max_computed_tokens",
        "num_cached_tokens",
        "num_deaths",
        "num_full_blocks",
        "num_paid_tokens",
        "num_prompt_tokens",
        "prompt_logprobs",
        "request",
        "request_id",
        "slot",
        "stop_token_ids",
        "suspect_until",
        "token_ids",
    )

    account: "Account[Sequence]"  # its tenant's, given when it is added to the queue

    def __init__(
        self,
        request: Request,
        arrival: int = 0,
        matcher: "Matcher | None" = None,
        drafter: "Drafter | None" = None,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        sampling = request.sampling  # what every step asks of it is looked up once
        self.is_greedy = sampling.is_greedy
        self.stop_token_ids = sampling.stop_token_ids
        self.matcher = matcher  # of a request with a constraint; it knows the tokens that are known here
        self.drafter = drafter
        self.arrival = arrival  # order of arrival: the youngest is preempted first
        self.token_ids = [*request.token_ids, *request.output_ids]
        self.chain = Chain(request.chain_root)  # of its full blocks
        self.num_prompt_tokens = len(request.token_ids)
        self.max_computed_tokens = self.num_prompt_tokens + sampling.max_tokens - 1  # the last token needs no room
        self.slot = -1  # see Batch.slots and Running; given and taken back with the blocks
        self.num_cached_tokens = 0  # taken from the prefix cache at first admission, until the first token says so
        # What the tenant paid for before; of a resumed request an earlier engine was paid for all it brings.
        self.num_paid_tokens = len(self.token_ids) if request.output_ids else 0
        self.num_full_blocks = 0  # blocks of `block_table` whose content is registered
        self.block_table: list[int] = []
        self.found = Found()  # while it waits
        # How many have gone out; None: they are not asked for, or all have.
        wanted = sampling.prompt_logprobs is not None and not request.output_ids
        self.prompt_logprobs = request.num_prompt_logprobs if wanted else None
        # Stage deaths at which it was in flight: it is suspect until this many tokens of it are computed once more.
        # One death elsewhere, which it shares with all that ran there, counts only once a stage dies here as well.
        self.num_deaths = request.deaths if request.deaths > 1 else 0
        self.suspect_until = self.num_tokens + MAX_PENDING_TOKENS if request.deaths else 0
        self.failure: str | None = None  # what went wrong with it; its next token is not taken any more

    def again(self, num_paid_tokens: int = 0) -> "Sequence":
        """Its successor after a preemption: all tokens known, nothing computed, so many paid for.

        An object of its own, so that what batches in flight still bring for this one is not taken for the other.
        """
        successor = Sequence(self.request, self.arrival, self.matcher, self.drafter)
        successor.account = self.account
        successor.token_ids, successor.chain = self.token_ids, self.chain
        successor.num_paid_tokens = max(self.num_paid_tokens, num_paid_tokens)
        successor.num_deaths, successor.suspect_until = self.num_deaths, self.suspect_until
        successor.prompt_logprobs = self.prompt_logprobs
        return successor

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_plain(self) -> bool:
        """Whether its next token is all that is to be taken in, and said."""
        return self.matcher is None and self.prompt_logprobs is None and not self.num_cached_tokens

    @property
    def mask(self) -> bytes | None:
        """For what follows the tokens that are known, see Batch.masks; None if it is not known yet."""
        if self.matcher is None:
            return b""
        return self.matcher.mask if self.matcher.ready else None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why its newest token, a sampled one, is its last; None if it is not."""
        if self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) > self.max_computed_tokens else None

    def charge(self, start: int, num_tokens: int) -> None:
        """Count so many tokens from `start` on for its tenant. What is computed again costs nothing."""
        end = start + num_tokens
        if start < self.num_paid_tokens:
            start = min(self.num_paid_tokens, end)
        num_input = min(end, self.num_prompt_tokens) - start if start < self.num_prompt_tokens else 0
        self.account.charge(num_input, end - start - num_input)
