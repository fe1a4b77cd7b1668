"""A generator of tokenizers' directories and of what is said to them, for comparisons with other readers.

One small vocabulary, trained here as Llama's was, in every form it may come in; what the files around it say is drawn.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf

ROOT = Path(__file__).parents[3]
SIZE = 1200
SCRIPTS = (
    "the quick brown fox isn't lazy ",
    "naïve Ångström straße façade œuvre ",
    "Привет мир, как дела ",
    "שלום עולם مرحبا بالعالم ",
    "日本語 中文 한국어 ひらがな ",
    "नमस्ते ไทย Ωμέγα ",
    "def f(x):\n    return x\n\n",
    "12 345 3.14 ",
)


@cache
def sentencepiece_model() -> bytes:
    """As Llama 2's: BPE with bytes for what it does not know, digits apart, runs of spaces as pieces."""
    import sentencepiece

    files = sorted((ROOT / "model").rglob("*.py")) + sorted((ROOT / "deployments").rglob("*.py"))
    lines = [line for file in files for line in file.read_text().splitlines() if line]
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines[:6000], *SCRIPTS * 40]),
        model_writer=out,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@cache
def proto() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    found: Any = sentencepiece_model_pb2.ModelProto()
    found.ParseFromString(sentencepiece_model())
    return found


@cache
def sentencepiece() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


@cache
def vocabulary() -> dict[str, int]:
    return {piece.piece: i for i, piece in enumerate(proto().pieces)}


@cache
def merges() -> list[tuple[str, str]]:
    """Ranked by the pieces' scores, as sentencepiece merges and as released files have them."""
    vocab = vocabulary()
    pieces = sorted((p for p in proto().pieces if p.type == 1), key=lambda p: -p.score)
    splits = [(p.piece[:k], p.piece[k:]) for p in pieces for k in range(1, len(p.piece))]
    return [(left, right) for left, right in splits if left in vocab and right in vocab]


