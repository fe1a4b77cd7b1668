"""A process that compiles what clients send, so that a grammar that crashes or hangs takes nothing else with it.

`python -m model.text.grammar_worker PATH`: a JSON object per line in (kind, text), one out ({"error": null or why
not}); it ends with its input. What the library says that it ignores counts as an error: what is promised
is kept.
"""

import json
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from queue import Queue

import numpy as np

from model.text.constraint import Constraint
from model.text.grammar import Grammars, Matcher, plain
from model.text.tokenizer import load_tokenizer
from model.weights import resolve_path

WALK = 12  # tokens
SLOW_MASK_S = 0.03  # for each token, on a machine that has other things to do
HARMLESS = "The character itself will be matched"  # of an escape that escapes nothing, as re.escape writes it
# What the library would do, and does not: we refuse.
NOT_DONE = re.compile(r"[,;]?\s*((it|they|this) )?((will|is|are) (be )?)?(ignor\w+|falling back)[^.;]*", re.IGNORECASE)
MEMORY_BYTES = 2_000_000_000  # that a grammar may need


def main() -> None:
    tokenizer = load_tokenizer(resolve_path(sys.argv[1]))
    grammars = Grammars(tokenizer)
    ends = tuple(sorted(tokenizer.eos_ids))
    with open("/proc/self/statm") as statm:
        limit = int(statm.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"error": None}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"error": problem(grammars, Constraint(request["kind"], request["text"], ends))}), flush=True)


def _seconds_per_mask(matcher: Matcher, end_ids: tuple[int, ...]) -> float:
    """The median along an answer that takes any of the tokens that may come."""
    rng, seconds = random.Random(0), [0.0]
    for _ in range(WALK):
        bits = np.unpackbits(np.frombuffer(matcher.mask, np.uint8), bitorder="little").nonzero()[0]
        token_id = int(rng.choice(bits))
        if token_id in end_ids:
            break
        started = time.monotonic()
        matcher.step(token_id)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def problem(grammars: Grammars, constraint: Constraint) -> str | None:
    """Why a constraint is refused, or None."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            matcher = grammars.matcher(constraint, Queue())
            matcher.step()
            if matcher.failure is not None:
                return matcher.failure
            if (seconds := _seconds_per_mask(matcher, constraint.end_ids)) > SLOW_MASK_S:
                return f"takes {1000 * seconds:.0f} ms for each token: make it simpler"
        except (ValueError, MemoryError) as error:
            return str(error) or "it needs too much memory"
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        for line in said.read().decode("utf-8", "replace").splitlines():
            if "Warning: " in line and HARMLESS not in line:
                warning = NOT_DONE.sub("", plain(line.split("Warning: ", 1)[1]))
                return f"cannot be guaranteed by this service: {warning.rstrip('. ')}"
        return None


if __name__ == "__main__":
    main()
