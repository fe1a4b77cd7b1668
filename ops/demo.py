"""`make demo`: a service on this machine, an answer, four streams at once, the live view, and a clean end."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ops.bench.service import load
from ops.chat_client import served_model, stream_chat
from ops.local import CONFIG, console, run
from ops.watch import top

WATCH_S = 3.5  # less than the streams take
QUESTION = "What is the capital of France?"
STREAMS = (
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me a short recipe for pancakes.",
)


def main() -> None:
    """Serve the default model on this machine, show what it does, stop."""
    run(CONFIG, 2, lambda head, url: show(console, url, head.metrics))


def show(console: Console, url: str, metrics: str) -> None:
    """Ask, stream, look. Raises `ChatFailed` if the service does not answer."""
    model = served_model(url)
    console.rule(f"One question to {model}")
    console.print(f"[bold]> {QUESTION}[/bold]")
    for piece in stream_chat(url, model, [{"role": "user", "content": QUESTION}], temperature=0, max_tokens=60):
        console.print(piece, end="", markup=False, highlight=False)
    console.print()
    console.rule("Four streams at once")
    bodies: list[dict[str, Any]] = [
        {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 80,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        }
        for question in STREAMS
    ]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: asyncio.run(load.run(f"{url}/v1/chat/completions", bodies, concurrency=4)))
        console.print("while they run, caravan top --once:")
        top.run([metrics], interval=WATCH_S, once=True)
        summary, streams = running.result()
    answers = Table("tokens", "first token", "answer", show_lines=True)
    for stream in streams:
        shown = stream.error or " ".join(stream.text.split())[:160]
        answers.add_row(str(stream.output_tokens), f"{stream.ttft_s * 1000:.0f} ms", shown)
    console.print(answers)
    console.print(summary.table("What the clients saw"))
    console.rule()


if __name__ == "__main__":
    typer.run(main)
