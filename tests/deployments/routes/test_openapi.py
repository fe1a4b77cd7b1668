"""The OpenAPI document: valid, true of every field, with examples that work; and its page, which needs no internet."""

import re
from typing import Any

import jsonschema
import pytest

from deployments.gateway.guard import PAGE_FILES
from deployments.gateway.tenants import Tenant
from deployments.routes import openai_protocol, responses_protocol, tokens
from deployments.routes.openapi import inlined
from model.text.constraint import Constraint
from tests.deployments.gateway.test_gateway import Run, Service, run  # noqa: F401  # a fixture

BODIES = {
    "/v1/chat/completions": openai_protocol.ChatRequest,
    "/v1/completions": openai_protocol.CompletionRequest,
    "/v1/responses": responses_protocol.ResponsesRequest,
    "/tokenize": tokens.TokenizeRequest,
    "/detokenize": tokens.DetokenizeRequest,
}


def test_the_document_describes_every_body(run: Run) -> None:  # noqa: F811
    async def test(service: Service) -> None:
        document = (await service.client.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        for path, model in BODIES.items():
            operation = document["paths"][path]["post"]
            content = operation["requestBody"]["content"]["application/json"]
            jsonschema.Draft202012Validator.check_schema(content["schema"])
            assert content["schema"]["properties"].keys() == model.model_fields.keys()
            assert content["examples"]
            assert {"200", "400", "404", "413", "429", "500", "503"} <= operation["responses"].keys()
        assert {"/v1/models", "/v1/models/{name}", "/health", "/ready", "/version"} <= document["paths"].keys()
        assert "$ref" not in str(document["paths"]["/v1/chat/completions"]["post"]["requestBody"])

    run(test)


def test_every_example_is_answered_and_fits_its_schema(run: Run) -> None:  # noqa: F811
    async def test(service: Service) -> None:
        async def accept(tenant: Tenant, constraint: Constraint, param: str) -> None:
            pass

        service.app.state.gateway.constraints.accept = accept
        document = (await service.client.get("/openapi.json")).json()
        for path in BODIES:
            content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            for name, example in content["examples"].items():
                jsonschema.validate(example["value"], content["schema"])
                response = await service.client.post(path, json=example["value"])
                if "echo" in example["value"]:
                    continue  # the scripted engine has no logprobs of prompts; test_openai.py has this one
                assert response.status_code == 200, (name, response.text)

    run(test)


def test_the_page_loads_nothing_from_elsewhere(run: Run) -> None:  # noqa: F811
    async def test(service: Service) -> None:
        page = (await service.client.get("/docs")).text
        links = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(links) == 3
        for link in links:
            assert f"/{link}" in PAGE_FILES
            assert (await service.client.get(f"/{link}")).status_code == 200
        assert "://" not in page.replace("http://gateway", "")
        assert (await service.client.get("/docs/assets/../core.py")).status_code == 404

    run(test)


@pytest.mark.parametrize("schema", [{"$defs": {"a": {"type": "null"}}, "items": [{"$ref": "#/$defs/a"}]}])
def test_references_are_put_in_place(schema: Any) -> None:
    assert inlined(schema) == {"items": [{"type": "null"}]}
