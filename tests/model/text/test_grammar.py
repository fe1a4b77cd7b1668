"""Masks against a judge of their own, and schemas of which something would not be guaranteed."""

import datetime
import ipaddress
import json
import random
import re
import uuid
from functools import cache
from typing import Any

import httpx
import pytest
import regex
import torch
import xgrammar
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from jsonschema import FormatChecker

from model.batch import Rules
from model.sampler import Sampler
from model.text import grammar_worker, json_schema
from model.text.constraint import Constraint
from model.text.grammar import Grammars, Masks, Matcher
from model.text.string_formats import STRING_FORMATS
from model.text.tokenizer import Tokenizer, load_tokenizer
from model.weights import resolve_path
from tests import golden
from tests.model.test_sampling import step


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_path(golden.MODEL))


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer())


@pytest.mark.parametrize("pattern", [r"[A-Z][a-z]{2,6} (yes|no|maybe)!?", r"(\d{1,3}\.){3}\d{1,3}", r"é(a|(ß))*(京)?"])
def test_a_mask_holds_exactly_the_tokens_that_may_come(pattern: str) -> None:
    """Judged by the regex library's partial matches, along random walks."""
    t, rng = tokenizer(), random.Random(0)
    eos = min(t.eos_ids)
    words = [t.token_bytes(i) for i in range(t.vocab_size)]
    whole = regex.compile(pattern.encode())  # over bytes: a token may be a part of a character
    masks = Masks(tokenizer, lambda: None)
    try:
        for _ in range(3):
            matcher, so_far = masks.open(Constraint("regex", pattern, (eos,)), []), b""
            for _ in range(12):
                allowed = {i for i in range(t.vocab_size) if matcher.mask[i // 8] >> i % 8 & 1}
                expected = {i for i, w in enumerate(words) if w and whole.fullmatch(so_far + w, partial=True)}
                assert allowed - {eos} == expected
                assert (eos in allowed) == (whole.fullmatch(so_far) is not None)
                if not expected:
                    break
                token = rng.choice(sorted(expected))
                matcher.step(token)
                so_far += words[token]
    finally:
        masks.close()


def test_the_sampler_draws_what_the_mask_allows() -> None:
    vocab = 45  # more than the mask has bits for: what is beyond its end is refused
    for allowed in ({3}, {0, 39}, set(range(40)), {7, 8, 9}):
        mask = sum(1 << i for i in allowed).to_bytes(5, "little")
        logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
        expected = [max(allowed, key=lambda i, row=row: float(logits[row, i])) for row in range(4)]  # type: ignore[misc]
        rules = [Rules(0, 1), Rules(1, 1, 1.0), Rules(2, 1), Rules(3, 1, 1.0, 2, 0.9)]
        sampler = Sampler(4, vocab, 9, torch.device("cpu"))
        tokens = sampler.sample(step([*rules], rules), logits, dict.fromkeys(range(4), mask)).token_ids.tolist()
        assert [tokens[0], tokens[2]] == [expected[0], expected[2]]
        assert {tokens[1], tokens[3]} <= allowed


REFUSED: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"const": 1}}, "contains"),
    ({"type": "object", "properties": {"a": {"not": {"const": 1}}}}, "#/properties/a: not"),
    ({"type": "object", "if": {}, "then": {}}, "if"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, "patternProperties"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z"]}, "z is required"),
    ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 5}, "minimum beside $ref"),
    ({"type": "object", "anyOf": [{"type": "object"}]}, "type beside anyOf"),
    ({"minimum": 5}, "minimum needs a type"),
    ({"type": "string", "enum": ["a", 1]}, "enum"),
    ({"enum": ["a", 1], "minimum": 3}, "enum"),
    ({"type": "object", "properties": {"yy": {}}, "propertyNames": {"pattern": "^x"}}, "propertyNames"),
    ({"type": "array", "items": [{"type": "integer"}]}, "#/items must be"),
    ({"type": "object", "properties": []}, "#/properties must be an object"),
    ({"anyOf": 5}, "#/anyOf must be an array"),
    ("nonsense", "# must be"),
    ({"type": "string", "format": "phone"}, "format must be one of"),
    ({"type": "string", "format": "date", "maxLength": 9}, "maxLength beside format"),
    ({"format": "date"}, "format needs a type"),
    ({"type": "string", "format": "date", "enum": ["today"]}, "enum"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf cannot be guaranteed"),
    ({"oneOf": [{"enum": [1, 2]}, {"enum": [2.0, 3]}]}, "oneOf cannot"),
    ({"oneOf": [{"type": "object"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"type": "object"}}}, "oneOf cannot"),
]


