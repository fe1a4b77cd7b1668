"""From token events to pieces of an answer."""

import asyncio
from collections.abc import AsyncGenerator

from cluster.scheduling.sequence import NO_TOKEN, TokenEvent
from deployments.gateway.pieces import Piece, TextRules, pieces
from model.batch import TokenLogprobs
from model.text.tokenizer.dummy import DummyTokenizer

PROMPT = [5 + i % 200 for i in range(20_000)]
STEP = 2048


async def scripted() -> AsyncGenerator[list[TokenEvent], None]:
    """A long prompt's logprobs step by step, then one token."""
    for start in range(0, len(PROMPT) - 1, STEP):
        count = min(STEP, len(PROMPT) - 1 - start)
        yield [TokenEvent("r", NO_TOKEN, prompt_logprobs=[TokenLogprobs(-1.0, [(7, -0.5)])] * count)]
    yield [TokenEvent("r", 6, "length")]


def test_a_long_prompts_logprobs_are_put_into_words_in_turns_with_everything_else() -> None:
    async def main() -> tuple[list[Piece], int]:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(others())
        found = [piece async for piece in pieces(scripted(), DummyTokenizer(300), PROMPT, TextRules())]
        beside.cancel()
        return found, turns

    (piece,), turns = asyncio.run(main())
    assert [one.token_id for one in piece.prompt_logprobs] == PROMPT
    assert [one.logprob for one in piece.prompt_logprobs] == [None, *[-1.0] * (len(PROMPT) - 1)]
    assert turns > len(PROMPT) / 100
    assert (piece.num_tokens, piece.finish_reason) == (1, "length")
