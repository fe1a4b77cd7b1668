"""What a client may ask of the sampler, checked once, where a request enters."""

import math

import msgspec

from model.text.constraint import Constraint

MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen and when to stop. Raises `ValueError` naming the field that is out of range.

    Equal seeds give equal draws: randomness is a function of (seed, position) and of nothing else.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides (or multiplies negative) logits of tokens in prompt and output
    presence_penalty: float = 0.0  # subtracted once for a token in the output
    frequency_penalty: float = 0.0  # subtracted for each occurrence in the output
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # no stop token is drawn before so many tokens
    logprobs: int | None = None  # None: no logprobs; k: the chosen token's and the k best
    prompt_logprobs: int | None = None  # the same of every prompt token but the first
    constraint: Constraint | None = None  # what the answer must look like

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, 1, math.inf)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("seed", self.seed, -(2**63), 2**64 - 1)
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("top_k", self.top_k, 0, math.inf)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _check(name, count, 0, MAX_LOGPROBS)

    def constrained(self, constraint: Constraint) -> "SamplingParams":
        """The same with a constraint, whose end is always an end of the answer, even one that ignores others."""
        ends = tuple(sorted({*self.stop_token_ids, *constraint.end_ids}))
        return msgspec.structs.replace(self, constraint=constraint, stop_token_ids=ends)

    @property
    def needs_counts(self) -> bool:
        """Whether sampling looks at which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is all there is to it."""
        plain = self.logprobs is None and not self.logit_bias and not self.needs_counts and not self.min_tokens
        return self.temperature == 0.0 and plain and self.constraint is None


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails every comparison, so it is refused too
        allowed = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
