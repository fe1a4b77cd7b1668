"""What Amazon's two services share: errors of their REST protocol, and the event-stream encoding.

Source: the AWS documents "rest-json protocol" and "application/vnd.amazon.eventstream". An event is a message with
headers of text, all lengths big-endian, closed by checksums:

    total length u32 | headers length u32 | crc32 of these 8 bytes | headers | payload | crc32 of all before
    header: name length u8 | name | 7 (text) | value length u16 | value
"""

import struct
import zlib
from collections.abc import Mapping

import msgspec
from fastapi.responses import Response

from deployments.gateway.exchange import Json
from deployments.routes.hosted.vendor import json_error

EVENT_STREAM = "application/vnd.amazon.eventstream"
TEXT = 7


def message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """One message of an event stream."""
    packed = b"".join(_header(name.encode(), value.encode()) for name, value in headers.items())
    prelude = struct.pack("!II", 12 + len(packed) + len(payload) + 4, len(packed))
    body = prelude + struct.pack("!I", zlib.crc32(prelude)) + packed + payload
    return body + struct.pack("!I", zlib.crc32(body))


def event(kind: str, payload: bytes, content_type: str) -> bytes:
    """What the service has to say."""
    return message({":event-type": kind, ":content-type": content_type, ":message-type": "event"}, payload)


def exception(kind: str, body: Json) -> bytes:
    """An error under way; the stream ends with it."""
    headers = {":exception-type": kind, ":content-type": "application/json", ":message-type": "exception"}
    return message(headers, msgspec.json.encode(body))


def error(status: int, kind: str, body: Json, headers: dict[str, str]) -> Response:
    """`kind` becomes the class of the exception that a client raises."""
    return json_error(status, body, {"x-amzn-ErrorType": kind, **headers})


def _header(name: bytes, value: bytes) -> bytes:
    return struct.pack("!B", len(name)) + name + struct.pack("!BH", TEXT, len(value)) + value
