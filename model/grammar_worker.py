"""A process that compiles what clients send, so that a grammar that crashes or hangs takes nothing else with it.

`python -m model.grammar_worker PATH`: a JSON object per line in (kind, text), one out ({"error": null or why not}); it
ends with its input. What the library says that it ignores counts as an error: nothing is promised and not kept.
"""

import json
import os
import resource
import sys
import tempfile
from queue import SimpleQueue

from model.constraint import Constraint
from model.grammar import Grammars, plain
from model.tokenizer import load_tokenizer
from model.weights import resolve_path

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


def problem(grammars: Grammars, constraint: Constraint) -> str | None:
    """Why a constraint is refused, or None."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            matcher = grammars.matcher(constraint, SimpleQueue())
            matcher.step()
        except (ValueError, MemoryError) as error:
            return str(error) or "it needs too much memory"
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        for line in said.read().decode("utf-8", "replace").splitlines():
            if "Warning: " in line:
                return plain(line.split("Warning: ", 1)[1])
        return matcher.failure


if __name__ == "__main__":
    main()
