"""Real clients against the gateway on a real port, in front of the default model: what they get, what they raise."""

import datetime
import ipaddress
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import httpx
import huggingface_hub.errors
import langchain_core.exceptions
import openai
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import InferenceClient
from langchain_openai import ChatOpenAI, OpenAI

from cluster.scheduling.sequence import Request, TokenEvent
from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from deployments.errors import ApiError
from deployments.gateway.tenants import add_key
from tests import golden
from tests.deployments.gateway.test_gateway import Recorded
from tests.deployments.local_engine import LocalEngine, default_model, running
from tests.deployments.served import served

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
NAME, HOSTED = "smollm2-135m-instruct", "meta.llama2-13b-chat-v1"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
CLIENTS = Path(sys.prefix) / "clients"
ARGS: dict[str, Any] = {
    "model": {"path": golden.MODEL, "name": NAME, "max_model_len": 256, "aliases": [HOSTED]},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.1},
    "gateway": {"routes": ["tgi", "watsonx", "bedrock", "sagemaker"]},
}


# seed -> how often, and how, a request with it is refused before it is served
REFUSALS = {101: [429, 503], 102: [503], 103: [429], 104: [429], 105: [429], 106: [503], 107: [503]}
REFUSALS |= {108: [503], 109: [429]}


class Overloaded:
    """In front of an engine, as if too much were asked of it: see `REFUSALS`."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.replicas = engine.replicas
        self.refusals = {seed: list(statuses) for seed, statuses in REFUSALS.items()}

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        if self.refusals.get(request.sampling.seed):
            status = self.refusals[request.sampling.seed].pop(0)
            raise ApiError(status, "wait a little", headers={"Retry-After": "1"})
        async for events in self.engine.generate(request):
            yield events


class Service:
    """The addresses of one service, and the processes of clients that do not fit into this one."""

    def __init__(self, url: str, tls: str, certificate: Path, overloaded: Overloaded) -> None:
        self.url, self.tls, self.certificate, self.overloaded = url, tls, certificate, overloaded

    def refused(self, seed: int) -> bool:
        """Whether requests with this seed have been refused as often as they were to be."""
        return self.overloaded.refusals[seed] == []

    def check(self, client: str, *args: str) -> None:
        """Run tests/clients/CLIENT_checks.py, which says what is wrong and fails, or says ok."""
        assert CLIENTS.is_dir(), "make clients puts the clients there that do not fit beside the pinned packages"
        environment = {**os.environ, "PYTHONPATH": f"{CLIENTS}{os.pathsep}{ROOT}"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(ROOT / f"tests/clients/{client}_checks.py"), *args],
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.stdout.endswith("ok\n"), done.stderr[-3000:]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pem, key = certificate(tmp_path_factory.mktemp("tls"))
    with ExitStack() as stack:
        engine = stack.enter_context(running(default_model(ARGS["model"]["max_model_len"])))
        overloaded = Overloaded(engine)
        app = create_gateway(parse_app_config(ARGS), overloaded, Recorded())
        url, tls = stack.enter_context(served(app)), stack.enter_context(served(app, (pem, key)))
        yield Service(url, tls, pem, overloaded)
        app.state.gateway.close()


def certificate(directory: Path) -> tuple[Path, Path]:
    """One of 127.0.0.1 for a day, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "caravan")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(address, False).add_extension(x509.BasicConstraints(True, None), True)
    signed = builder.sign(key, hashes.SHA256())
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    return files


# -- clients of OpenAI's API -------------------------------------------------------------------------------------------


def test_openai(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    ask: Any = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
    assert client.chat.completions.create(**ask).choices[0].message.content == ANSWER
    stream = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER
    assert client.chat.completions.create(**ask, seed=101).choices[0].message.content == ANSWER
    assert service.refused(101)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.chat.completions.create(**(ask | {"max_tokens": 5000}))
    assert caught.value.code == "context_length_exceeded"


def test_langchain(service: Service) -> None:
    base: Any = {"base_url": f"{service.url}/v1", "api_key": "none", "model": NAME, "temperature": 0, "max_tokens": 20}
    chat = ChatOpenAI(**base)
    answer = chat.invoke(
        [("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"), ("user", QUESTION)]
    )
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(str(chunk.content) for chunk in chunks) == ANSWER
    assert [c.usage_metadata for c in chunks if c.usage_metadata] == [answer.usage_metadata]
    assert [a.content for a in chat.batch([QUESTION, QUESTION])] == [ANSWER] * 2
    assert OpenAI(**base).invoke("Once upon a time").startswith(", the city of")
    assert "".join(OpenAI(**base).stream("Once upon a time")).startswith(", the city of")
    assert ChatOpenAI(**base, seed=102).invoke(QUESTION).content == ANSWER
    assert service.refused(102)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat.invoke("word " * 600)
    with pytest.raises(langchain_core.exceptions.ModelInvalidRequestError, match="image_url"):
        chat.invoke([("user", [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}])])  # type: ignore[list-item]


