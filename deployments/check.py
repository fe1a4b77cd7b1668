"""Strict validation of a whole Serve configuration file.

`serve deploy` accepts a mistyped deployment option without a word and runs without it. This does not.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import FLOAT8_NEEDS_CUDA, read_model
from cluster.sizing import too_small
from deployments.config import AppConfig, ConfigError, describe, parse_app_config, with_user_config
from deployments.gateway.tenants import KeyRing
from deployments.placement import wrong_overrides
from deployments.serve_file import DEPLOYMENTS, IMPORT_PATH, POLICY
from model.config import ModelConfig, split_layers
from model.sampling_defaults import read_sampling_defaults
from model.shards import shards
from model.text.chat import PromptFormatError, load_chat_template
from model.text.tokenizer import check_fits, load_tokenizer
from model.weights import open_checkpoint, resolve_path

OPAQUE = ("args", "user_config", "policy_kwargs", "request_router_kwargs", "runtime_env")


def check_file(path: Path, files: bool = True, gpu: str | None = None) -> list[str]:
    """Everything that is wrong with the file, one line each; empty if nothing is.

    Without `files` what lies on other machines need not be here: the checkpoint, and the file of keys.
    `gpu`: the kind that stages will get, if `resources.accelerator_type` does not say it.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    except yaml.YAMLError as error:
        return [f"{path}: not valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        return [f"{path}: must be a mapping with the key applications"]
    return list(_check(content, files, gpu))


def _check(content: dict[str, Any], files: bool, gpu: str | None) -> Iterable[str]:
    from ray.serve.schema import ServeDeploySchema

    problems = list(unknown_keys(content, ServeDeploySchema, ""))
    yield from problems
    if not problems:
        try:
            ServeDeploySchema.model_validate(content)
        except ValidationError as error:
            yield from describe(error)
    applications = content.get("applications")
    for i, application in enumerate(applications if isinstance(applications, list) else []):
        if isinstance(application, dict):
            yield from _check_application(application, f"applications[{i}]", files, gpu)


def _check_application(application: dict[str, Any], path: str, files: bool, gpu: str | None) -> Iterable[str]:
    if application.get("import_path") != IMPORT_PATH:
        return  # somebody else's application: only Serve's part can be checked
    args = application.get("args") or {}
    try:
        config = parse_app_config(args)
    except ConfigError as error:
        yield from (f"{path}.args.{line}" for line in str(error).splitlines())
        return
    yield from (f"{path}.args.{line}" for line in (*_check_model(config, files, gpu), *_check_keys(config)))
    for i, deployment in enumerate(application.get("deployments") or []):
        if isinstance(deployment, dict):
            if deployment.get("name") == "Engine":
                yield from (f"{path}.deployments[{i}].{line}" for line in wrong_overrides(config, deployment))
            yield from (f"{path}.{line}" for line in _check_deployment(application, deployment, f"deployments[{i}]"))


def _check_deployment(application: dict[str, Any], deployment: dict[str, Any], path: str) -> Iterable[str]:
    """What changes in place. Lines begin with a path below the application's."""
    name = deployment.get("name")
    if name not in DEPLOYMENTS:
        yield f"{path}.name: must be one of {', '.join(DEPLOYMENTS)}, got {name}"
        return
    args = application.get("args") or {}
    try:
        config = parse_app_config(with_user_config(args, deployment.get("user_config"), name))
        if "auth" not in args:
            yield from (f"{path}.user_config.{line}" for line in _check_keys(config))
    except ConfigError as error:
        for line in str(error).splitlines():
            yield f"{path}.{line if line.startswith('user_config') else f'user_config.{line}'}"
    if deployment.get("num_replicas") is not None:
        yield f"{path}.num_replicas: {name} has a scaler: set min_replicas and max_replicas of autoscaling_config"
    bounds = deployment.get("autoscaling_config")
    if not isinstance(bounds, dict):
        return
    if (application.get("autoscaling_policy") or {}).get("policy_function") != POLICY:
        yield (
            f"autoscaling_policy: must be {{policy_function: {POLICY}}}: without it Serve forgets ours and counts "
            f"requests, as {path}.autoscaling_config is given"
        )
    if "policy" in bounds:
        yield f"{path}.autoscaling_config.policy: leave it out: the application has its autoscaling_policy"
    yield from _check_bounds(bounds, f"{path}.autoscaling_config")
    if name == "Engine" and "autoscaling" in args:
        yield f"{path}.autoscaling_config: stands in args.autoscaling too: leave that out"


def _check_bounds(bounds: dict[str, Any], path: str) -> Iterable[str]:
    from ray.serve.config import AutoscalingConfig

    try:
        AutoscalingConfig(**{key: value for key, value in bounds.items() if key != "policy"})
    except ValidationError as error:
        yield from (f"{path}.{line}".replace(".: Value error,", ":") for line in describe(error))


def _check_keys(config: AppConfig) -> Iterable[str]:
    """The file of keys, if it is on this machine: it has to be where gateways run."""
    if config.auth.keys_file and Path(config.auth.keys_file).exists():
        try:
            KeyRing(config.auth)
        except ConfigError as error:
            yield from str(error).splitlines()


def _check_model(config: AppConfig, files: bool, gpu: str | None) -> Iterable[str]:
    """What only the checkpoint can tell."""
    if config.model.quantization == "fp8" and config.pipeline.device != "cuda":
        yield FLOAT8_NEEDS_CUDA
    if not files and not is_here(config.model.path):
        return
    try:
        model = read_model(config.model)
        split = config.pipeline.split
        split_layers(model, config.pipeline.stages, None if split == "auto" else split)
        shards(model, config.pipeline.tensor_parallel)
        limit = model.longest_context
        if (config.model.max_model_len or 0) > limit:
            yield f"model.max_model_len: {config.model.max_model_len} is more than the model's {limit}"
        if config.pipeline.device == "cuda" and config.cache.memory_gb is None and config.resources.stage_gpus == 1:
            problem = too_small(config, model, config.resources.accelerator_type or gpu)
            yield from [problem] if problem else []
        if files:
            yield from _check_files(config, model)
    except ValueError as error:
        text = str(error)
        yield text if text.startswith(("model.", "pipeline.")) else f"model.path: {text}"


def _check_files(config: AppConfig, model: ModelConfig) -> Iterable[str]:
    """The checkpoint's files as gateways and stages will read them: all weights are there, and prompts can be made."""
    path = resolve_path(config.model.path)
    if config.model.load_format == "auto":
        open_checkpoint(path).nbytes(split_layers(model, 1)[0].tensor_names(model))
    if config.model.sampling_defaults == "checkpoint":
        read_sampling_defaults(path)
    tokenizer = load_tokenizer(path)
    check_fits(tokenizer, model.vocab_size, path)
    try:
        template = load_chat_template(path, tokenizer, config.model.prompt_format)
        ends = tokenizer.eos_ids
        if template is not None:
            template.encode([{"role": "user", "content": "Hello!"}])
            ends |= template.stop_ids
    except PromptFormatError as error:
        yield f"model.prompt_format: {error}"
        return
    if not ends:
        yield f"model.path: no file of {path} names a token that ends an answer: each would go on to max_tokens"


def is_here(path: str) -> bool:
    """Whether a checkpoint can be looked at on this machine."""
    try:
        resolve_path(path)
    except ValueError:
        return False
    return True


def unknown_keys(value: Any, schema: Any, path: str) -> Iterable[str]:
    """Keys of `value` that the pydantic model `schema` does not have, at any depth."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from unknown_keys(item, schema, f"{path}[{i}]")
    if not isinstance(value, dict) or schema is None:
        return
    fields = schema.model_fields
    for key, inner in value.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            yield f"{here}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        elif key not in OPAQUE:
            yield from unknown_keys(inner, _model_in(fields[key].annotation, str(key)), here)


def _model_in(annotation: Any, key: str) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `Optional[List[X]]`, if there is one."""
    if key == "autoscaling_config":  # annotated as a plain dict
        from ray.serve.config import AutoscalingConfig

        found: type[BaseModel] = AutoscalingConfig
        return found
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for arg in get_args(annotation) if (inner := _model_in(arg, ""))), None)
