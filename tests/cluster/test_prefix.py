"""What prompts are known by: equal everywhere, different for whoever must not share, small enough to be told."""

import random
import subprocess
import sys

import msgspec
import numpy as np

from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.prefix import MAX_DIGEST, Chain, Digest, Held, root
from cluster.scheduling.sequence import Sequence
from tests.conftest import request

SIZE = 4


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    """Gateways and engines make them apart from each other; host copies outlive the process that named them."""
    code = "from cluster.scheduling.prefix import *; print(Chain(root('a')).hash([*range(8)], 1, 4).hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == Chain(root("a")).hash([*range(8)], 1, SIZE).hex() == "a8441a06e4bc1a2f77af0d7128ca2cc1"


def test_a_hash_covers_all_before_it_and_where_the_chain_begins() -> None:
    def last(tokens: list[int], *identity: str) -> bytes:
        return Chain(root(*identity)).hash(tokens, len(tokens) // SIZE - 1, SIZE)

    tokens = [*range(12)]
    different = [last(tokens), last(tokens, "a"), last(tokens, "ab"), last(tokens, "a", "b"), last([1, *tokens[1:]])]
    assert len(set(different)) == len(different)


def test_prompts_with_different_salts_share_nothing() -> None:
    blocks = BlockManager(64, SIZE)

    def found(salt: str) -> int:
        seq = Sequence(msgspec.structs.replace(request("s", [*range(20)]), cache_salt=salt))
        blocks.look_up(seq)
        return len(seq.found.blocks)

    owner = Sequence(msgspec.structs.replace(request("o", [*range(20)]), cache_salt="mine"))
    blocks.allocate(owner, [], 20)
    blocks.mark_computed(owner, 20)
    assert (found(""), found("yours"), found("mine")) == (0, 0, 4)


def test_a_digest_says_how_much_of_a_prompt_is_held() -> None:
    blocks, rng = BlockManager(MAX_DIGEST * 5, SIZE), random.Random(0)
    prompts = [[rng.randrange(32_000) for _ in range(400)] for _ in range(200)]
    for i, prompt in enumerate(prompts):
        seq = Sequence(request(str(i), prompt))
        blocks.allocate(seq, [], len(prompt))
        blocks.mark_computed(seq, len(prompt) // 2)
        if i == 9:
            assert blocks.digest().stride == 1
    digest = blocks.digest()
    assert len(digest.shorts) <= 4 * MAX_DIGEST
    held, stride = Held(digest), digest.stride
    for prompt in prompts:
        count = held.num_blocks(Chain(root("")).shorts(prompt, SIZE))
        assert 50 - stride < count <= 50
    assert held.num_blocks(Chain(root("")).shorts([5] * 400, SIZE)) == 0
    assert held.num_blocks(np.empty(0, np.uint32)) == 0
    assert Held(Digest(1, b"")).num_blocks(Chain(root("")).shorts(prompts[0], SIZE)) == 0
