"""The same work done by others on this machine, to stand beside our own figures in one run.

Each peer gets the same prompts (token ids) at once and must give `max_tokens` tokens for each; what it returns is the
seconds that took. They run one at a time, in processes of their own.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

PEERS = ("transformers-float32", "transformers-bfloat16", "llama.cpp")


def run_peer(name: str, model: Path, prompts: list[list[int]], max_tokens: int, threads: int) -> float:
    """Seconds peer `name` needs. Raises `RuntimeError` with its last words if it fails or is not installed."""
    job = json.dumps(
        {"name": name, "model": str(model), "prompts": prompts, "max_tokens": max_tokens, "threads": threads}
    )
    done = subprocess.run([sys.executable, "-m", "ops.bench.peers.servers"], input=job, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def transformers_seconds(model: Path, prompts: list[list[int]], max_tokens: int, threads: int, dtype: str) -> float:
    """One batched greedy `generate`; the prompts must be equally long."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    llama = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts)

    def generate(count: int) -> None:
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == ids.shape[1] + count

    generate(4)  # warm up
    started = time.perf_counter()
    generate(max_tokens)
    return time.perf_counter() - started


def llama_cpp_seconds(model: Path, prompts: list[list[int]], max_tokens: int, threads: int) -> float:
    """llama.cpp's server (the xllamacpp package) with continuous batching, one slot per prompt, over loopback."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = len(prompts)
    params.n_ctx = len(prompts) * (len(prompts[0]) + max_tokens + 16)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    url = f"{server.listening_address}/completion"

    def complete(prompt: list[int], count: int) -> None:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = httpx.post(url, json=body, timeout=600).raise_for_status().json()
        assert answer["tokens_predicted"] == count, answer

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda p: complete(p, 4), prompts))  # warm up
        started = time.perf_counter()
        list(pool.map(lambda p: complete(p, max_tokens), prompts))
        return time.perf_counter() - started


def main() -> None:
    """Run the job on standard input in this process; the seconds are the last line printed."""
    job = json.load(sys.stdin)
    name, model = job["name"], Path(job["model"])
    args = (model, job["prompts"], job["max_tokens"], job["threads"])
    kind, _, dtype = name.partition("-")
    print(transformers_seconds(*args, dtype) if kind == "transformers" else llama_cpp_seconds(*args))


if __name__ == "__main__":
    main()
