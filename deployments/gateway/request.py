"""One answer that a route asks for, and what a request may ask of this model at all."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from deployments.adapters.names import Named
from deployments.config import AppConfig
from deployments.errors import bad_request, unknown_model
from deployments.gateway.prompts import Prompt
from deployments.gateway.tenants import Tenant
from model.sampling_params import SamplingParams
from model.text.tool_calls import CallSyntax


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One answer that a route asks for, whatever its JSON looks like."""

    endpoint: str  # its name in metrics and logs
    request_id: str  # of the HTTP request
    tenant: Tenant  # whose it is
    prompt: Prompt
    sampling: SamplingParams
    stops: Sequence[str] = ()
    include_stop: bool = False  # whether the stop string that ends an answer is shown
    prompt_only: bool = False  # the prompt's logprobs are all that is wanted
    priority: int = 0  # a lower one goes first
    cache_salt: str = ""  # keys and values are shared only with requests of the same, within what the key shares
    calls: CallSyntax | None = None  # how functions are called in it; None: whatever it says is text
    control_tokens: bool = False  # whether their names are shown in the text
    adapter: Named | None = None

    @property
    def salt(self) -> str:
        """The key's and the request's own: neither can be made up by the other."""
        return f"{self.tenant.cache_salt}\0{self.cache_salt}" if self.tenant.cache_salt or self.cache_salt else ""

    def copies(self, n: int) -> "list[GenerationRequest]":
        """`n` answers to the same prompt. Each draws by a seed of its own, the first one by the request's."""
        seeds = (derived_seed(self.sampling.seed, i) for i in range(n))
        return [replace(self, sampling=msgspec.structs.replace(self.sampling, seed=seed)) for seed in seeds]


class RequestBounds:
    """What one request may ask for: this model's names, ids and context, and as much as is configured."""

    def __init__(self, config: AppConfig, vocab_size: int, max_model_len: int) -> None:
        self.names = (config.model.name, *config.model.aliases)
        self.max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._max_answers = config.gateway.max_answers
        self._max_tokens = config.gateway.max_request_tokens

    def max_tokens(self, prompt: Prompt, wanted: int | None, default: int | None, param: str = "prompt") -> int:
        """Output tokens to allow: what the client wants, else `default` (None: as many as there is room for).

        Raises `ApiError` in the words that clients look for if prompt and output do not fit the context.
        """
        prompt_tokens = len(prompt.token_ids)
        room = self.max_model_len - prompt_tokens
        allowed = wanted if wanted is not None else max(1, room if default is None else min(default, room))
        if allowed > room:
            raise bad_request(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{prompt_tokens + allowed} tokens ({prompt_tokens} in the messages, {allowed} in the completion). "
                "Please reduce the length of the messages or completion.",
                param,
                "context_length_exceeded",
            )
        return allowed

    def check_name(self, name: str | None, param: str = "model") -> None:
        """Raise `ApiError` 404 if a request names another model; it may name none."""
        if name is not None and name not in self.names:
            raise unknown_model(name, self.names[0], param)

    def check_token_ids(self, ids: Iterable[int], param: str) -> None:
        """Raise `ApiError` for an id that the model does not have."""
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise bad_request(f"{param}: {token_id} is not a token id of this model", param)

    def check_answers(self, answers: int) -> None:
        """Raise `ApiError` if one request wants more answers than are allowed."""
        if answers > self._max_answers:
            raise bad_request(f"n: {answers} answers in one request, at most {self._max_answers} are allowed", "n")

    def check_size(self, answers: Sequence[GenerationRequest]) -> None:
        """Raise `ApiError` if several answers need more tokens than one request may."""
        total = sum(len(a.prompt.token_ids) + a.sampling.max_tokens for a in answers)
        if len(answers) > 1 and total > self._max_tokens:
            raise bad_request(
                f"n: {len(answers)} answers need up to {total} tokens, one request may have {self._max_tokens}: ask "
                "for fewer answers or lower max_tokens",
                "n",
            )


def check_priority(request: GenerationRequest) -> None:
    """Raise `ApiError` if it wants to go before what its key may."""
    least = request.tenant.priority
    if request.priority < least:
        raise bad_request(f"priority: the most urgent one that this key may ask for is {least}", "priority")


def derived_seed(seed: int, index: int) -> int:
    """The seed of a request's answer number `index`: the request's own for the first, and for others a hash of both."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<Qq", seed % 2**64, index), digest_size=8, person=b"answer").digest()
    return int.from_bytes(digest, "little") >> 1
