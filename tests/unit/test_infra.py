"""The recipes of `infra/` and the runbook: they parse, agree with each other and with the code."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import fourdh_batch as fb
from fourdh_batch.config import JobConfig, load_config
from fourdh_batch.storage import MAX_SPOOLED_BYTES
from tests.media import BoxCorpus

REPO = Path(__file__).resolve().parents[2]
INFRA = REPO / "infra"
RUNBOOK = REPO / "docs" / "RUNBOOK.md"
TEXTS = [
    *(path for path in sorted(INFRA.iterdir()) if path.suffix in (".yaml", ".md", ".sbatch")),
    INFRA / "Dockerfile",
    RUNBOOK,
]
UNITS = {"Mi": 2**20, "Gi": 2**30, "": 1}


def parsed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / name).read_text())
    return found


def num_bytes(quantity: str) -> int:
    match = re.fullmatch(r"(\d+)(Mi|Gi|)", quantity)
    assert match, quantity
    return int(match[1]) * UNITS[match[2]]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every job with its `key=value` words: (jobs/name.py, words)."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for match in re.finditer(
        r"(jobs/\w+\.py|infra/fourdh\.sbatch)((?:\s+[a-z][\w.]*=[^\s'`]+)+)", text
    ):
        job = match[1] if match[1].startswith("jobs") else "jobs/ava_pseudogt.py"
        found.append((job, shlex.split(match[2])))
    return found


def config_of(job: str, words: list[str]) -> JobConfig:
    return load_config((REPO / job).with_suffix(".yaml"), words)


def the_command(name: str) -> tuple[str, list[str]]:
    [found] = commands((INFRA / name).read_text())
    return found


def worker() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The group of GPU workers, its pod and its container."""
    [group] = parsed("raycluster.yaml")["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    return group, pod, pod["containers"][0]


@pytest.mark.parametrize("path", sorted(INFRA.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_parses(path: Path) -> None:
    assert yaml.safe_load(path.read_text())


def test_the_words_of_every_recipe_are_settings() -> None:
    found = [(path.name, *c) for path in TEXTS for c in commands(path.read_text())]
    names = {name for name, _, _ in found}
    assert {"rayjob.yaml", "nightly.yaml", "README.md", "fourdh.sbatch"} <= names
    for name, job, words in found:
        config = config_of(job, words)  # raises for a word that is no setting
        assert config.input, name
        assert config.output, name


def test_settings_named_in_the_texts_exist() -> None:
    sections = {"cluster", "plan", "video", "detector", "hmr", "tracker", "poses"}
    config = JobConfig()
    for path in TEXTS:
        for section, name in re.findall(r"\b([a-z]+)\.([a-z_]+)\b(?!\()", path.read_text()):
            if section in sections and name not in ("py", "yaml", "md"):
                assert hasattr(getattr(config, section), name), f"{path.name}: {section}.{name}"


def test_files_named_in_the_texts_exist() -> None:
    for path in TEXTS:
        text = path.read_text()
        for name in re.findall(r"\b(?:jobs|infra|docs|tests)/[\w./]*\w\.\w+", text):
            assert (REPO / name).exists(), f"{path.name}: {name}"
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert (path.parent / link).resolve().exists(), f"{path.name}: {link}"


def test_the_job_has_the_cluster_of_the_standing_one() -> None:
    assert parsed("rayjob.yaml")["spec"]["rayClusterSpec"] == parsed("raycluster.yaml")["spec"]
    assert the_command("rayjob.yaml")[1] == the_command("nightly.yaml")[1]
    assert the_command("nightly.yaml")[0] == "jobs/nightly.py"


def test_a_head_has_no_cores_to_give() -> None:
    head = parsed("raycluster.yaml")["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    aws = parsed("aws.yaml")
    assert aws["available_node_types"][aws["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in aws["head_start_ray_commands"][-1]


def test_a_worker_has_what_its_settings_ask_for() -> None:
    config = config_of(*the_command("rayjob.yaml"))
    cluster = config.cluster
    group, pod, container = worker()
    start, limits = group["rayStartParams"], container["resources"]["limits"]
    assert container["resources"]["requests"] == limits

    assert int(start["num-gpus"]) == int(limits["nvidia.com/gpu"]) == 1
    assert cluster.gpus_per_actor + cluster.trackers_per_actor * cluster.gpus_per_tracker == 1
    counted = cluster.cpus_per_actor + cluster.units_per_actor * cluster.cpus_per_decoder
    assert int(start["num-cpus"]) == counted + 1  # publishing must not wait for a decoder's core
    assert int(limits["cpu"]) >= int(start["num-cpus"]) + cluster.trackers_per_actor + 1
    assert group["maxReplicas"] == cluster.max_gpu_actors
    assert group["minReplicas"] == group["replicas"] == 0
    assert config.hmr.device == "cuda"  # or nobody would ask for a GPU while there is none

    [shm] = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
    chunks = cluster.units_per_actor * (cluster.chunks_ahead + 2)
    store = int(start["object-store-memory"])
    assert chunks * config.video.max_chunk_mb * 2**20 <= store <= num_bytes(shm["sizeLimit"]) * 0.8
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert num_bytes(limits["memory"]) >= 4 * num_bytes(shm["sizeLimit"])
    disk = cluster.units_per_actor * MAX_SPOOLED_BYTES + 20 * 2**30
    assert num_bytes(limits["ephemeral-storage"]) >= disk


def test_the_other_recipes_have_workers_of_the_same_size() -> None:
    group, _, _ = worker()
    start = group["rayStartParams"]
    aws = parsed("aws.yaml")
    node = aws["available_node_types"]["gpu"]
    assert node["resources"] == {"CPU": int(start["num-cpus"]), "GPU": int(start["num-gpus"])}
    assert node["max_workers"] == aws["max_workers"] == group["maxReplicas"]
    assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    command = aws["worker_start_ray_commands"][-1]
    for word in ("num-cpus", "num-gpus", "object-store-memory"):
        assert f"--{word}={start[word]}" in command

    slurm = (INFRA / "fourdh.sbatch").read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", slurm))
    gpus = int(options["gpus-per-node"])
    units = int(re.findall(r"UNITS:-(\d+)", slurm)[0])
    assert units == config_of(*the_command("rayjob.yaml")).cluster.units_per_actor
    assert int(options["cpus-per-task"]) == gpus * (1 + units + 3)
    assert num_bytes(options["mem"] + "i") >= gpus * 48 * 2**30


def test_models_are_mounted_where_the_words_look_for_them() -> None:
    paths = [word.partition("=")[2] for word in the_command("rayjob.yaml")[1]]
    models = {Path(path).parent for path in paths if path.startswith("/models/")}
    spec = parsed("raycluster.yaml")["spec"]
    for template in (spec["headGroupSpec"]["template"], worker()[0]["template"]):
        [container] = template["spec"]["containers"]
        [mount] = [m for m in container["volumeMounts"] if m["name"] == "models"]
        assert models == {Path(mount["mountPath"])}
        assert mount["readOnly"] is True
    assert any(":/models:ro" in option for option in parsed("aws.yaml")["docker"]["run_options"])


def test_the_nightly_job_finds_the_standing_cluster() -> None:
    cluster = parsed("raycluster.yaml")
    name = cluster["metadata"]["name"]
    cron = parsed("nightly.yaml")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    [container] = cron["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    [head] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    [port] = [p["containerPort"] for p in head["ports"] if p["name"] == "dashboard"]
    assert f"--address=http://{name}-head-svc:{port}" in container["command"]  # KubeRay's names
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == cluster["spec"]["authOptions"]["mode"] == "token"
    secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": name, "key": "auth_token"}


def test_images_and_versions_agree() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPO / "constraints.txt").read_text(), re.M))
    images = {i for p in TEXTS for i in re.findall(r"registry\.example\.com/\S+", p.read_text())}
    assert images == {
        f"registry.example.com/fourdh_batch:{fb.__version__}-{device}" for device in ("cuda", "cpu")
    }
    assert parsed("raycluster.yaml")["spec"]["rayVersion"] == pins["ray"]
    assert pins["onnxruntime"]
    assert pins["torch"]


def test_nothing_secret_stands_in_a_recipe() -> None:
    for path in TEXTS:
        text = path.read_text()
        assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s]+:[^/\s]+@", text), path.name
        assert not re.search(r"(?i)(secret_access_key|auth_token)\s*[:=]\s*['\"]?\w{16}", text)


def test_pods_run_without_privileges() -> None:
    spec = parsed("raycluster.yaml")["spec"]
    cron = parsed("nightly.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    for pod in (spec["headGroupSpec"]["template"]["spec"], worker()[1], cron):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "resources" in container


def test_the_image_copies_only_what_the_context_lets_in() -> None:
    text = re.sub(r"\\\n\s*", " ", (INFRA / "Dockerfile").read_text())
    copied = {
        source for line in re.findall(r"^COPY (.+)$", text, re.M) for source in line.split()[:-1]
    }
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert copied == let_in
    assert all((REPO / name).exists() for name in copied)
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", text, re.M)
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "1000"
    for line in re.findall(r"^(?:RUN|    &&).*pip install.*$", text, re.M):
        assert "--constraint" in line or "==" in line


def test_the_cluster_launcher_takes_its_recipe() -> None:
    from ray.autoscaler._private.docker import validate_docker_config
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(parsed("aws.yaml"))
    validate_config(config)
    validate_docker_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0
    bad = parsed("aws.yaml") | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(bad))


def test_the_messages_of_the_runbook_are_those_of_the_code() -> None:
    said: list[str] = []
    for path in sorted((REPO / "fourdh_batch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(re.sub(r"%[-.\d]*[a-z]", "…", node.value))
    blocks = re.findall(r"```text\n(.*?)```", RUNBOOK.read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 20
    statuses = ("partial", "failed", "quarantined", "suspect", "nobody")
    for line in lines:
        if "[Errno 28]" in line:  # the system's words
            assert os.strerror(28) in line
            continue
        for part in line.split("…"):
            words = part.strip(" :;,.()")
            if len(words) > 3 and words not in statuses:
                assert any(words in text for text in said), f"{line!r}: {words!r}"


def test_the_runbook_has_every_part_in_every_section() -> None:
    text = RUNBOOK.read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    for section in sections:
        for part in ("**You see**", "**It means**", "**Do**", "**Do not**"):
            assert part in section, section.splitlines()[0]
    anchors = {
        re.sub(r"[^\w -]", "", section.splitlines()[0]).lower().replace(" ", "-")
        for section in sections
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) == anchors


SRUN = """#!/usr/bin/env bash
# As many copies of the command as tasks, all on this machine.
num_tasks=1
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && num_tasks=${1#*=}
    shift
done
echo "srun $num_tasks $*" >> "$FAKE_LOG"
trap 'kill -TERM $(jobs -p)' TERM
for _ in $(seq "$num_tasks"); do "$@" & done
wait
wait
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$FAKE_LOG"
if [[ $1 == show ]]; then echo node1; echo node2; fi
"""


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(INFRA / "fourdh.sbatch")], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_slurm_script_stops_in_time_requeues_and_goes_on(tmp_path: Path) -> None:
    fakes, log = tmp_path / "bin", tmp_path / "slurm.log"
    fakes.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    corpus = BoxCorpus(tmp_path / "in")
    for seed in range(4):
        corpus.add(f"{seed}.mp4", num_frames=300, seed=seed)
    words = [w for w in corpus.settings(tmp_path / "out") if "address" not in w]
    env = {
        **os.environ,
        "PATH": f"{fakes}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "FAKE_LOG": str(log),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "HEAD_IP": "127.0.0.1",
        "UNITS": "1",
        "WAIT_S": "60",
    }
    env.pop("RAY_ADDRESS", None)

    def submit(*, stop_at: str = "") -> tuple[int, str]:
        output = tmp_path / "job.log"
        with output.open("w") as file:
            process = subprocess.Popen(
                ["bash", str(INFRA / "fourdh.sbatch"), *words],
                cwd=REPO,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                if stop_at and stop_at in output.read_text():
                    process.send_signal(signal.SIGUSR1)
                    stop_at = ""
                time.sleep(0.2)
        return process.returncode, output.read_text()

    code, text = submit(stop_at="The bodies in the output mean nothing")  # the models are there
    assert "2 of 2 nodes are up" in text, text[-3000:]
    assert "stopped; finished videos are kept" in text, text[-3000:]
    assert code == 1
    assert f"scontrol requeue {os.getpid()}" in log.read_text()

    code, text = submit()  # at once: the lease was given back
    assert code == 0, text[-3000:]
    assert log.read_text().count("requeue") == 1
    assert fb.read_table(str(tmp_path / "out"), "videos")["frames_decoded"].tolist() == [300] * 4
    assert not Path(f"/tmp/ray-{os.getpid()}").exists()
