"""`caravan check`: the whole file, ours and Serve's part; a mistyped key anywhere is named by its path."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from deployments.check import check_file
from deployments.config import ConfigError, parse_app_config
from ops.cli import app
from tests import golden
from tests.model.test_formats import PLAIN
from tests.model.text.checkpoints import SIZE
from tests.model.text.test_checkpoint_files import directory

ROOT = Path(__file__).parents[2]
Change = Callable[[dict[str, Any]], None]


def application(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["applications"][0]
    return found


def changed(tmp_path: Path, change: Change) -> Path:
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    change(config)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def put(path: str, value: Any) -> Change:
    """Set `a.b.c` in the application's args, or from the top with a leading slash."""

    def change(config: dict[str, Any]) -> None:
        where = config if path.startswith("/") else application(config)["args"]
        *parents, last = path.lstrip("/").split(".")
        for parent in parents:
            where = where[int(parent)] if parent.isdigit() else where[parent]
        where[last] = value

    return change


@pytest.mark.parametrize("file", ["ray_config.yaml", *sorted(map(str, (ROOT / "deployments/configs").glob("*.yaml")))])
def test_our_own_files_are_good(file: str) -> None:
    problems = check_file(ROOT / file)
    missing_model = [p for p in problems if "model.path" in p]  # production checkpoints are not on every machine
    assert problems == (missing_model if file != "ray_config.yaml" else [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("model.pth", "x"), ["args.model.pth: unknown key", "did you mean path?"]),
        (put("scheduler.max_num_seq", 4), ["args.scheduler.max_num_seq: unknown key", "max_num_seqs"]),
        (put("scheduller", {}), ["args.scheduller: unknown key", "scheduler"]),
        (put("scheduler.max_num_seqs", "many"), ["args.scheduler.max_num_seqs"]),
        (put("scheduler.max_num_seqs", 0), ["args.scheduler.max_num_seqs"]),
        (put("pipeline.split", [10, 10]), ["pipeline.split"]),
        (put("pipeline.stages", 31), ["pipeline"]),
        (put("model.max_model_len", 10**6), ["model.max_model_len", "8192"]),
        (put("model.path", "/nowhere/model.gguf"), ["model.path", "/nowhere/model.gguf"]),
        (put("model.dtype", "float8"), ["model.dtype"]),
        (put("model.quantization", "fp8"), ["model.quantization: fp8 needs pipeline.device: cuda"]),
        (put("model.quantization_ignore", ["w2"]), ["model.quantization_ignore: w2: ", "set it to fp8"]),
        (put("cache", {}), ["cache.memory_gb", "required on cpu"]),
        (put("/applications.0.deployments.0.autoscaling_config.min_replicas", 5), ["max_replicas"]),
        (put("/http_optoins", {}), ["http_optoins: unknown key", "http_options"]),
        (put("/http_options.prot", 1), ["http_options.prot: unknown key", "port"]),
        (put("/applications.0.route_prefx", "/"), ["applications[0].route_prefx", "route_prefix"]),
        (put("/applications.0.deployments", [{"name": "Engin"}]), ["deployments[0].name", "Engine"]),
        (put("/applications.0.deployments", [{"name": "Engine", "num_replica": 1}]), ["num_replica", "num_replicas"]),
        (put("/http_options.port", "eighty"), ["port"]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_every_problem_is_named_by_its_path(tmp_path: Path, change: Change, words: list[str]) -> None:
    problems = check_file(changed(tmp_path, change))
    assert problems
    assert all(any(word in problem for problem in problems) for word in words), problems


def test_what_fp8_leaves_out_is_checked_against_the_model(tmp_path: Path) -> None:
    def ignoring(*patterns: str) -> Change:
        def change(config: dict[str, Any]) -> None:
            put("model.quantization", "fp8")(config)
            put("model.quantization_ignore", list(patterns))(config)
            put("pipeline.device", "cuda")(config)

        return change

    assert check_file(changed(tmp_path, ignoring("w2", "layers.29.*"))) == []
    (problem,) = check_file(changed(tmp_path, ignoring("w2", "layers.30.*")))
    assert "args.model.quantization_ignore: 'layers.30.*' names nothing" in problem
    assert "layers.0.wqkv to layers.29.w2" in problem


def test_a_file_of_keys_is_checked_where_it_can_be_seen(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    assert check_file(changed(tmp_path, put("auth", {"keys_file": str(keys)}))) == [], "it may be on other nodes only"
    keys.write_text("tenants: [{name: a, wieght: 2}]")
    (problem,) = check_file(changed(tmp_path, put("auth", {"keys_file": str(keys)})))
    assert "wieght: unknown key" in problem
    (problem,) = check_file(changed(tmp_path, put("auth", {"required": True})))
    assert "set auth.keys_file or auth.keys_env" in problem


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Small, whole, with a tokenizer of its own."""
    path = directory(tmp_path / "model", add_bos_token=True)
    llama = LlamaForCausalLM(LlamaConfig(**{**PLAIN, "vocab_size": SIZE}))
    llama.save_pretrained(path)
    return path


def problems_with(tmp_path: Path, checkpoint: Path, **model: Any) -> str:
    given = {"path": str(checkpoint), "name": "x", "dtype": "float32", **model}

    def change(config: dict[str, Any]) -> None:
        put("model", given)(config)
        put("pipeline.split", "auto")(config)

    return "\n".join(check_file(changed(tmp_path, change)))


def rewrite(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def test_what_a_deployment_would_find_wrong_with_a_checkpoint_is_found_before(tmp_path: Path, checkpoint: Path) -> None:
    assert problems_with(tmp_path, checkpoint) == ""
    rewrite(checkpoint / "tokenizer_config.json", chat_template="{% for %}")
    assert "args.model.prompt_format: the model's chat template is not valid Jinja" in problems_with(
        tmp_path, checkpoint
    )
    rewrite(checkpoint / "tokenizer_config.json", chat_template="{{ messages[0].content + 1 }}")
    assert "args.model.prompt_format: the model's chat template cannot render" in problems_with(tmp_path, checkpoint)
    assert problems_with(tmp_path, checkpoint, prompt_format="none") == ""
    assert "needs the token <step>" in problems_with(tmp_path, checkpoint, prompt_format="codellama-70b")
    rewrite(
        checkpoint / "tokenizer_config.json",
        chat_template="{% generation %}{{ messages[0].content }}{% endgeneration %}",
    )
    rewrite(checkpoint / "added_tokens.json", **{"<pad>": SIZE})
    assert problems_with(tmp_path, checkpoint) == "", "sound, both of them"
    rewrite(checkpoint / "tokenizer_config.json", added_tokens_decoder={SIZE: {"content": "<step>", "special": False}})
    assert "belong to different models" in problems_with(tmp_path, checkpoint)
    (checkpoint / "tokenizer.model").unlink()
    assert "args.model.path: " in (said := problems_with(tmp_path, checkpoint))
    assert "has no tokenizer" in said
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights" in problems_with(tmp_path, checkpoint)
    assert "has no tokenizer" in problems_with(tmp_path, checkpoint, load_format="dummy"), "weights are not needed"


def test_sampling_defaults_of_the_checkpoint_must_be_possible(tmp_path: Path, checkpoint: Path) -> None:
    rewrite(checkpoint / "generation_config.json", temperature=-3)
    assert problems_with(tmp_path, checkpoint) == "", "they are not used"
    said = problems_with(tmp_path, checkpoint, sampling_defaults="checkpoint")
    assert "generation_config.json: temperature" in said


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [({"type": "linear", "factor": 4.0}, 16384), ({"type": "dynamic", "factor": 2.0}, 8192), (None, 4096)],
)
def test_a_context_may_be_as_long_as_rope_scaling_makes_it(
    scaling: dict[str, Any] | None, longest: int, tmp_path: Path, checkpoint: Path
) -> None:
    rewrite(checkpoint / "config.json", rope_scaling=scaling, rope_parameters=None)
    assert problems_with(tmp_path, checkpoint, max_model_len=longest) == ""
    assert f"{longest + 1} is more than the model's {longest}" in problems_with(
        tmp_path, checkpoint, max_model_len=longest + 1
    )


def test_code_llama_may_be_served_up_to_100k_on_request(tmp_path: Path) -> None:
    shape = Path("shape:code-llama-7b")
    for wanted, said in ((32_768, ""), (100_000, ""), (100_001, "100001 is more than the model's 100000")):
        assert said in problems_with(tmp_path, shape, load_format="dummy", max_model_len=wanted)
        assert said or problems_with(tmp_path, shape, load_format="dummy", max_model_len=wanted) == ""


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for one in (put("model.nme", "x"), put("cache.blocksize", 1), put("/http_options.prot", 1)):
            one(config)

    problems = "\n".join(check_file(changed(tmp_path, change)))
    assert all(word in problems for word in ("nme", "blocksize", "prot"))


@pytest.mark.parametrize(("text", "word"), [("a: [", "YAML"), ("", "applications"), ("- x", "mapping")])
def test_what_is_no_configuration(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert word in "\n".join(check_file(file))
    assert "No such file" in "\n".join(check_file(tmp_path / "none.yaml"))


def test_the_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["check", str(ROOT / "ray_config.yaml")])
    assert (good.exit_code, "all good" in good.output) == (0, True)
    bad = runner.invoke(app, ["check", str(changed(tmp_path, put("model.pth", 1)))])
    assert (bad.exit_code, "did you mean path?" in bad.output) == (1, True)
    for command in ("check", "chat", "top", "dashboard", "version"):
        assert "Example: caravan" in runner.invoke(app, [command, "--help"]).output
    refused = runner.invoke(app, ["chat", "--url", "http://127.0.0.1:9"])
    assert refused.exit_code == 1
    assert "does not answer" in refused.output


def test_configuration_is_frozen_and_lists_every_wrong_key() -> None:
    args = {"model": {"path": golden.MODEL, "name": "x"}, "pipeline": {"device": "cpu"}, "cache": {"memory_gb": 1.0}}
    config = parse_app_config(args)
    with pytest.raises(ValueError, match="frozen"):
        config.model.name = "y"
    with pytest.raises(ConfigError) as caught:
        parse_app_config({**args, "modle": 1, "cache": {"memory": 1}})
    assert len(str(caught.value).splitlines()) == 2


# -- what changes in place --------------------------------------------------------------------------------------------


def deployments(**options: Any) -> Change:
    """Set options of Engine and Gateway."""

    def change(config: dict[str, Any]) -> None:
        application(config)["deployments"] = [{"name": name, **values} for name, values in options.items()]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (deployments(Gateway={"user_config": {"gateway": {"keepalive": 5}}}), ["gateway.keepalive: unknown key"]),
        (deployments(Gateway={"user_config": {"scheduler": {}}}), ["user_config.scheduler", "all else stands in args"]),
        (deployments(Gateway={"user_config": {"gatway": {}}}), ["user_config.gatway: Gateway takes gateway, auth"]),
        (deployments(Gateway={"user_config": [1]}), ["user_config: must be a mapping"]),
        (deployments(Gateway={"user_config": {"gateway": {"replicas": 2}}}), ["autoscaling_config of Gateway"]),
        (deployments(Gateway={"num_replicas": 2}), ["deployments[0].num_replicas", "autoscaling_config"]),
        (deployments(Engine={"user_config": {"admission": {}}}), ["user_config.admission: Engine takes logging there"]),
        (put("/applications.0.autoscaling_policy", None), ["autoscaling_policy: must be", "follow_demand"]),
        (put("autoscaling", {"max_replicas": 2}), ["autoscaling_config: stands in args.autoscaling too"]),
        (put("admission", {"target_ttft_s": 5.0}), ["user_config.admission: stands in args too: leave it out there"]),
        (put("autoscaling", {"target_kv_use": 0.5}), ["args.autoscaling.target_kv_use: is no setting any more"]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_changes_in_place_is_checked_too(tmp_path: Path, change: Change, words: list[str]) -> None:
    problems = check_file(changed(tmp_path, change))
    assert problems
    assert all(any(word in problem for problem in problems) for word in words), problems


def in_old_form(config: dict[str, Any]) -> None:
    """All of it in args, as files were before."""
    ours = application(config)
    del ours["deployments"], ours["autoscaling_policy"]
    ours["args"] |= {"autoscaling": {"min_replicas": 1, "max_replicas": 2}, "admission": {"target_ttft_s": 20.0}}


def test_files_that_have_it_all_in_args_are_good(tmp_path: Path) -> None:
    assert check_file(changed(tmp_path, in_old_form)) == []
