"""The cluster files: valid by Ray's own schema, protected, and in step with the rest of the repository."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import ENVIRONMENT
from pipelines.settings import Section

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
REPOSITORY = CLUSTER.parent


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def pinned_ray() -> str:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return next(line.split("==")[1] for line in extras["ray"] if line.startswith("ray["))


@pytest.fixture
def aws() -> dict[str, Any]:
    return load("aws.yaml")


def test_aws_follows_rays_schema(aws: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(aws, schema)
    with pytest.raises(jsonschema.ValidationError):  # the schema is one that refuses
        jsonschema.validate({**aws, "max_worker": 1}, schema)


def test_aws_starts_ray_with_a_token_everywhere(aws: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        starts = [command for command in aws[f"{role}_start_ray_commands"] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0].split("ray start")[0]
    assert aws["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_aws_shows_the_dashboard_to_the_head_alone(aws: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(aws["head_start_ray_commands"])


def test_aws_head_takes_no_work(aws: dict[str, Any]) -> None:
    assert aws["available_node_types"][aws["head_node_type"]]["resources"] == {"CPU": 0}


def test_aws_nodes_can_read_the_bucket_and_hold_the_data(aws: dict[str, Any]) -> None:
    for name, node_type in aws["available_node_types"].items():
        config = node_type["node_config"]
        assert "IamInstanceProfile" in config, name
        assert config["ImageId"], name  # Ray's default is an Ubuntu of 2018
        assert config["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 256, name
    assert any(option.startswith("--shm-size") for option in aws["docker"]["run_options"])


def test_aws_does_not_rent_by_itself(aws: dict[str, Any]) -> None:
    workers = [t for name, t in aws["available_node_types"].items() if name != aws["head_node_type"]]
    assert all(node_type["min_workers"] == 0 for node_type in workers)
    assert aws["max_workers"] <= sum(node_type["max_workers"] for node_type in workers)


def test_the_image_tells_serve_how_to_carry_requests() -> None:
    settings = re.findall(r"((?:RAY_SERVE|TOKENIZERS)_\w+)=(\S+)", (CLUSTER / "Dockerfile").read_text())
    assert dict(settings) == ENVIRONMENT


def test_images_have_versions_and_ray_is_the_pinned_one() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{pinned_ray()}-" in dockerfile
    for path in CLUSTER.rglob("*.yaml"):
        text = path.read_text()
        for image in re.findall(r"^\s*(?:- )?image: (\S+)", text, flags=re.MULTILINE):
            assert re.search(r":\d+\.\d+\.\d+$", image), f"{path.name}: {image}"
        for version in re.findall(r"rayVersion: \"(.+)\"", text):
            assert version == pinned_ray(), path.name


@pytest.mark.parametrize(
    ("name", "cluster_field"), [("rayjob.yaml", "rayClusterSpec"), ("rayservice.yaml", "rayClusterConfig")]
)
def test_kuberay_clusters_ask_for_a_token(name: str, cluster_field: str) -> None:
    cluster = load(f"kuberay/{name}")["spec"][cluster_field]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def serve_configs() -> dict[str, dict[str, Any]]:
    return {
        "serve.yaml": load("serve.yaml"),
        "rayservice.yaml": yaml.safe_load(load("kuberay/rayservice.yaml")["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_serve_configs_are_what_serve_and_the_application_take(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_configs()[name]
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "pipelines.serving.app:build_app"
    arguments = ServeArgs.model_validate(application["args"])
    assert issubclass(ServeArgs, Section)  # which refuses names that it does not know
    assert arguments.num_gpus == 1


def test_the_files_that_are_named_exist() -> None:
    for path in [*CLUSTER.rglob("*.yaml"), CLUSTER / "Dockerfile"]:
        for name in re.findall(r"\b(?:jobs|cluster)/[\w./-]+\.(?:py|yaml)", path.read_text()):
            assert (REPOSITORY / name).is_file(), f"{path.name} names {name}"


def test_the_job_environment_is_one_that_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    environment = RuntimeEnv(**load("env.yaml"))
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    assert not {"pip", "uv", "conda"} & set(environment)