@cache
def byte_level() -> dict[str, Any]:
    """A byte-level vocabulary, as Llama 3's: the content of a tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    found = tokenizers.Tokenizer(models.BPE())
    expression = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(expression, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator([*SCRIPTS * 40, Path(__file__).read_text()], trainer)
    raw: dict[str, Any] = json.loads(found.to_str())
    return raw


# -- what is drawn ----------------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": CHATML + ANSWER,
    "chatml, trimmed, with bos": "{{ bos_token }}"
    + CHATML.replace("m.content", "m['content'] | trim").replace("{{ m.role }}", "{{ m['role'] }}")
    + ANSWER,
    "llama2": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token + ' ' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST] ' }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "vicuna": "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}{{ loop.last and ' ' or '\n' }}{% endfor %}"
    "ASSISTANT:",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{%- endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "tojson": "{{ bos_token }}{{ messages | tojson(indent=2) }}\n<|im_start|>"
    "{{ messages[-1] | tojson(sort_keys=true) }}<|im_end|>"
    "{{ messages[0] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "names": "{{ unk_token is defined }}{{ pad_token or 'no pad' }}{{ sep_token }}{% for m in messages %}"
    "{{ m.content }}{{ eos_token }}{{ pad_token }}{% endfor %}{{ bos_token }}",
    "parts": "{% for m in messages %}<|im_start|>{{ m.role }}:{% for c in m.content %}{{ c.text }}{% endfor %}"
    "<|im_end|>{% endfor %}",
    "step": "{{ bos_token }}{% for m in messages %}{{ 'Source: ' + m.role + '\n\n ' + m.content | trim }}<step> "
    "{% endfor %}Source: assistant\nDestination: user\n\n ",
    "macro": "{% macro turn(m, open=false) %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '' if open else '<|im_end|>' }}{% endmacro %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if ns.n > 3 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ turn(m) }}{% endfor %}",
}
HELD_OUT_TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim "
    "+ '<|im_end|>' }}{% endfor %}{{ '<|start|>assistant<|stop|>\n\n' if add_generation_prompt }}",
    "space after": "{% for m in messages %}<|im_start|> {{ m.role }} : {{ m.content }} <|im_end|> {% endfor %}",
    "parts, by type": "{% for m in messages %}{{ '<|im_start|>' ~ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}",
    "recursive": "{% for m in messages recursive %}{{ m.role | capitalize }}{{ m.content | replace('\t', ' ') }}"
    "{{ eos_token if not loop.last else sep_token }}{% endfor %}",
    "dict": "{% set names = dict(user='U', assistant='A', system='S') %}{% for m in messages if m.content %}"
    "<|im_start|>{{ names.get(m.role) }}{{ loop.index }}{{ m.content }}<step>{% endfor %}<|im_start|>",
}
NAMES = ("<|im_start|>", "<|im_end|>", "<step>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<pad>")
HELD_OUT_NAMES = ("<|start|>", "<|stop|>", "<step>>", "<st", "é", "▁x", "   ")
FRAGMENTS = (
    *("the ", "quick", " brown", "fox.", "isn't", "x", "_", "CamelCase", "straße", "naïve", "e\u0301", "ﬁ", "Ωμέγα"),
    *(
        "Привет ",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "ไทย",
        "日本語",
        "中文。",
        "한국어",
        "𠮷",
        "😀",
        "👩‍👩‍👧",
        "🇫🇷",
        "\u200b",
        "\ufeff",
    ),
    *("0", "42", "1234567", " 3.14", "0xFF", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n", "\u00a0", "\u3000"),
    *(
        "\x00",
        "\x1b[0m",
        "\x7f",
        "\ufffd",
        "\U0010ffff",
        "def f(x):\n    return x",
        "{",
        "}",
        "{{ x }}",
        "();",
        '"',
        "'",
    ),
    *("<", ">", "|", "<|", "|>", "[", "]", "▁", "<0x0A>", "\\n", "#", "a\n    return x", "[ INST]", "<im_end>"),
)
HELD_OUT_FRAGMENTS = (
    *(
        "Ẁẅ",
        "ǅ",
        "ﷺ",
        "𝔘𝔫𝔦",
        "🏴󠁧󠁢󠁳󠁣󠁴󠁿",
        "ᚠᛇᚻ",
        "ქართული",
        "አማርኛ",
        "ខ្មែរ",
        "\u2028",
        "\u202e",
        "\u0085",
        "\v",
        "\f",
        "٣٤",
        "½",
        "Ⅷ",
    ),
    *("      ", "\n \n", "\t\t\t", "a" * 70, "=" * 33, "=>>", "<|im_", "im_end|>", "<0xFF>", "<unk", "x  y   z"),
)


@dataclass(frozen=True)
class Drawn:
    """One directory, and how it came about."""

    path: Path
    form: str
    template: str
    names: tuple[str, ...]  # of all that a text may hold as a whole
    config: Mapping[str, Any]


@dataclass
class Generator:
    """Draws directories and conversations; `held_out`: with what is used nowhere else too."""

    seed: int
    held_out: bool = False
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def text(self) -> str:
        fragments = FRAGMENTS + (HELD_OUT_FRAGMENTS if self.held_out else ())
        return "".join(self.rng.choices(fragments, k=self.rng.randint(0, 12)))

    def text_with(self, names: Sequence[str]) -> str:
        parts = [self.text(), self.rng.choice(names), self.text(), self.rng.choice(names)]
        return "".join(parts[: self.rng.randint(1, 4)])

    def conversation(self) -> list[dict[str, str]]:
        roles = ["system"] * self.rng.randint(0, 1) + ["user", "assistant"] * self.rng.randint(0, 2) + ["user"]
        return [{"role": role, "content": self.text()} for role in roles]

    def directory(self, path: Path, form: str) -> Drawn:
        """`form`: spm, json (that of a Llama), fast (a tokenizer.json as it is), bytes (the same, byte-level)."""
        path.mkdir(parents=True)
        rng = self.rng
        templates = TEMPLATES | (HELD_OUT_TEMPLATES if self.held_out else {})
        template = rng.choice(sorted(HELD_OUT_TEMPLATES if self.held_out and rng.random() < 0.6 else templates))
        vocab = vocabulary() if form != "bytes" else byte_level()["model"]["vocab"]
        added = self._added(vocab, NAMES + (HELD_OUT_NAMES if self.held_out else ()))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast" if form in ("fast", "bytes") else
                                  rng.choice(["LlamaTokenizer", "LlamaTokenizerFast"])}  # fmt: skip
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if form != "bytes" else {}
        for key, values in (
            ("legacy", [True, False, None]),
            ("add_prefix_space", [True, False, None]),
            ("add_bos_token", [True, False]),
            ("add_eos_token", [False]),
            ("pad_token", ["<pad>", "</s>", "<|im_end|>"]),
            ("eos_token", ["<|im_end|>", {"content": "<|im_end|>", "__type": "AddedToken"}]),
        ):
            if rng.random() < 0.5:
                config[key] = rng.choice(values)
        files: dict[str, Any] = {"config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}}
        if rng.random() < 0.5:
            config["chat_template"] = templates[template]
        else:
            (path / "chat_template.jinja").write_text(templates[template])
        if form == "spm":
            (path / "tokenizer.model").write_bytes(sentencepiece_model())
        else:
            inside = rng.random() < 0.7
            for entry in added.values() if not inside else ():
                entry["normalized"] = False
            files["tokenizer.json"] = self._tokenizer_json(form, added if inside else {})
        if added or rng.random() < 0.5:
            known = {0: "<unk>", 1: "<s>", 2: "</s>"} if form != "bytes" else {}
            entries = {i: _entry(text, special=True) for i, text in known.items()} | added
            config["added_tokens_decoder"] = {str(i): entry for i, entry in entries.items()}
        elif rng.random() < 0.5:
            files["special_tokens_map.json"] = {"eos_token": rng.choice(["</s>", _entry("<|im_end|>")])}
        for name, content in (files | {"tokenizer_config.json": config}).items():
            (path / name).write_text(json.dumps(content))
        names = [entry["content"] for entry in added.values()] + ["<s>", "</s>", "<unk>", "<pad>", "<|im_end|>"]
        return Drawn(path, form, template, tuple(names), config)

    def _added(self, vocab: Mapping[str, int], names: Sequence[str]) -> dict[int, dict[str, Any]]:
        """A name that the vocabulary has keeps its id, others are behind it without a gap."""
        rng = self.rng
        chosen = rng.sample(names, rng.randint(0, len(names))) if rng.random() < 0.8 else []
        entries, following = {}, len(vocab)
        for name in chosen:
            space = name.isspace()
            plain = any(
                chosen_name.isspace() for chosen_name in chosen
            )  # who gets a space that both want is nobody's rule
            flags = {flag: rng.random() < 0.15 and not plain for flag in ("lstrip", "rstrip", "single_word")}
            special = rng.random() < 0.6 and not space and name not in vocab
            normalized = rng.random() < 0.5 and not special and name not in ("<|im_end|>", "<pad>")
            entry = _entry(name, special=special, normalized=normalized, **flags)
            entries[vocab.get(name, following)] = entry
            following += name not in vocab
        return entries

    def _tokenizer_json(self, form: str, added: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        rng = self.rng
        if form == "bytes":
            raw = json.loads(json.dumps(byte_level()))
            entries = dict(added)
            begin, first = None, 0
        else:
            raw = {"version": "1.0", "truncation": None, "padding": None, "decoder": None}
            raw["model"] = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                            "vocab": dict(vocabulary()), "merges": [list(m) for m in merges()]}  # fmt: skip
            prepend = [{"type": "Prepend", "prepend": "▁"}] * rng.randint(0, 1)
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            metaspace = {"type": "Metaspace", "replacement": "▁", "split": False,
                         "prepend_scheme": rng.choice(["always", "first", "never"])}  # fmt: skip
            as_normaliser = rng.random() < 0.5
            raw["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, replace]} if as_normaliser else None
            raw["pre_tokenizer"] = None if as_normaliser else metaspace
            entries = {i: _entry(text, special=True) for i, text in enumerate(("<unk>", "<s>", "</s>"))} | dict(added)
            begin, first = "<s>", 1
        raw["added_tokens"] = [{"id": i, **entry} for i, entry in entries.items()]
        raw["post_processor"] = None
        if begin and rng.random() < 0.6:
            special = {"SpecialToken": {"id": begin, "type_id": 0}}
            text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
            ids = {begin: {"id": begin, "ids": [first], "tokens": [begin]}}
            raw["post_processor"] = {"type": "TemplateProcessing", "single": [special, text[0]],
                                     "pair": [special, *text], "special_tokens": ids}  # fmt: skip
        return dict(raw)


def _entry(text: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": text, **usual, **flags, "special": special}


def write_gguf(path: Path, tokens: Sequence[tuple[str, int]], **values: Any) -> Path:
    """The sentencepiece vocabulary and further `tokens` (text, type) as llama.cpp's converter stores them."""
    pieces = [(p.piece, p.score, p.type) for p in proto().pieces] + [(text, -1000.0, kind) for text, kind in tokens]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text.encode() for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    for name, value in ({"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | values).items():
        add = (
            writer.add_bool
            if isinstance(value, bool)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_string
        )
        add(f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
