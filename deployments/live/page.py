"""GET /live and what belongs to it, where the configuration switches it on."""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response, StreamingResponse

from deployments.gateway.gateway import Gateway
from deployments.live.feed import Feed

PATH = "/live"
HERE = Path(__file__).parent
FILES = {"page.js": "text/javascript", "page.css": "text/css"}
# Nothing from elsewhere, nothing inline, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
OPEN_PATHS = frozenset({PATH, *(f"{PATH}/{name}" for name in FILES)})  # they say nothing; the events do, and want a key


def router(gateway: Gateway) -> APIRouter:
    """The page, its two files, and the events that it shows."""
    routes = APIRouter(include_in_schema=False)
    feed = Feed(gateway)

    def check_wanted() -> None:
        """The setting may change while the gateway runs."""
        if not gateway.config.gateway.live_page:
            raise HTTPException(404)

    def serve(name: str, media_type: str) -> None:
        content = (HERE / name).read_bytes()

        async def file() -> Response:
            check_wanted()
            return Response(content, media_type=media_type, headers=HEADERS)

        routes.add_api_route(PATH if name == "page.html" else f"{PATH}/{name}", file, methods=["GET"])

    for name, media_type in {"page.html": "text/html", **FILES}.items():
        serve(name, media_type)

    @routes.get(f"{PATH}/events")
    async def events() -> Response:
        check_wanted()
        feed.check_room()
        return StreamingResponse(
            feed.events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no", **HEADERS}
        )

    return routes