def test_litellm(service: Service) -> None:
    service.check("litellm", service.url, NAME, HOSTED, QUESTION, ANSWER)
    assert service.refused(103)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl(service: Service) -> None:
    def curl(path: str, body: Any, *options: str) -> str:
        command = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", json.dumps(body), *options]
        return subprocess.run([*command, service.url + path], capture_output=True, text=True, check=True).stdout

    ask = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
    assert json.loads(curl("/v1/chat/completions", ask))["choices"][0]["message"]["content"] == ANSWER
    *chunks, done, _ = curl("/v1/chat/completions", {**ask, "stream": True}, "-N").split("\n\n")
    assert done == "data: [DONE]"
    deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    text = json.loads(curl("/v1/completions", {"model": NAME, "prompt": "Once upon a time", "temperature": 0}))
    assert text["choices"][0]["text"].startswith(", the city of")
    assert curl("/v1/chat/completions", {**ask, "max_tokens": 5000}, "-o", "/dev/null", "-w", "%{http_code}") == "400"
    again = curl("/v1/chat/completions", {**ask, "seed": 106}, "--retry", "3", "-f")
    assert json.loads(again)["choices"][0]["message"]["content"] == ANSWER
    assert service.refused(106)


# -- clients of hosted services ----------------------------------------------------------------------------------------


def aws(service: Service, name: str) -> Any:
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    retries: Any = {"total_max_attempts": 3, "mode": "standard"}
    return boto3.client(name, endpoint_url=service.url, **keys, config=Config(retries=retries))  # type: ignore[call-overload]


def test_bedrock_client(service: Service) -> None:
    client = aws(service, "bedrock-runtime")
    body = {"prompt": PROMPT, "max_gen_len": 20, "temperature": 0}
    answer = json.loads(client.invoke_model(modelId=HOSTED, body=json.dumps(body))["body"].read())
    assert (answer["generation"], answer["stop_reason"]) == (ANSWER, "stop")
    stream = client.invoke_model_with_response_stream(modelId=HOSTED, body=json.dumps(body))["body"]
    chunks = [json.loads(event["chunk"]["bytes"]) for event in stream]
    assert "".join(chunk["generation"] for chunk in chunks) == ANSWER
    assert [c["prompt_token_count"] for c in chunks] == [answer["prompt_token_count"]] + [None] * (len(chunks) - 1)
    assert chunks[-1]["generation_token_count"] == answer["generation_token_count"]
    metrics = chunks[-1]["amazon-bedrock-invocationMetrics"]
    assert metrics["inputTokenCount"] == answer["prompt_token_count"]
    with pytest.raises(client.exceptions.ValidationException, match="top_k"):
        client.invoke_model(modelId=HOSTED, body=json.dumps(body | {"top_k": 5}))
    with pytest.raises(client.exceptions.ValidationException, match="maximum context length"):
        client.invoke_model(modelId=HOSTED, body=json.dumps(body | {"max_gen_len": 2000}))
    arn = "arn:aws:bedrock:us-east-1::foundation-model/nowhere"
    with pytest.raises(client.exceptions.ResourceNotFoundException, match="nowhere"):
        client.invoke_model(modelId=arn, body=json.dumps(body))


