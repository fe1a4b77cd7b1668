"""What operators ask of the service itself, with a key that says that they are."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.errors import ApiError
from deployments.gateway.exchange import tenant
from deployments.gateway.gateway import Gateway


def router(gateway: Gateway) -> APIRouter:
    """POST /v1/cache/reset."""
    routes = APIRouter(tags=["operators"])

    @routes.post("/v1/cache/reset", summary="Forget all cached keys and values", status_code=202)
    async def reset(http: Request) -> Response:
        """Engines follow within two seconds. Requests under way go on; what comes next is computed anew."""
        if not tenant(http).operator:
            raise ApiError(
                403, "this is for operators: make a key with `caravan keys add NAME --operator`", code="not_an_operator"
            )
        await gateway.engine.reset_cache()
        return Response(status_code=202)

    return routes
