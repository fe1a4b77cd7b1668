"""The OpenAPI document's parts that FastAPI cannot see, since routes read their bodies themselves; and its page.

The page loads nothing from outside: Swagger UI comes with the package fastapi-offline.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.staticfiles import StaticFiles

from deployments.gateway.guard import ASSETS

Json = dict[str, Any]

ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    400: "A field is wrong; `param` names it",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    413: "The body is too long",
    429: "Too much at once: `Retry-After` says when to come back",
    500: "This request failed, and nothing else; trying again would not help",
    503: "No engine takes requests at the moment: `Retry-After` says when to come back",
}


def documented(body: type[BaseModel], examples: dict[str, Json], answer: Json, events: str = "") -> Json:
    """Arguments of a route: its body with examples, what it answers, whole and as `events`, and its errors."""
    shown = {name: {"summary": name, "value": value} for name, value in examples.items()}
    request = {"application/json": {"schema": inlined(body.model_json_schema()), "examples": shown}}
    content: Json = {"application/json": {"schema": {"type": "object"}, "example": answer}}
    if events:
        content["text/event-stream"] = {"schema": {"type": "string"}, "example": events}
    error = {"application/json": {"schema": ERROR}}
    errors = {status: {"description": text, "content": error} for status, text in ERRORS.items()}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": request}},
        "responses": {200: {"description": "The answer", "content": content}, **errors},
    }


def inlined(schema: Any, definitions: Json | None = None) -> Any:
    """A schema with what it refers to in place: references of a route's own would not resolve in the document.

    No body of ours is recursive.
    """
    if isinstance(schema, list):
        return [inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    definitions = definitions or schema.get("$defs", {})
    if "$ref" in schema:
        return inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {name: inlined(part, definitions) for name, part in schema.items() if name != "$defs"}


def add_docs(app: FastAPI) -> None:
    """GET /docs, made for the document that FastAPI serves at /openapi.json."""
    app.mount(ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        assets = ASSETS.removeprefix("/")  # relative, for a service that is not at the root
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="Caravan",
            swagger_js_url=f"{assets}/swagger-ui-bundle.js",
            swagger_css_url=f"{assets}/swagger-ui.css",
            swagger_favicon_url=f"{assets}/favicon.png",
        )