def test_bedrock_client_with_a_key(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's client sends our key as the bearer token that it finds in the environment, over TLS alone."""
    file = tmp_path / "keys.yaml"
    key = add_key(file, "search")
    recorded = Recorded()
    guarded = parse_app_config({**ARGS, "auth": {"keys_file": str(file)}})
    app = create_gateway(guarded, service.overloaded, recorded)
    ask = {"modelId": HOSTED, "body": json.dumps({"prompt": PROMPT, "max_gen_len": 20, "temperature": 0})}
    with served(app, (service.certificate, service.certificate.with_name("key.pem"))) as url:
        where: Any = {"endpoint_url": url, "region_name": "us-east-1", "verify": str(service.certificate)}

        def invoke(bearer: str) -> Any:
            monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", bearer)
            client = boto3.client("bedrock-runtime", **where)
            return json.loads(client.invoke_model(**ask)["body"].read())

        assert invoke(key)["generation"] == ANSWER
        assert recorded.counts["tenant_requests_total", "search", "stop"] == 1
        with pytest.raises(ClientError, match="Incorrect API key") as caught:
            invoke("another")
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 401  # type: ignore[typeddict-item]
        monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK")
        signed = boto3.client("bedrock-runtime", **where, aws_access_key_id="x", aws_secret_access_key="x")
        with pytest.raises(ClientError, match="didn't provide an API key"):
            signed.invoke_model(**ask)
    app.state.gateway.close()


def test_sagemaker_client(service: Service) -> None:
    client = aws(service, "sagemaker-runtime")

    def invoke(endpoint: str = HOSTED, **body: Any) -> Any:
        answer = client.invoke_endpoint(
            EndpointName=endpoint, Body=json.dumps(body), CustomAttributes="accept_eula=true"
        )  # fmt: skip
        return json.loads(answer["Body"].read())

    assert invoke(inputs=PROMPT, parameters={"max_new_tokens": 20}) == [{"generated_text": ANSWER}]
    dialog = [{"role": "user", "content": QUESTION}]
    [said] = invoke(inputs=[dialog], parameters={"max_new_tokens": 20, "temperature": 0})
    assert said == {"generation": {"role": "assistant", "content": ANSWER}}
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}, "stream": True}
    stream = client.invoke_endpoint_with_response_stream(EndpointName=HOSTED, Body=json.dumps(body))
    assert stream["ContentType"].startswith("text/event-stream")
    events = b"".join(event["PayloadPart"]["Bytes"] for event in stream["Body"]).decode().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["generated_text"] == ANSWER
    with pytest.raises(ClientError, match="typical_p") as caught:
        invoke(inputs=PROMPT, parameters={"typical_p": 0.5})
    assert caught.value.response["Error"]["Code"] == "ModelError"
    assert caught.value.response["OriginalStatusCode"] == 422  # type: ignore[typeddict-item]
    with pytest.raises(ClientError, match="nowhere"):
        invoke("nowhere", inputs=PROMPT)
    sampled = {"do_sample": True, "top_k": 1, "seed": 107, "max_new_tokens": 20}
    assert invoke(inputs=PROMPT, parameters=sampled) == [{"generated_text": ANSWER}]
    assert service.refused(107)


def test_huggingface_inference_client(service: Service) -> None:
    client = InferenceClient(model=service.url)
    assert client.text_generation(PROMPT, max_new_tokens=20) == ANSWER
    whole = client.text_generation(PROMPT, max_new_tokens=20, details=True)
    events = list(client.text_generation(PROMPT, max_new_tokens=20, stream=True, details=True))
    assert [e.token.id for e in events] == [t.id for t in whole.details.tokens]  # type: ignore[union-attr]
    assert events[-1].generated_text == whole.generated_text == ANSWER
    assert (
        "".join(client.text_generation(PROMPT, max_new_tokens=5, stream=True))
        == ANSWER[: len(" The capital of France is") - 1]
    )
    with pytest.raises(huggingface_hub.errors.ValidationError, match="watermark"):
        client.text_generation(PROMPT, watermark=True)
    with pytest.raises(huggingface_hub.errors.OverloadedError):
        client.text_generation(PROMPT, do_sample=True, seed=108)
    info = httpx.get(f"{service.url}/info").json()
    assert (info["model_id"], info["max_total_tokens"]) == (NAME, 256)


def test_text_generation_client(service: Service) -> None:
    service.check("text_generation", service.url, PROMPT, ANSWER)


def test_watsonx_client(service: Service) -> None:
    service.check("watsonx", service.tls, str(service.certificate), HOSTED, PROMPT, ANSWER)
    assert service.refused(105)
