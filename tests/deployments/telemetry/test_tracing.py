"""Spans of a request: from the client's trace, over its parts, to a collector; and what they cost."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from deployments.telemetry import tracing
from deployments.telemetry.record import Record
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine, tokenizer
from tests.deployments.local_engine import default_model, running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What a process exports whose sampler takes what its client takes, and nothing else."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(0.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("caravan"))
    return exporter


def ask(engine: Any, headers: dict[str, str], **body: Any) -> httpx.Response:
    app = create_gateway(parse_app_config({**ARGS, "gateway": {"resume_attempts": 1}}), engine, Recorded())

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as client:
            return await client.post("/v1/completions", json={"prompt": "Once upon", **body}, headers=headers)

    return asyncio.run(main())


def test_a_clients_trace_goes_on_through_every_part(spans: InMemorySpanExporter) -> None:
    with running(default_model(256)) as engine:
        answer = ask(engine, SENT, max_tokens=8, temperature=0)
    assert answer.status_code == 200
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) >= {"caravan completions", "body", "tokenise", "queue", "prefill", "first token", "decode"}
    whole = found["caravan completions"]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert answer.headers["traceparent"] == f"00-{TRACE}-{whole.context.span_id:016x}-01"
    for name, span in found.items():
        if span is not whole:
            assert span.parent is not None
            assert span.parent.span_id == whole.context.span_id
            assert times(whole)[0] - 0.002 <= times(span)[0] <= times(span)[1] <= times(whole)[1] + 0.002, name
    order = [times(found[name])[1] for name in ("body", "tokenise", "queue", "prefill", "decode")]
    assert order == sorted(order)
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.usage.output_tokens"] == 8
    assert "Once upon" not in str([span.to_json() for span in found.values()])


def times(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


def test_a_stream_that_moves_says_so(spans: InMemorySpanExporter) -> None:
    engine = ScriptedEngine()
    engine.script = [500, None]

    class Mended(ScriptedEngine):
        async def generate(self, request: Any) -> Any:
            self.script = [500, None] if not request.output_ids else [501, 2]
            async for events in super().generate(request):
                yield events

    assert ask(Mended(), SENT, max_tokens=9).status_code == 200
    (resumed,) = [span for span in spans.get_finished_spans() if span.name == "resume"]
    assert resumed.attributes == {"cause": "lost"}


def test_what_is_not_sampled_costs_no_span(spans: InMemorySpanExporter) -> None:
    engine = ScriptedEngine()
    engine.script = [500, 2]
    assert ask(engine, {}).status_code == 200
    assert ask(engine, {"traceparent": f"00-{TRACE}-{PARENT}-00"}).status_code == 200
    assert ask(engine, {"traceparent": "nonsense"}).status_code == 200
    assert spans.get_finished_spans() == ()


def test_spans_reach_a_collector_by_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver of the protocol on this machine, which reads what OpenTelemetry's own exporter sends."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="caravan[tracing] is not here")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from tests.deployments.telemetry.collector import collector

    with collector() as (url, bodies):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        provider = TracerProvider()
        for processor in tracing.otlp():
            provider.add_span_processor(processor)
        monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("caravan"))
        engine = ScriptedEngine()
        engine.script = [*tokenizer().encode("Hello", add_bos=False), 2]
        assert ask(engine, SENT).status_code == 200
        provider.shutdown()
    sent = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    names = [s.name for r in sent for group in r.resource_spans for scope in group.scope_spans for s in scope.spans]
    assert {"caravan completions", "body", "tokenise", "decode"} <= set(names)


@pytest.mark.slow
def test_what_tracing_costs_at_256_streams(capsys: pytest.CaptureFixture[str]) -> None:
    """Processor time of what tracing adds to a request, beside that of one of 256 streams of 64 tokens at a gateway."""
    served = min(seconds_a_stream() for _ in range(3))
    traced, untraced = (min(seconds_of_tracing(ratio) for _ in range(5)) for ratio in (1.0, 0.0))
    usual = 0.01 * traced + 0.99 * untraced
    with capsys.disabled():
        print(f"\na stream {served * 1e6:.0f} us; tracing {traced * 1e6:.0f} us, {untraced * 1e6:.0f} if not sampled")
        print(f"one in a hundred: {usual / served:.2%}; all: {traced / served:.1%}")
    assert usual <= 0.01 * served


def seconds_a_stream() -> float:
    engine = ScriptedEngine()
    engine.script = [*[500] * 63, 2]
    app = create_gateway(parse_app_config(ARGS), engine, Recorded())

    async def main() -> float:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=120) as client:
            body = {"prompt": "x", "stream": True, "max_tokens": 64}
            began = time.process_time()
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(256)))
            assert {answer.status_code for answer in answers} == {200}
            return (time.process_time() - began) / 256

    return asyncio.run(main())


def seconds_of_tracing(ratio: float, times: int = 1000) -> float:
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio))
    provider.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_tracer", provider.get_tracer("caravan"))
        began = time.process_time()
        for _ in range(times):
            record = Record(request_id="x", endpoint="chat")
            span = tracing.begin(record, {b"host": b"gateway"})
            tracing.traceparent(span)
            for part in ("body", "tokenise", "queue", "prefill", "first token", "decode"):
                record.mark(part, 1.0, 2.0)
            tracing.end(span, record, "stop")
        return (time.process_time() - began) / times
