"""Spans of OpenTelemetry, where Serve's `tracing_config` (or its environment variables) switches tracing on.

Serve makes the tracer of each process and spans of its own, from proxy to replica. Ours tell what it cannot know: where
the time of a request went. They are made of its record, when it ends, so that a request that is not sampled costs
nothing but the question. A `traceparent` that a client sends is continued, and said in the answer.

    tracing_config: {enabled: true, exporter_import_path: "deployments.telemetry.tracing:otlp", sampling_ratio: 0.01}
"""

import time
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.telemetry.record import Record

W3C = ("traceparent", "tracestate")
_tracer = trace.get_tracer("caravan")  # of whatever provider there is once one is set
_w3c = TraceContextTextMapPropagator()


def otlp() -> list[Any]:
    """For `exporter_import_path`: to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names. Needs caravan[tracing]."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def begin(record: Record, headers: dict[bytes, bytes]) -> Span:
    """The span of a request; its record keeps marks from now on if somebody is to see them."""
    context = None
    if not trace.get_current_span().get_span_context().is_valid and b"traceparent" in headers:
        context = _w3c.extract({name: headers.get(name.encode(), b"").decode("latin-1") for name in W3C})
    span = _tracer.start_span(f"caravan {record.endpoint}", context, kind=SpanKind.SERVER)
    if span.is_recording():
        record.marks = []
    return span


def traceparent(span: Span) -> str | None:
    """As a client reads it; None where there is no trace."""
    carrier: dict[str, str] = {}
    _w3c.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent")


def end(span: Span, record: Record, outcome: str) -> None:
    """With a child for each of its marks."""
    if record.marks is not None:
        offset = time.time() - time.monotonic()  # records count by the monotonic clock, spans by that of the day
        context = trace.set_span_in_context(span)
        for name, started, ended, attributes in record.marks:
            child = _tracer.start_span(name, context, start_time=_ns(started + offset), attributes=attributes)
            child.end(_ns(ended + offset))
        span.set_attributes(_attributes(record, outcome))
        if outcome == "error":
            span.set_status(StatusCode.ERROR)
    span.end()


def _attributes(record: Record, outcome: str) -> dict[str, Any]:
    """Of what logs tell too: no text of anybody's."""
    found = {
        "caravan.request_id": record.request_id,
        "caravan.endpoint": record.endpoint,
        "caravan.tenant": record.tenant,
        "caravan.outcome": outcome,
        "http.response.status_code": record.status,
        "gen_ai.usage.input_tokens": record.fields.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": record.fields.get("completion_tokens"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
