"""The APIs of hosted services, as the configuration switches them on."""

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.routing import Match
from starlette.types import Scope

from deployments.config import RouteName
from deployments.gateway.gateway import Gateway
from deployments.routes.hosted import bedrock, sagemaker, tgi, watsonx
from deployments.routes.hosted.vendor import Respond

MAKERS: dict[RouteName, list[tuple[Callable[[Gateway], APIRouter], Respond]]] = {
    "tgi": [(tgi.router, tgi.respond)],
    "watsonx": [(watsonx.router, watsonx.respond)],
    "bedrock": [(bedrock.router, bedrock.respond)],
    "sagemaker": [(sagemaker.container, tgi.respond), (sagemaker.runtime, sagemaker.respond)],
}


@dataclass(frozen=True, slots=True)
class DropIn:
    """Routes, and how errors are written on them."""

    name: RouteName
    router: APIRouter
    respond: Respond

    def owns(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] != Match.NONE for route in self.router.routes)


def drop_ins(gateway: Gateway) -> list[DropIn]:
    """Those of `gateway.routes`."""
    wanted = gateway.config.gateway.routes
    return [DropIn(name, make(gateway), respond) for name in dict.fromkeys(wanted) for make, respond in MAKERS[name]]
