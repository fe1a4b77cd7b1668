"""The only messages between scheduler and stages: what to compute in one step, and what came out.

Legend: T tokens in the batch, S runs of tokens, R rows of logits.

A run is so many next tokens of one sequence. A sequence may have several in a batch, of one token each, one right after
another: so a token can be drawn after each of them.

Stages decide nothing. Of every running sequence they keep, by its slot, what they were told and what was sampled: a
batch says what is new. There is no prefill/decode flag: a sequence that computes one token decodes, one that computes
many prefills, and both may share a batch, those that decode first.

A batch may be scheduled before the tokens it continues are known: the first stage fills them in when they come.
"""

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
SAMPLED = -1  # as a token id: the token sampled last for this sequence, which the scheduler does not know yet
ALONE, SAMPLED_AFTER = 1, 2  # of a token: its sequence computes no other; a token is sampled after it


def _nothing() -> Int32Array:
    return np.empty(0, np.int32)


class Rules(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one sequence are drawn, where they are not simply the likeliest.

    The last stage is told with the first token that it draws for a sequence in this slot, and then keeps it. Each draw
    is a function of (seed, position), so that any stage and batch draws the same.
    """

    slot: int
    seed: int
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    logprobs: int = -1  # -1: none; k: the chosen token's and the k best
    logit_bias: dict[int, float] = {}
    banned: tuple[int, ...] = ()  # token ids that may not be drawn
    banned_until: int = 0  # for positions before this one
    counts: bool = False  # whether these look at what came before:
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt_ids: np.ndarray[Any, np.dtype[np.int32]] = msgspec.field(default_factory=_nothing)  # each once
    output_ids: np.ndarray[Any, np.dtype[np.int32]] = msgspec.field(default_factory=_nothing)  # sampled already


class PromptRow(msgspec.Struct, frozen=True, array_like=True):
    """A sequence whose prompt's logprobs are wanted: those of what follows each token of its chunk."""

    row: int  # the sequence's place in the batch
    next_token: int  # what follows the chunk; SAMPLED if the prompt ends with it, and so do its logprobs
    logprobs: int  # the k best are reported beside the prompt's own


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """From this step on the adapter of this digest is in this slot of adapters, in place of whichever was."""

    slot: int
    digest: str


class Batch(msgspec.Struct, frozen=True, array_like=True, tag="batch"):
    """One step for the whole pipeline."""

    epoch: int
    step_id: int
    token_ids: np.ndarray[Any, np.dtype[np.int32]]  # [T] all runs one after another; see SAMPLED
    query_lens: np.ndarray[Any, np.dtype[np.int32]]  # [S] tokens to compute now
    num_computed_tokens: np.ndarray[Any, np.dtype[np.int32]]  # [S] tokens whose KV is in the cache already
    slots: np.ndarray[Any, np.dtype[np.int32]]  # [S] where stages keep what they know of each sequence
    num_new_blocks: np.ndarray[Any, np.dtype[np.int32]]  # [S] how many of its KV blocks are used for the first time
    new_blocks: np.ndarray[Any, np.dtype[np.int32]]  # those, one sequence's after another's: each table's end
    tokens_from: int  # the newest step whose sampled tokens this one needs; -1: none
    sample_rows: np.ndarray[Any, np.dtype[np.int32]]  # [R] the runs after whose last token one is sampled
    # What follows is for the last stage. A row is an index into `sample_rows`, and so of the logits that are computed.
    draws: np.ndarray[Any, np.dtype[np.int32]] = msgspec.field(default_factory=_nothing)  # rows that follow rules
    rules: list[Rules] = []  # of sequences that follow rules for the first time
    masks: dict[int, bytes] = {}  # by row: bit i, lowest first: token i may be drawn, and none beyond the end
    awaited: list[int] = []  # rows whose mask is not known yet: it comes in a `LateMasks`
    prompt_rows: list[PromptRow] = []
    # And this again for all stages:
    adapters: np.ndarray[Any, np.dtype[np.int32]] = msgspec.field(default_factory=_nothing)  # [S] slots of adapters, 0:
    placed: list[Placed] = []  # none; or [0] if no sequence has one

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def sample_tokens(self) -> Int32Array:
        """[R] the last token of each run in `sample_rows`: what its logits follow."""
        last: Int32Array = np.cumsum(self.query_lens, dtype=np.int32)[self.sample_rows] - 1
        return last

    def brief(self) -> "Batch":
        """For stages that do not sample."""
        return msgspec.structs.replace(self, draws=_nothing(), rules=[], masks={}, awaited=[], prompt_rows=[])

    @property
    def positions(self) -> Int32Array:
        """[T] where each token stands in its sequence."""
        before = self.num_computed_tokens - (np.cumsum(self.query_lens, dtype=np.int32) - self.query_lens)
        found: Int32Array = np.arange(self.num_tokens, dtype=np.int32) + np.repeat(before, self.query_lens)
        return found

    def num_blocks(self, block_size: int) -> Int32Array:
        """[S] KV blocks that each sequence has filled or begun after this step."""
        found: Int32Array = -(-(self.num_computed_tokens + self.query_lens) // block_size)
        return found

    @classmethod
    def of_one(cls, token_ids: Int32Array, block_size: int) -> "Batch":
        """A whole sequence alone, in slot 0 and the first blocks, whose next token is sampled."""
        one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
        blocks = np.arange(-(-len(token_ids) // block_size), dtype=np.int32)
        return cls(0, 0, token_ids, one * len(token_ids), zero, zero, one * len(blocks), blocks, -1, zero)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logs of raw probabilities: the chosen token's, and (token id, logprob) of the best ones."""

    chosen: float
    top: list[tuple[int, float]]


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag="output"):
    """What the last stage sampled: one token per entry of Batch.sample_rows, in their order."""

    epoch: int
    step_id: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]  # by index into Batch.sample_rows, where they were asked for
    prompt_logprobs: list[list[TokenLogprobs] | None] = []  # per entry of Batch.prompt_rows; None: it failed
    errors: dict[int, str] = {}  # by index into Batch.sample_rows: why a row has no token; the others are as they are


class SampledTokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """To the first stage: what the last one sampled in a step, for the batches that go on from there."""

    step_id: int
    token_ids: list[int]


class LateMasks(msgspec.Struct, frozen=True, array_like=True, tag="masks"):
    """To the last stage: the masks that a batch was sent without, for they follow from tokens sampled meanwhile."""

    epoch: int
    step_id: int
    masks: dict[int, bytes]  # by row, for each that awaits one; b"": all may be drawn


class Copies(msgspec.Struct, frozen=True, array_like=True, tag="copies"):
    """To all stages, between two batches: KV blocks to be copied to host memory, and back.

    First those go out, as the batches before have left them. Then others come in, when all batches before are done with
    what they replace; those that come after this do not touch them until all stages have said that they are `Copied`.
    """

    epoch: int
    number: int
    out_blocks: np.ndarray[Any, np.dtype[np.int32]]  # of the device
    out_places: np.ndarray[Any, np.dtype[np.int32]]  # of host memory
    out_hashes: bytes  # what each block is known by, one after another
    in_places: np.ndarray[Any, np.dtype[np.int32]]
    in_blocks: np.ndarray[Any, np.dtype[np.int32]]
    in_hashes: bytes


class Copied(msgspec.Struct, frozen=True, array_like=True, tag="copied"):
    """From each stage: it is done with these copies."""

    epoch: int
    number: int
    stage: int
    bad: list[int] = []  # indices into `in_places`: that is not what was put there


class StageTiming(msgspec.Struct, frozen=True, array_like=True, tag="timing"):
    """Where one stage spent its time in one step, in seconds of the host's monotonic clock."""

    epoch: int
    step_id: int
    stage: int
    started: float  # computing began
    finished: float  # computing ended
    wait: float  # idle since the previous step: no work, or the stage before was not done
    transfer: float  # blocked in sending or receiving the hidden state


def encode_array(value: Any) -> bytes:
    """msgspec hook: an int32 array travels as its bytes."""
    if isinstance(value, np.ndarray) and value.dtype == np.int32:
        return value.tobytes()
    raise NotImplementedError(f"cannot send a {type(value).__name__}")


def decode_array(kind: Any, value: Any) -> Int32Array:
    """msgspec hook: the inverse of `encode_array`."""
    if isinstance(value, bytes) and len(value) % 4 == 0:
        return np.frombuffer(value, dtype=np.int32)
    raise NotImplementedError(f"cannot receive a {kind}")
