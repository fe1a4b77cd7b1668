"""What an answer must look like, as data; grammar.py makes masks of it."""

from typing import Literal

import msgspec

MAX_CONSTRAINT_CHARS = 65_536
TOO_DEAR = "its constraint has come to take too long for each token: make it simpler"  # why an answer ended


class Constraint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer's text must match. What may come next is a function of the tokens so far and of nothing else."""

    kind: Literal["json_schema", "regex", "grammar", "structural_tag"]
    # a JSON schema; a regular expression; a grammar in GBNF, its first rule named root, or in Lark, named start; or a
    # structural tag as xgrammar has it: text of which parts begin and end as said and match what is said
    text: str
    end_ids: tuple[int, ...]  # tokens that may end the answer where the constraint allows an end
