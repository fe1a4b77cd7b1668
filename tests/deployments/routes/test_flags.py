"""Booleans are as strict as numbers, in every field of every route: no "off" that counts as false, no 1 as true."""

from typing import Any, get_args

import pytest
from pydantic import BaseModel

from deployments.errors import ApiError
from deployments.routes import tokens  # noqa: F401  # its bodies, as those of the others, are found below
from deployments.routes.hosted import bedrock, sagemaker, tgi, watsonx  # noqa: F401
from deployments.routes.openai_protocol import Body, parse_body


def bodies(kind: type[BaseModel] = Body) -> set[type[BaseModel]]:
    return {kind}.union(*(bodies(each) for each in kind.__subclasses__()))


FLAGS = sorted(
    {
        (body, name)
        for body in bodies()
        for name, field in body.model_fields.items()
        if bool in (field.annotation, *get_args(field.annotation))
    },
    key=str,
)


@pytest.mark.parametrize(("body", "name"), FLAGS, ids=[f"{body.__name__}.{name}" for body, name in FLAGS])
@pytest.mark.parametrize("value", ["off", "true", "yes", 1, 0, 1.0, [], {}])
def test_what_is_no_boolean_is_refused_by_name(body: type[BaseModel], name: str, value: Any) -> None:
    with pytest.raises(ApiError) as found:
        parse_body(body, {name: value})
    messages = [found.value.body["error"]["message"]]
    if not any(message.startswith(f"{name}: ") for message in messages):  # another field is missing, and named first
        with pytest.raises(ValueError, match=f"(?s){name}\n.*must be true or false"):
            body.model_validate({name: value})
    else:
        assert messages == [f"{name}: must be true or false"]
        assert found.value.status == 400


def test_there_are_such_fields() -> None:
    names = {f"{body.__name__}.{name}" for body, name in FLAGS}
    assert {"ChatRequest.stream", "StreamOptions.include_usage", "TokenizeRequest.return_token_strs"} <= names
    assert len({body.__module__ for body, _ in FLAGS}) >= 4