@pytest.mark.parametrize(("schema", "word"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_would_not_be_guaranteed_is_refused(schema: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word.replace("$", r"\$")):
        json_schema.prepared(schema)


def test_deep_and_broken_schemas_are_refused() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(80):
        deep = {"type": "array", "items": deep}
    for source, word in ((json.dumps(deep), "nested"), ("{", "valid JSON"), ("[" * 100_000, "valid JSON")):
        with pytest.raises(ValueError, match=word):
            json_schema.prepared(json_schema.parsed(source))


def test_ordinary_schemas_pass() -> None:
    from tests.cluster.test_constraints import SCHEMAS

    for schema in [*SCHEMAS, True, {"type": "object"}, {"$ref": "#/$defs/n", "title": "x", "$defs": {"n": True}}]:
        json_schema.prepared(schema)


# -- formats, judged by what knows them  -------------------------------------------------------------------


def _duration(text: str) -> bool:
    return regex.fullmatch(r"P(?!$)(\d+W|(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)", text) is not None


FORMATS: dict[str, Any] = {
    "date": datetime.date.fromisoformat,
    "time": lambda text: datetime.time.fromisoformat(text.replace("Z", "+00:00")),
    "date-time": lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "email": lambda text: FormatChecker().check(text, "email"),
    "uri": lambda text: httpx.URL(text).host or 1 / 0,
    "uri-reference": lambda text: httpx.URL(text).host or 1 / 0,
    "hostname": lambda text: text.encode("idna"),
    "duration": lambda text: _duration(text) or 1 / 0,
    "json-pointer": lambda text: text[0] == "/" or 1 / 0,
}


def test_every_text_that_a_format_lets_through_has_it() -> None:
    assert FORMATS.keys() == STRING_FORMATS.keys()

    @seed(5)
    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(FORMATS)))
        FORMATS[name](
            data.draw(st.from_regex(STRING_FORMATS[name], fullmatch=True, alphabet=st.characters(codec="ascii")))
        )

    run()


def test_a_date_is_any_day_that_there_is() -> None:
    days = {
        f"{year}-{month:02}-{day:02}" for year in (1900, 2000, 2023, 2024) for month in range(14) for day in range(33)
    }
    real = {day for day in days if _is_date(day)}
    assert {day for day in days if regex.fullmatch(STRING_FORMATS["date"], day)} == real


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def test_the_library_takes_formats_and_one_of_as_we_give_them_to_it() -> None:
    """A11: alternatives that exclude each other; A10: no address and no day that does not exist."""
    kind = {"type": "object", "additionalProperties": False}
    cat = kind | {"properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind", "lives"]}
    dog = kind | {"properties": {"kind": {"const": "dog"}, "age": {"type": "integer"}}, "required": ["kind", "age"]}
    pets = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}}
    either = {"oneOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}
    cases: list[tuple[Any, list[Any], list[Any]]] = [
        (pets | {"$defs": {"cat": cat, "dog": dog}}, [{"kind": "dog", "age": 3}], [{"kind": "dog", "lives": 3}, {}]),
        (either, [5, [5]], ["5", {"5": 5}]),
        ({"oneOf": [{"anyOf": [{"type": "null"}, {"const": 5}]}, {"enum": ["a"]}]}, [None, 5, "a"], [6, "b"]),
        ({"type": "string", "format": "ipv4"}, ["1.22.255.0"], ["48.072.33.51", "256.1.1.1"]),
        ({"type": ["string", "null"], "format": "date"}, [None, "2024-02-29"], ["2023-02-30", "2023-04-31"]),
        ({"type": "integer", "format": "int32"}, [7], ["7"]),
    ]
    for schema, good, bad in cases:
        constraint = Constraint("json_schema", json.dumps(schema), (2,))
        assert grammar_worker.problem(grammars(), constraint) is None, schema
        for value in [*good, *bad]:
            matcher = xgrammar.GrammarMatcher(grammars().compile(constraint))
            fits = matcher.accept_string(json.dumps(value)) and matcher.is_completed()
            assert fits == (value in good), (schema, value)


def test_warnings_are_errors_unless_they_are_harmless() -> None:
    def problem(kind: Any, text: str) -> str:
        return grammar_worker.problem(grammars(), Constraint(kind, text, (2,))) or ""

    assert problem("regex", re.escape("a b-c#d&e~f")) == ""
    assert problem("grammar", 'start: "a" B\nB: /[0-9]+/') == "", "Lark"
    for kind, text in (("regex", "(?=a)b"), ("json_schema", '{"type": "number", "multipleOf": 0.5}')):
        said = problem(kind, text)
        assert said
        assert not regex.search("ignor|falling", said), "it is refused, not ignored"


def test_bad_constraints_say_what_is_wrong_without_the_librarys_paths() -> None:
    for kind, source, word in (
        ("regex", "((", "parenthesis"),
        ("grammar", "root ::= foo", "not defined"),
        ("json_schema", '{"type": "wizard"}', "wizard"),
        ("json_schema", '{"$ref": "#/$defs/n"}', "defs"),
    ):
        with pytest.raises(ValueError, match=word) as caught:
            grammars().compile(Constraint(kind, source, (2,)))  # type: ignore[arg-type]
        assert ".cc" not in str(caught.value)


def test_a_grammar_with_masks_that_take_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = tuple(sorted(tokenizer().eos_ids))
    counting = Constraint("regex", r"([A-Z][a-z]{1,12}( [a-z]{1,12}){2,10}[.?!] ){9,}", ends)
    for constraint in (counting, Constraint("regex", "ab?", ends), Constraint("json_schema", "true", ends)):
        monkeypatch.setattr(grammar_worker, "SLOW_MASK_S", 30.0)
        assert grammar_worker.problem(grammars(), constraint) is None
    monkeypatch.setattr(grammar_worker, "SLOW_MASK_S", 0.0001)
    assert "ms for each token" in (grammar_worker.problem(grammars(), counting) or "")


def test_a_matcher_notes_what_goes_wrong_and_raises_nothing() -> None:
    matcher = Matcher(None, object(), 64)  # type: ignore[arg-type]
    matcher.step(5)
    assert matcher.failure
    assert matcher.mask == b""
